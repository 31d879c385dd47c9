"""Commands to JSON: the recipe's road from two trainings and a rival to a result file, on tiny models."""

import json

import pandas as pd
import pytest
import torch
import yaml
from conftest import INSTRUCTIONS, weights_hash
from safetensors.torch import load_file
from test_scripts import call  # noqa: F401
from transformers import AutoModelForCausalLM

from eval_tasks.baselines.few_shot import few_shot
from eval_tasks.benchmarks.snips import one_of_each_kind, uncertainty_metrics
from eval_tasks.protogen_lm import ProtoGenLM
from eval_tasks.report import read_result
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.data import Example
from trainers.finetuning import AnswerTrainer, PromptAndAnswerCollator
from trainers.training_args import ProtoGenTrainingArguments

EXAMPLES = [
    Example(str(row), instruction, "", json.dumps({"name": word}), kind)
    for row, (instruction, word, kind) in enumerate(zip(INSTRUCTIONS, ("cat", "sky", "three"), "aab", strict=True))
]


TOKEN_HEAD = ["--losses", '{"token_head": 1, "duration": 1}', "--slot_adapter_rank", 0]


@pytest.fixture
def recipe(llama_dir, tmp_path):
    rows = [
        {"instruction": f"{start} {word}", "context": "", "response": json.dumps({"name": word}), "category": start}
        for start in INSTRUCTIONS
        for word in ("cat", "dog", "bird", "mat", "tree", "sky", "red", "blue", "green", "ran", "sat", "flew")
    ]
    (tmp_path / "commands.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "output_dir": str(tmp_path / "run"),
        "decoder": str(llama_dir),
        "decoder_dtype": "float32",
        "data": str(tmp_path / "commands.jsonl"),
        "validation_share": 0.4,
        "latent_source": "decoder",
        "decoder_sees_prompt": True,
        "upsamples_prompt": True,
        "arrangement": "e_only",
        "chunk_size": 1,
        "max_chunks": 8,
        "predictor_dim": 64,
        "num_source_layers": 1,
        "num_query_layers": 1,
        "slot_adapter_rank": 2,
        "prompt_template": "the {message} is ",
        "answer_format": "key_value_lines",
        "exchanged_copies": 1,
        "losses": {"reconstruction": 1.0, "duration": 1.0, "length_nll": 0.1, "error_nll": 0.1},
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "ema_decay": 0.5,
        "use_cpu": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_answer_that_cannot_be_lines_is_named_before_training(call, recipe, tmp_path):  # noqa: F811
    with open(tmp_path / "commands.jsonl", "a") as file:
        file.write('\n{"instruction": "the red light", "response": "light on"}\n')
    said = call("train", "--config", recipe)
    assert "the instruction 'the red light' has an answer that answer_format=key_value_lines does not take" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("latent_source", ["decoder", "encoder"])
def test_two_trainings_a_rival_and_their_result(call, recipe, tmp_path, llama_dir, encoder_dir, latent_source):  # noqa: F811
    content = yaml.safe_load(recipe.read_text()) | {"latent_source": latent_source, "encoder": str(encoder_dir)}
    recipe.write_text(yaml.safe_dump(content))
    before = weights_hash(AutoModelForCausalLM.from_pretrained(llama_dir))
    first = ["--output_dir", tmp_path / "predictor", *TOKEN_HEAD]
    assert "model in" in call("train", "--config", recipe, *first)
    assert "model in" in call("train", "--config", recipe, "--start_from", tmp_path / "predictor" / "model")
    assert "model in" in call("finetune", "--config", recipe, "--output_dir", tmp_path / "rival")
    assert "already trained" in call("finetune", "--config", recipe, "--output_dir", tmp_path / "rival")
    assert weights_hash(AutoModelForCausalLM.from_pretrained(llama_dir)) == before
    assert weights_hash(AutoModelForCausalLM.from_pretrained(tmp_path / "rival" / "model")) != before

    assert "MB" in call("pack", tmp_path / "run", tmp_path / "packed")
    packed = ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "packed" / "model")
    assert {p.dtype for p in packed.proto_predictor.parameters()} == {torch.bfloat16}
    assert weights_hash(packed) == weights_hash(
        ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "run" / "model", dtype=torch.bfloat16)
    )
    names = load_file(tmp_path / "packed" / "model" / "model.safetensors").keys()
    assert not [name for name in names if "word_embeddings" in name or name.startswith("decoder.")]
    assert ProtoGenLM(str(tmp_path / "packed" / "model")).processor.answer_format == "key_value_lines"
    assert "leave out --stream" in call("generate", tmp_path / "packed" / "model", "three", "--stream")
    again = ["--output_dir", tmp_path / "again", "--start_from", tmp_path / "packed" / "model", "--max_steps", 1]
    assert "model in" in call("train", "--config", recipe, *again)
    assert "exists; remove it" in call("pack", tmp_path / "run", tmp_path / "packed")

    (tmp_path / "foreign.jsonl").write_text('{"question": "three animals"}\n{"instruction": "the sky"}\n')
    measure = ["--run", tmp_path / "packed", "--finetuned", tmp_path / "rival" / "model", "--predictor"]
    measure += [tmp_path / "predictor", "--data", tmp_path / "commands.jsonl", "--train-data"]
    measure += [tmp_path / "commands.jsonl", "--few-shot", 2, "--foreign", tmp_path / "foreign.jsonl", "--limit", 9]
    measure += ["--few-shot-limit", 3, "--show", 2, "--rounds", 2, "--result", tmp_path / "snips.json"]
    out = call("bench", "snips", *measure)
    assert out.count(" ms ") == 8
    metrics = read_result(tmp_path / "snips.json")["metrics"]
    assert metrics["token_head_milliseconds_an_answer"] > 0
    for name in ("one_step", "finetuned", "few_shot", "token_head"):
        assert 0 <= metrics[f"{name}_valid_json"] <= 1
    assert (metrics["finetuned_commands"], metrics["few_shot_commands"]) == (9, 3)
    assert metrics["foreign_questions"] == 2
    assert metrics["trained_parameters_in_slot_adapters"] > 0
    assert {"held_out_exact_match_after_8_examples", "held_out_exact_match_after_16_examples"} <= metrics.keys()
    assert (tmp_path / "snips.md").read_text().count("\n") == 11
    assert (tmp_path / "snips.png").is_file()


def test_predictors_are_compared_by_their_token_heads(call, recipe, tmp_path, monkeypatch):  # noqa: F811
    sweep = tmp_path / "heads.yaml"
    sweep.write_text(
        yaml.safe_dump(
            {
                "recipe": str(recipe),
                "fixed": {"losses": {"token_head": 1.0, "duration": 1.0}, "slot_adapter_rank": 0},
                "runs": {"base": {}, "none": {"exchanged_copies": 0}},
                "gather": "token_head",
                "report": ["exact_match_gain"],
            }
        )
    )
    for run, copies in (("base", 1), ("none", 0)):
        call(
            "train",
            "--config",
            recipe,
            "--output_dir",
            tmp_path / "runs" / "heads" / run,
            *TOKEN_HEAD,
            "--exchanged_copies",
            copies,
        )
    monkeypatch.chdir(tmp_path)
    assert "| none |" in call("sweep", sweep, "--gather")
    metrics = read_result(tmp_path / "runs" / "heads.json")["metrics"]
    assert metrics["none_exact_match_gain"][0] == pytest.approx(
        metrics["none_exact_match"][0] - metrics["base_exact_match"][0]
    )
    assert (metrics["base_commands_seen"], metrics["none_commands_seen"]) == (16, 16)


def test_losses_and_layout_that_do_not_go_together_are_refused(call, recipe):  # noqa: F811
    out = call("train", "--config", recipe, "--losses", '{"reconstruction": 1}')
    assert "upsamples_prompt: true and the loss duration need each other" in out
    out = call("train", "--config", recipe, "--chunk_size", 2, "--losses", '{"token_head": 1, "duration": 1}')
    assert "arrangement: e_only, chunk_size: 1" in out


def test_a_start_of_another_shape_is_refused(call, recipe, tmp_path):  # noqa: F811
    call("train", "--config", recipe)
    other = ["--output_dir", tmp_path / "other", "--num_source_layers", 2, "--start_from", tmp_path / "run" / "model"]
    assert "start_from needs a model of the same shape" in call("train", "--config", recipe, *other)


def test_the_rival_learns_answers_and_nothing_else(llama_dir, tmp_path):
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(
        None, str(llama_dir), prompt_template="the {message} is", answer_format="key_value_lines"
    )
    batch = PromptAndAnswerCollator(processor)(EXAMPLES)
    decoder = AutoModelForCausalLM.from_pretrained(llama_dir)
    args = ProtoGenTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    loss = AnswerTrainer(model=decoder, args=args).compute_loss(decoder, dict(batch))
    means = []
    for example in EXAMPLES:
        prompt = processor(example.instruction)["decoder_prompt_ids"][0]
        labels = processor.encode_answers([example.answer])["labels"][0]
        logits = decoder(torch.cat([prompt, labels])[None]).logits[0, len(prompt) - 1 : -1]
        means.append(torch.nn.functional.cross_entropy(logits, labels))
    torch.testing.assert_close(loss, torch.stack(means).mean(), rtol=1e-4, atol=1e-5)


def test_few_shot_prompts_hold_the_examples_and_answers_end_at_an_empty_line(llama_dir, monkeypatch):
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(
        None, str(llama_dir), prompt_template="the {message} is "
    )
    decoder, seen = AutoModelForCausalLM.from_pretrained(llama_dir), []
    tokenizer = processor.decoder_tokenizer

    def generate(**inputs):
        seen.append(inputs["input_ids"])
        return torch.cat([inputs["input_ids"], tokenizer("cat dog", return_tensors="pt").input_ids], dim=1)

    monkeypatch.setattr(decoder, "generate", generate)
    shown = [Example("0", "tell me", "", "red"), Example("1", "about", "sky", "blue")]
    written = few_shot(decoder, processor, shown)(["who sat"], ["mat"], 4)
    words = "the tell me is red the about sky is blue the who sat mat is"
    assert tokenizer.decode(seen[0][0]) == words
    assert written.texts == ["cat dog"]


def test_few_shot_examples_take_turns():
    assert [example.id for example in one_of_each_kind(EXAMPLES, 3)] == ["0", "2", "1"]


def test_thresholds_come_from_held_out_commands(build, llama_dir, tmp_path):
    """Nine right answers below a score of 0.5 and one wrong above; the same threshold on the test."""
    model, processor = build(llama_dir, decoder_sees_prompt=True, latent_source="decoder")
    scores = [0.1, 0.2, 0.3, 0.4, 0.9]
    right, wrong = '{"name": "cat"}', '{"name": "dog"}'
    table = pd.DataFrame({"exact_match": [1, 1, 1, 1, 0], model.config.uncertainty_score: scores})
    table.to_csv(tmp_path / "answers.csv", index=False)
    records = pd.DataFrame(
        {"answer": [right, wrong, right, wrong], model.config.uncertainty_score: [0.15, 0.3, 0.6, 0.95]}
    )
    metrics = uncertainty_metrics(model, processor, tmp_path, records, [right] * 4, [])
    assert metrics["auroc_wrong"] == pytest.approx(3 / 4)
    # Up to 0.4 all held-out answers are right: of the test's, one right and one wrong are given.
    assert metrics["kept_right_at_threshold_for_95"] == 0.5
    assert metrics["precision_at_threshold_for_95"] == 0.5
    # With hindsight only the first may be given.
    assert metrics["kept_right_at_95_precision"] == 0.5
    assert metrics["coverage_at_95_precision"] == 0.25
