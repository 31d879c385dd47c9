"""Teacher answers and synthetic instructions."""

import json

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import CONTEXTS, INSTRUCTIONS
from test_scripts import call, recipe  # noqa: F401  (fixtures)
from transformers import AutoTokenizer

from eval_tasks.report import read_result
from modeling_protogen import ProtoGenProcessor
from trainers import synthetic_instructions, teacher
from trainers.data import Example, ProtoGenCollator, fitting_targets, with_teacher_answers
from trainers.files import append_lines, read_lines
from trainers.synthetic_instructions import is_wanted, normalized, synthetic_examples, user_turn, write_instructions
from trainers.teacher import TeacherInfo, prompt_template, read_teacher_answers, write_teacher_answers

EXAMPLES = [
    Example(f"id{n}", i, c or "", "the cat", "open")
    for n, (i, c) in enumerate(zip(INSTRUCTIONS, CONTEXTS, strict=True))
]
INFO = TeacherInfo("tiny", None, "abc", "PROMPT", 64, 6)


@pytest.fixture
def processor(encoder_dir, llama_dir):
    return ProtoGenProcessor.from_encoder_decoder_pretrained(str(encoder_dir), str(llama_dir), max_answer_length=6)


def write(decoder, processor, folder, examples=EXAMPLES, info=INFO, batch_size=2):
    return write_teacher_answers(decoder, processor, examples, folder, info, Accelerator(cpu=True), batch_size)


def test_lines_survive_a_torn_one(tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    assert read_lines(path) == []
    append_lines(path, [{"a": 1}, {"a": "\u00e9\u2028\n"}])
    with open(path, "a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [{"a": 1}, {"a": "\u00e9\u2028\n"}]
    append_lines(path, [{"a": 4}])
    assert read_lines(path) == [{"a": 1}, {"a": "\u00e9\u2028\n"}, {"a": 4}]


def test_answers_are_the_decoders_own_one_token_after_the_other(decoder, processor, tmp_path):
    answers = write(decoder, processor, tmp_path)
    for example in EXAMPLES:
        ids = processor(example.instruction, example.context)["decoder_prompt_ids"]
        expected = []
        while len(expected) < 6 and (not expected or expected[-1] != 2):
            logits = decoder(torch.cat([ids, torch.tensor([expected], dtype=torch.long)], 1)).logits
            expected.append(logits[0, -1].argmax().item())
        assert answers[example.id] == expected


def test_an_answer_ends_with_its_first_eos(decoder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(
        decoder, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([[5, 2, 7], [5, 6, 7]])], 1)
    )
    answers = write(decoder, processor, tmp_path, EXAMPLES[:2])
    assert sorted(answers.values()) == [[5, 2], [5, 6, 7]]


def test_nothing_is_answered_twice(decoder, processor, tmp_path, monkeypatch):
    first = write(decoder, processor, tmp_path, EXAMPLES[:2])
    answered = []
    greedy = teacher.greedy_answers
    monkeypatch.setattr(
        teacher, "greedy_answers", lambda d, p, part, n: answered.extend(e.id for e in part) or greedy(d, p, part, n)
    )
    everything = write(decoder, processor, tmp_path)
    assert answered == ["id2"]
    assert first.items() <= everything.items()
    assert len(everything) == 3


def test_answers_of_another_teacher_are_refused(decoder, processor, tmp_path):
    with pytest.raises(FileNotFoundError, match="protogen teacher"):
        read_teacher_answers(tmp_path, INFO)
    write(decoder, processor, tmp_path, EXAMPLES[:1])
    other = TeacherInfo("elsewhere/tiny", "main", "abc", "PROMPT", 64, 6)
    assert read_teacher_answers(tmp_path, other)
    for name, value in (
        ("decoder_fingerprint", "xyz"),
        ("template", "Q: PROMPT"),
        ("max_prompt_length", 32),
        ("max_length", 7),
    ):
        changed = TeacherInfo(**(vars(INFO) | {name: value}))
        with pytest.raises(ValueError, match=f"{name}: there"):
            write(decoder, processor, tmp_path, info=changed)


def test_damaged_answers_are_named(decoder, processor, tmp_path):
    write(decoder, processor, tmp_path)
    answers, info = tmp_path / "answers-000.jsonl", tmp_path / "teacher.json"
    whole = answers.read_text()
    answers.write_text(whole.replace("[", "[9, ", 1))
    with pytest.raises(ValueError, match="answers-000.jsonl, line 1 is damaged: remove the line"):
        read_teacher_answers(tmp_path, INFO)
    answers.write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match="answers-000.jsonl, line 1 has no id and token_ids"):
        read_teacher_answers(tmp_path, INFO)
    answers.write_text(whole)
    info.write_text("{")
    with pytest.raises(ValueError, match="teacher.json is damaged: .*Restore it"):
        read_teacher_answers(tmp_path, INFO)
    info.unlink()
    with pytest.raises(ValueError, match="holds answers and no teacher.json"):
        write(decoder, processor, tmp_path)


def test_the_template_is_what_stands_around_the_instruction(processor):
    assert prompt_template(processor).split() == ["<bos>", "<unk>", "<eos>", "answer"]


def test_targets(processor):
    answers = {"id0": [5, 6, 2], "id1": [7, 2], "id2": [8] * 6}
    assert with_teacher_answers(EXAMPLES, {}, "human") == EXAMPLES
    taught = with_teacher_answers(EXAMPLES, answers, "teacher")
    assert [e.id for e in taught] == ["id0-teacher", "id1-teacher", "id2-teacher"]
    both = with_teacher_answers(EXAMPLES, answers, "both")
    assert both == EXAMPLES + taught
    assert fitting_targets(processor.decoder_tokenizer, taught, 2) == {
        "id0-teacher": [5, 6],
        "id1-teacher": [7, 2],
        "id2-teacher": [8, 8],
    }
    batch = ProtoGenCollator(processor)(taught)
    assert batch["labels"][0].tolist() == [5, 6, 2, -100, -100, -100]
    assert batch["length_labels"].tolist() == [3, 2, 6]
    with pytest.raises(ValueError, match="1 of 3 instructions have no teacher answer, the first is 'what color"):
        with_teacher_answers(EXAMPLES, {"id0": [2], "id2": [2]}, "both")


def test_the_users_turn_in_the_template(llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.chat_template = "{% for m in messages %}<bos> name {{ m['content'] }} <eos> the{% endfor %}"
    before, after = user_turn(tokenizer)
    assert tokenizer.convert_ids_to_tokens(before) == ["<bos>", "name"]
    assert tokenizer.convert_ids_to_tokens(after) == ["<eos>", "the"]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        user_turn(tokenizer)


def test_instructions_are_new_ended_and_long_enough(decoder, llama_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    texts = [
        "who sat on the mat <eos> the",
        "Who sat, on the mat <eos>",  # the same
        "who sat <eos>",  # too short
        "name three animals under the tree",  # not ended
        "what color is the sky <eos>",
    ]

    def sampled(input_ids, **kwargs):
        assert kwargs["do_sample"]
        rows = [tokenizer(text.lower().replace(",", ""), add_special_tokens=False).input_ids for text in texts]
        return torch.tensor([input_ids[0].tolist() + row + [0] * (9 - len(row)) for row in rows])

    monkeypatch.setattr(decoder, "generate", sampled)
    path = tmp_path / "instructions.jsonl"
    assert write_instructions(decoder, tokenizer, path, 2) == ["who sat on the mat", "what color is the sky"]
    assert [row["batch"] for row in read_lines(path)] == [0, 0]
    with pytest.raises(ValueError, match="a hundred batches brought no new instruction"):
        write_instructions(decoder, tokenizer, path, 3)
    assert [e.instruction for e in synthetic_examples(tmp_path, 1)] == ["who sat on the mat"]
    with pytest.raises(FileNotFoundError, match="holds 2 synthetic instructions, 3 are wanted"):
        synthetic_examples(tmp_path, 3)


def test_an_interrupted_run_goes_on_to_the_same_instructions(decoder, llama_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    settings = {"batch_size": 8, "max_tokens": 30, "min_words": 1, "max_words": 40}
    whole = write_instructions(decoder, tokenizer, tmp_path / "whole.jsonl", 20, **settings)
    append, calls = synthetic_instructions.append_lines, []

    def killed(path, rows):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        append(path, rows)

    monkeypatch.setattr(synthetic_instructions, "append_lines", killed)
    with pytest.raises(KeyboardInterrupt):
        write_instructions(decoder, tokenizer, tmp_path / "cut.jsonl", 20, **settings)
    monkeypatch.setattr(synthetic_instructions, "append_lines", append)
    assert write_instructions(decoder, tokenizer, tmp_path / "cut.jsonl", 20, **settings) == whole
    assert len({normalized(text) for text in whole}) == 20


def test_what_is_wanted():
    assert is_wanted("name three animals", 3, 5)
    assert not is_wanted("name animals", 3, 5)
    assert not is_wanted("1 2 3 4", 3, 5)
    assert normalized("  What's THE\nsky?") == "what s the sky"


def test_teacher_targets_from_the_command_line(call, recipe, tmp_path, monkeypatch):  # noqa: F811
    arguments = ["--config", recipe, "--targets", "teacher", "--teacher_max_length", 6]
    assert "no teacher answers in" in call("train", *arguments)
    assert "answers in" in call("teacher", *arguments)
    assert "model in" in call("train", *arguments)
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 <= trained["after"]["eval_accepted_length"] <= 6
    synthetic = [*arguments, "--instructions", "both", "--num_synthetic", 3, "--output_dir", tmp_path / "more"]
    (tmp_path / "more" / "teacher").mkdir(parents=True)
    rows = [{"instruction": f"who is the {word}", "batch": 0} for word in ("cat", "dog", "bird")]
    append_lines(tmp_path / "more" / "teacher" / "instructions.jsonl", rows)
    assert "answers in" in call("teacher", *synthetic)
    prompts = tmp_path / "prompts"
    last = [*synthetic, "--decoder_sees_prompt", "true", "--prompt_store", prompts]
    last[last.index("--output_dir") + 1] = tmp_path / "runs" / "alone" / "base"
    last += ["--teacher_answers", tmp_path / "more" / "teacher"]
    assert "model in" in call("train", *last)
    assert list(prompts.glob("*.safetensors"))
    answers = pd.read_csv(tmp_path / "runs" / "alone" / "base" / "answers.csv")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone.yaml").write_text(f"{{recipe: {recipe}, runs: {{base: {{}}}}, gather: answers}}")
    call("sweep", tmp_path / "alone.yaml", "--gather")
    metrics = read_result(tmp_path / "runs" / "alone.json")["metrics"]
    assert metrics["base_agreement"][0] == pytest.approx(answers["agreement"].mean())
    assert "set targets to teacher or both" in call("train", *synthetic, "--targets", "human")


def test_drafts_from_the_command_line(call, recipe, tmp_path):  # noqa: F811
    options = {"latent_source": "none", "arrangement": "e_m", "chunk_size": 4, "slot_adapter_rank": 2}
    options |= {"coherence_dim": 2, "decoder_sees_prompt": "true", "num_anchors": 3, "losses": '{"draft": 1}'}
    arguments = ["--config", recipe, "--targets", "teacher", "--teacher_max_length", 9]
    arguments += [part for name, value in options.items() for part in (f"--{name}", value)]
    assert "answers in" in call("teacher", *arguments)
    assert "model in" in call("train", *arguments)
    trained = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]
    assert {"eval_top1_1", "eval_top1_3", "eval_kept_tokens"} < set(trained)
    (tmp_path / "drafting.yaml").write_text(f"{{recipe: {recipe}, runs: {{run: {{}}}}, gather: drafts}}")
    result = tmp_path / "drafts.json"
    wanted = ["--models", f"trained={tmp_path / 'run' / 'model'}", "--dolly", tmp_path / "data.jsonl", "--prompts", 3]
    wanted += ["--tokens", 9, "--anchors", 4, "--batch-size", 2, "--thresholds", 0, 1, "--result", result]
    call("bench", "drafts", *wanted)
    metrics = read_result(result)["metrics"]
    assert {"trained_top1_1_dolly", "trained_top10_3_dolly", "mean_of_prompt_kept_dolly"} < set(metrics)
    assert metrics["trained_top1_1_dolly"][0] <= metrics["trained_top10_1_dolly"][0] <= 1
    # Drafts that are never sure enough are not kept, and the answer is the decoder's own.
    assert metrics["adaptive@1.0_tokens_a_pass_dolly"] == [1.0] * 3
    assert metrics["adaptive@1.0_agreement_dolly"] == [1.0] * 3
    assert metrics["adaptive@0.0_tokens_a_pass_dolly"][0] > 1
    assert result.with_suffix(".png").is_file()
    speed = ["--run", tmp_path / "run", "--data", tmp_path / "data.jsonl", "--batch-size", 1, "--steps", 2]
    call("bench", "training-speed", *speed, "--result", tmp_path / "speed.json")
    metrics = read_result(tmp_path / "speed.json")["metrics"]
    rates = [metrics[f"drafted_tokens_per_second_{name}"] for name in ("32_anchors", "1_anchor")]
    assert metrics["times_one_anchor"] == pytest.approx(rates[0] / rates[1])
