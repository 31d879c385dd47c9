"""ProtoGen under lm-eval, against the harness's own model of the same decoder."""

import importlib.util
import inspect
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import lm_eval
import pytest
import torch
from conftest import INSTRUCTIONS, WORDS, in_two_processes
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import GPT2Config, GPT2LMHeadModel

from eval_tasks import lm_eval_hook
from eval_tasks.protogen_lm import ProtoGenLM, last_blocks
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor

CONTEXTS = [
    "who sat on the mat",
    "what color is the sky\n\nthe sky was red and",
    "name three animals\n\na cat a dog\n\nname two animals\n\na",
    "the",
    "tell me about paris france",
]


def instances(kind, arguments):
    return [Instance(kind, {}, tuple(each), number) for number, each in enumerate(arguments)]


def save(build, decoder_dir, folder, **fields):
    model, processor = build(decoder_dir, decoder_sees_prompt=True, **fields)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(build, decoder_dir, tmp_path):
    return save(build, decoder_dir, tmp_path / "model")


@pytest.fixture
def llama_checkpoint(build, llama_dir, tmp_path):
    return save(build, llama_dir, tmp_path / "model")


def answers_of(lm, contexts, **kwargs):
    return lm.generate_until(instances("generate_until", [[context, {"until": []} | kwargs] for context in contexts]))


def scores_of(lm, pairs):
    return lm.loglikelihood(instances("loglikelihood", pairs))


@pytest.fixture
def hf(decoder_dir):
    return HFLM(str(decoder_dir), device="cpu", dtype="float32", batch_size=2)


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_verified_answers_and_scores_are_those_of_the_decoder(checkpoint, hf, batch_size):
    lm = ProtoGenLM(str(checkpoint), mode="verified", batch_size=batch_size, device="cuda:0")
    assert lm.scoring == "verified"
    kwargs = {"until": ["sky", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [[context, kwargs] for context in CONTEXTS]
    expected = hf.generate_until(instances("generate_until", requests))
    assert lm.generate_until(instances("generate_until", requests)) == expected
    assert any(expected)

    pairs = [[context, f" {word}"] for context in CONTEXTS for word in ("cat", "dog sat", "it was blue")]
    scores = lm.loglikelihood(instances("loglikelihood", pairs))
    torch.testing.assert_close(
        torch.tensor(scores), torch.tensor(hf.loglikelihood(instances("loglikelihood", pairs))), rtol=1e-4, atol=1e-4
    )
    texts = [[context] for context in CONTEXTS[:3]]
    rolling = lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    assert rolling == pytest.approx(hf.loglikelihood_rolling(instances("loglikelihood_rolling", texts)), rel=1e-4)


def test_edges_of_the_window_are_scored_as_by_the_decoder(llama_checkpoint, llama_dir, caplog):
    lm = ProtoGenLM(str(llama_checkpoint), mode="verified", batch_size=3, max_length=16)
    hf = HFLM(str(llama_dir), device="cpu", dtype="float32", max_length=16)
    pairs = [[context, answer] for context in ("", "who", "who ", "cat dog " * 20) for answer in (" cat", " cat" * 16)]
    # Nothing is certain, and the harness's own model dies of it.
    empty = [["", ""], ["who", ""], ["cat " * 20, " "]]
    assert scores_of(lm, pairs + empty) == [*scores_of(hf, pairs), *[(0.0, True)] * 3]
    assert scores_of(lm, empty[:1]) == [(0.0, True)]
    assert scores_of(lm, [[" ", " cat"]]) == scores_of(hf, [["", " cat"]])

    # Longer than the window: as a rolling likelihood after the context's last token.
    long = " ".join(WORDS * 2)
    for context, prefix in (("", None), ("name who", lm.tok_encode("who")[0])):
        hf.custom_prefix_token_id = prefix
        rolling = hf.loglikelihood_rolling(instances("loglikelihood_rolling", [[long]]))
        assert [log_p for log_p, _ in scores_of(lm, [[context, f" {long}"]])] == pytest.approx(rolling, rel=1e-5)
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", [[""]])) == [0]


def test_edges_of_the_window_are_answered_as_by_the_decoder(llama_checkpoint, llama_dir, caplog):
    lm = ProtoGenLM(str(llama_checkpoint), mode="verified", batch_size=2, max_length=16)
    hf = HFLM(str(llama_dir), device="cpu", dtype="float32", max_length=16)
    contexts = ["who", "cat dog " * 20]
    for longest in (4, 15):
        assert answers_of(lm, contexts, max_gen_toks=longest) == answers_of(hf, contexts, max_gen_toks=longest)
    assert answers_of(lm, ["", "who"], max_gen_toks=8) == [
        answers_of(hf, [context], max_gen_toks=8)[0] for context in ("<bos>", "who")
    ]
    for longest in (16, 17, 4000):
        assert answers_of(lm, contexts, max_gen_toks=longest) == answers_of(hf, contexts, max_gen_toks=8)
        assert f"answers of {longest} tokens leave their prompts no room in the decoder's window of 16" in caplog.text


def test_edges_of_the_window_in_one_step(build, llama_dir, tmp_path, caplog):
    """With positions that are learned: there is nothing beyond the window."""
    torch.manual_seed(0)
    shutil.copytree(llama_dir, tmp_path / "decoder")
    shape = {"vocab_size": 3 + len(WORDS), "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**shape, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "decoder")
    model, processor = build(tmp_path / "decoder", decoder_sees_prompt=True, latent_source="decoder")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    lm = ProtoGenLM(str(tmp_path / "model"), batch_size=3)
    assert lm.max_length == 32
    words, answers = WORDS * 4, [" cat", " dog sat", " cat" * 8]
    whole = scores_of(lm, [[" ".join(words), answer] for answer in answers])
    for score, answer in zip(whole, answers, strict=True):
        # Beside its tokens an answer takes the head of its chunk and its first token, fed again.
        room = 32 - len(answer.split()) - 2
        (alone,) = scores_of(lm, [[" ".join(words[-room:]), answer]])
        assert score[0] == pytest.approx(alone[0], rel=1e-4)
        (shorter,) = scores_of(lm, [[" ".join(words[-room + 1 :]), answer]])
        assert score[0] != pytest.approx(shorter[0], rel=1e-4)
    long = [["who", " cat" * 9], ["who", ""], ["", " cat"], [" ", " cat"], ["who", " cat" * 100]]
    found = scores_of(lm, long)
    assert [log_p for log_p, _ in found[:2]] == [-math.inf, 0]
    assert found[2] == pytest.approx(found[3])
    assert found[4] == (-math.inf, False)
    assert "2 of 5 answers to score are longer than the 8 tokens that this model writes" in caplog.text
    for longest in (1, 4, 4000):
        written = answers_of(lm, ["", "who", " ".join(words)], max_gen_toks=longest)
        assert all(len(answer.split()) <= longest for answer in written)


def test_each_end_of_sequence_ends_an_answer(build, llama_dir, tmp_path):
    (whole,) = answers_of(HFLM(str(llama_dir), device="cpu", dtype="float32"), ["who"], max_gen_toks=8)
    shutil.copytree(llama_dir, tmp_path / "decoder")
    tokenizer = ProtoGenProcessor.from_encoder_decoder_pretrained(None, str(llama_dir)).tokenizer
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "decoder" / name).read_text())
        content["eos_token_id"] = [2, *tokenizer(whole.split()[2]).input_ids]
        (tmp_path / "decoder" / name).write_text(json.dumps(content))
    hf = HFLM(str(tmp_path / "decoder"), device="cpu", dtype="float32")
    lm = ProtoGenLM(str(save(build, tmp_path / "decoder", tmp_path / "model")), mode="verified")
    expected = answers_of(hf, ["who"], max_gen_toks=8)
    assert expected != [whole]
    assert answers_of(lm, ["who"], max_gen_toks=8) == expected


def test_one_step_scores_are_the_answers_probability(checkpoint):
    lm = ProtoGenLM(str(checkpoint), batch_size=2)
    pairs = [[context, f" {answer}"] for context in CONTEXTS for answer in ("cat", "dog sat")]
    scores = lm.loglikelihood(instances("loglikelihood", pairs))
    model = ProtoGenForConditionalGeneration.from_pretrained(checkpoint)
    processor = ProtoGenProcessor.from_pretrained(checkpoint)
    for (context, answer), (score, is_greedy) in zip(pairs, scores, strict=True):
        prompt = lm.tok_encode(context)
        labels = torch.tensor([lm.tok_encode(answer.strip())])
        inputs = processor.tokenizer(context, return_tensors="pt")
        with torch.no_grad():
            logits = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                decoder_prompt_ids=torch.tensor([prompt]),
                decoder_prompt_mask=torch.ones(1, len(prompt)).long(),
                labels=labels,
                first_tokens=labels[:, 0],
            ).answer_logits
        assert score == pytest.approx(logits.log_softmax(-1)[range(labels.numel()), labels[0]].sum().item(), rel=1e-4)
        assert is_greedy == torch.equal(logits.argmax(-1), labels[0])


def test_one_step_answers_are_generates(checkpoint):
    lm = ProtoGenLM(str(checkpoint), batch_size=3, num_length_sigmas=1.0)
    kwargs = {"until": [], "max_gen_toks": 32}
    requests = instances("generate_until", [[context, kwargs] for context in CONTEXTS])
    answers = lm.generate_until(requests)
    for context, answer, request in zip(CONTEXTS, answers, requests, strict=True):
        inputs = lm.inputs([context], [lm.tok_encode(context)])
        output = lm.protogen.generate(**inputs, num_length_sigmas=1.0, return_dict_in_generate=True)
        text = lm.tok_decode(output.sequences[0])
        assert answer == text
        assert request.args[1]["uncertainty"] == pytest.approx(output.uncertainties.item(), rel=1e-4)


def test_requests_are_cached_by_prompt_template(llama_checkpoint):
    lm = ProtoGenLM(str(llama_checkpoint))
    names = []
    for template in (None, "say {message}", "say: {message}"):
        lm.processor.prompt_template = template
        names.append(lm.tokenizer_name)
    assert len({*names}) == 3


def test_a_model_that_was_trained_on_the_questions_is_not_asked_them(checkpoint):
    lm = ProtoGenLM(str(checkpoint))
    arguments = ("who sat on the mat", {"until": [], "max_gen_toks": 4})
    for share, is_refused in ((None, False), (0.1, False), (0.05, True)):
        lm.protogen.config.validation_share = share
        for task in ("protogen_dolly", "protogen_snips"):
            requests = [Instance("generate_until", {}, arguments, 0, metadata=(task, 0, 1))]
            if is_refused and task == "protogen_dolly":
                with pytest.raises(ValueError, match="this model's training held out 0.05"):
                    lm.generate_until(requests)
            else:
                assert len(lm.generate_until(requests)) == 1


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_each_run_says_how_long_an_example_took(checkpoint, caplog, kind):
    caplog.set_level("INFO", "lm_eval.protogen")
    rest = {"until": [], "max_gen_toks": 4} if kind == "generate_until" else " cat"
    requests = instances(kind, [[context, rest] for context in CONTEXTS])
    for request in requests:
        request.doc_id = 0
    getattr(ProtoGenLM(str(checkpoint)), kind)(requests)
    # A question of several choices is one example.
    assert "1 examples, " in caplog.text
    assert "seconds each" in caplog.text


def test_the_encoder_reads_the_last_parts_that_fit(checkpoint, caplog):
    lm = ProtoGenLM(str(checkpoint))
    tokenizer, window = lm.processor.tokenizer, lm.processor.max_input_length
    parts = ["who sat on the mat", "the cat", *["the sky was red and blue"] * 5]
    read, encoding, dropped = last_blocks(tokenizer, "\n\n".join(parts), window)
    ids = encoding.input_ids
    assert read == "\n\n".join(parts[dropped:])
    assert len(ids) <= window
    assert ids == tokenizer(read).input_ids
    assert len(tokenizer("\n\n".join(parts[dropped - 1 :])).input_ids) > window
    # Of one that does not fit alone, its end.
    _, encoding, dropped = last_blocks(tokenizer, "who " + "cat " * 50 + "sat on", window)
    assert tokenizer.decode(encoding.input_ids).split() == ["[CLS]", *["cat"] * (window - 4), "sat", "on", "[SEP]"]
    assert dropped
    _, encoding, _ = last_blocks(tokenizer, "who [SEP] sat", window)
    assert encoding.input_ids.count(tokenizer.sep_token_id) == 1, "a control token is text"
    lm.generate_until(instances("generate_until", [["cat " * 50, {"until": [], "max_gen_toks": 4}]]))
    assert "1 contexts are longer than the encoder's window of 32 tokens" in caplog.text


def test_in_a_chat_the_encoder_reads_what_is_said(llama_checkpoint):
    lm = ProtoGenLM(str(llama_checkpoint))
    text = lm.apply_chat_template([{"role": "user", "content": "who sat on the mat"}])
    assert text != "who sat on the mat"
    inputs = lm.inputs([text], [lm.tok_encode(text)])
    expected = lm.processor("who sat on the mat")
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert inputs["decoder_prompt_ids"].tolist() == expected["decoder_prompt_ids"].tolist()


@pytest.mark.parametrize("template", [None, "name {message} two\n\n"])
def test_an_encoder_that_is_put_on_the_prompt_answers_as_generate_does(build, decoder_dir, tmp_path, template):
    if template is None and "neox" in str(decoder_dir):
        template = "{message} answer"
    folder = save(build, decoder_dir, tmp_path / "model", upsamples_prompt=True)
    processor = ProtoGenProcessor.from_pretrained(folder)
    assert processor.aligns_encoder
    processor.prompt_template = template
    processor.save_pretrained(folder)
    lm = ProtoGenLM(str(folder), batch_size=2)
    questions = [*INSTRUCTIONS, "name two", " the cat sat on the mat \n\nwho sat on the cat"]
    texts = [lm.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    prompts = [lm.tok_encode(text) for text in texts]
    expected = processor(questions)
    inputs = lm.inputs(texts, prompts)
    assert inputs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(inputs[name], tensor), name
    written = lm.protogen.generate(**expected, return_dict_in_generate=True)
    sequences = [row[:length] for row, length in zip(written.sequences, written.lengths, strict=True)]
    assert answers_of(lm, texts, max_gen_toks=8) == processor.batch_decode(sequences)

    # What is cut has lost its beginning.
    cut = lm.inputs(texts, [prompt[-4:] for prompt in prompts])
    assert torch.equal(cut["encoder_places"], expected["encoder_places"][:, -4:])
    assert all(log_p < 0 for log_p, _ in scores_of(lm, [[text, " cat"] for text in texts]))


def test_an_encoder_is_put_on_plain_contexts_of_any_length(build, llama_dir, tmp_path):
    lm = ProtoGenLM(str(save(build, llama_dir, tmp_path / "model", upsamples_prompt=True)))
    contexts = [*CONTEXTS, "", "  who sat ", "cat dog " * 30, "the dog\n\n" + "cat " * 20 + "\n\n" + "sky blue " * 10]
    prompts = [lm.tok_encode(context) or [lm.prefix_token_id] for context in contexts]
    inputs = lm.inputs(contexts, prompts)
    for row, context in enumerate(contexts):
        mask = inputs["decoder_prompt_mask"][row].bool()
        ids, places = inputs["decoder_prompt_ids"][row][mask], inputs["encoder_places"][row][mask]
        read = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        placed = [
            (lm.tokenizer.decode([id]).strip(), lm.processor.tokenizer.decode(read[place]).strip())
            for id, place in zip(ids, places, strict=True)
            if place
        ]
        assert all(own == other for own, other in placed)
        # All that the encoder reads stands somewhere, in its order, at the context's end.
        assert places[places > 0].tolist() == list(range(1, max(len(read) - 1, 1)))
        assert [own for own, _ in placed] == context.split()[len(context.split()) - len(placed) :]


def test_a_models_own_prompt_takes_the_place_of_the_chat_template(llama_checkpoint):
    processor = ProtoGenProcessor.from_pretrained(llama_checkpoint)
    processor.prompt_template = "name {message} {x}\n\nshort answer"
    processor.save_pretrained(llama_checkpoint)
    lm = ProtoGenLM(str(llama_checkpoint))
    question = {"role": "user", "content": "who sat on {the} mat"}
    text = lm.apply_chat_template([question])
    assert text == "name who sat on {the} mat {x}\n\nshort answer"
    inputs = lm.inputs([text], [lm.tok_encode(text)])
    expected = lm.processor("who sat on {the} mat")
    assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
    assert inputs["decoder_prompt_ids"].tolist() == expected["decoder_prompt_ids"].tolist()
    for others in ([{"role": "system", "content": "be short"}], [question, {"role": "assistant", "content": "a"}]):
        with pytest.raises(ValueError, match="has one user message and the chat has others"):
            lm.apply_chat_template([*others, question])
    with pytest.raises(ValueError, match="has one user message and the chat has others"):
        lm.apply_chat_template([{"role": "system", "content": "be short"}])


@pytest.mark.parametrize("mode", ["one_step", "adaptive"])
def test_answers_that_are_lines_inside_are_json_outside(llama_checkpoint, mode):
    lm = ProtoGenLM(str(llama_checkpoint), mode=mode)
    requests = [[context, {"until": [], "max_gen_toks": 6}] for context in CONTEXTS]
    texts = lm.generate_until(instances("generate_until", requests))

    class LineTokenizer:
        def decode(self, ids, **kwargs):
            return f"intent: GetWeather\ncity: {lm.tokenizer.decode(ids, **kwargs)}"

        def batch_decode(self, rows, **kwargs):
            return [self.decode(row, **kwargs) for row in rows]

    lm.processor.answer_format = "key_value_lines"
    lm.processor.decoder_tokenizer = LineTokenizer()
    answers = lm.generate_until(instances("generate_until", requests))
    assert list(map(json.loads, answers)) == [{"intent": "GetWeather", "city": text} for text in texts]
    assert any(texts)


def test_unknown_modes_are_named(llama_checkpoint):
    with pytest.raises(ValueError, match="mode=fast is not one of one_step"):
        ProtoGenLM(str(llama_checkpoint), mode="fast")
    with pytest.raises(ValueError, match="scoring=own is not one of one_step, verified"):
        ProtoGenLM(str(llama_checkpoint), scoring="own")
    # All that there is, not the mode's own alone.
    with pytest.raises(ValueError, match="num_beams is not for mode=one_step.* decoder, device, .* dtype, .* scoring"):
        ProtoGenLM(str(llama_checkpoint), num_beams=4)
    with pytest.raises(ValueError, match="do_sample=True is needed with temperature, by which"):
        ProtoGenLM(str(llama_checkpoint), temperature=0.5)
    for batch_size in ("8:2", 0, "auto:", "all"):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} is neither a number from 1 on, nor auto"):
            ProtoGenLM(str(llama_checkpoint), batch_size=batch_size)


def test_models_are_loaded_as_they_are_asked_for(llama_checkpoint, monkeypatch):
    asked = []
    for loaded in (ProtoGenForConditionalGeneration, ProtoGenProcessor):
        load = loaded.from_pretrained
        record = lambda *args, load=load, **kwargs: (asked.append(kwargs), load(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(loaded, "from_pretrained", record)
    hub = {"revision": "main", "trust_remote_code": True}
    lm = ProtoGenLM(
        str(llama_checkpoint), device_map="cpu", attn_implementation="eager", max_new_tokens=2, mode="verified", **hub
    )
    assert all(kwargs.items() >= hub.items() for kwargs in asked)
    assert len(asked) == 2
    assert lm.protogen.encoder.config._attn_implementation == "eager"
    assert [len(answer.split()) for answer in answers_of(lm, CONTEXTS[:2], max_gen_toks=8)] == [2, 2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"repetition_penalty": 1.5, "num_beams": 2}, "num_beams, repetition_penalty is not for mode=verified"),
        ({"do_sample": True}, "do_sample=True needs a temperature above 0"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True needs a temperature above 0"),
        ({"max_gen_toks": 0}, "max_new_tokens must be at least 1; got 0"),
    ],
)
def test_what_a_task_asks_in_vain_is_said_before_anything_is_answered(llama_checkpoint, monkeypatch, kwargs, message):
    lm = ProtoGenLM(str(llama_checkpoint), mode="verified")
    requests = [["who", {"until": [], "max_gen_toks": 4}], ["who", {"until": [], "max_gen_toks": 4} | kwargs]]
    monkeypatch.setattr(lm, "write", None)
    with pytest.raises(ValueError, match=message):
        lm.generate_until(instances("generate_until", requests))


def test_what_a_task_asks(llama_checkpoint):
    lm = ProtoGenLM(str(llama_checkpoint), mode="verified")
    (greedy,) = answers_of(lm, ["who"], max_gen_toks=8)
    plain = {"do_sample": False, "temperature": 0.0, "top_p": 0.5, "num_beams": 1, "block_size": 2}
    assert answers_of(lm, ["who"], max_gen_toks=8, **plain) == [greedy]
    torch.manual_seed(0)
    assert answers_of(lm, ["who"], max_gen_toks=8, do_sample=True, temperature=5.0) != [greedy]


@pytest.fixture
def task(tmp_path):
    """A generative task over three questions, in a folder of tasks."""
    rows = [{"question": text, "answer": "a cat"} for text in INSTRUCTIONS]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks" / "tiny.yaml").write_text(
        f"""
        task: tiny
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path / "tasks" / "rows.jsonl"}}}}}
        test_split: test
        output_type: generate_until
        doc_to_text: "{{{{question}}}}"
        doc_to_target: "{{{{answer}}}}"
        generation_kwargs: {{until: ["sky"], max_gen_toks: 6, do_sample: false}}
        metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
        """
    )
    return tmp_path / "tasks"


def harness(*arguments):
    """`python -m eval_tasks ARGUMENTS`, of tasks in `--include_path` alone: the harness's own take long to list."""
    defaults = inspect.signature(TaskManager.__init__).parameters.values()
    defaults = tuple(False if each.name == "include_defaults" else each.default for each in defaults)[1:]
    with (
        mock.patch.object(TaskManager.__init__, "__defaults__", defaults),
        mock.patch.object(sys, "argv", ["lm_eval", *map(str, arguments)]),
    ):
        runpy.run_module("eval_tasks", run_name="__main__")


def test_the_command_of_the_harness(llama_checkpoint, task, tmp_path, capsys):
    """By name, as the entry point has it; each sample is logged with its uncertainty."""
    command = ["run", "--model", "protogen", "--tasks", "tiny", "--limit", 2]
    command += ["--model_args", f"pretrained={llama_checkpoint},mode=adaptive,confidence_threshold=0.5,block_size=4"]
    command += ["--include_path", task, "--output_path", tmp_path / "out", "--log_samples", "--batch_size", "auto"]
    harness(*command)
    assert "|tiny" in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("samples_tiny_*.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == 2
    for sample in samples:
        assert 0 < sample["arguments"]["gen_args_0"]["arg_1"]["uncertainty"] < 1


def test_the_hook_tells_the_harness_of_the_model(monkeypatch):
    finder = lm_eval_hook.ModelsFinder()
    assert finder.find_spec("lm_eval") is None
    monkeypatch.setattr(registry.model_registry, "_objs", {})
    spec = finder.find_spec("lm_eval.models", lm_eval.__path__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert registry.get_model("protogen") is ProtoGenLM


@pytest.mark.parametrize("is_there", [True, False])
def test_at_a_start_of_python_the_hook_is_all_that_is_imported(tmp_path, is_there):
    source = Path(lm_eval_hook.__file__)
    shutil.copy(source.with_name("protogen_lm_eval.pth"), tmp_path)
    if is_there:
        shutil.copy(source, tmp_path / "protogen_lm_eval_hook.py")
    code = f"import site, sys; before = {{*sys.modules}}; site.addsitedir({str(tmp_path)!r}); "
    code += "print(*{*sys.modules} - before, *sys.meta_path)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    names, finder = done.stdout.split()[:2]
    assert names == "protogen_lm_eval_hook" if is_there else "protogen" not in done.stdout
    assert ("ModelsFinder" in finder) == is_there


def test_one_and_two_processes_answer_alike(llama_checkpoint, task, tmp_path):
    run = ["run", "--model", "protogen", "--tasks", "tiny", "--include_path", task, "--log_samples"]
    run += ["--model_args", f"pretrained={llama_checkpoint},mode=verified", "--output_path"]
    harness(*run, tmp_path / "one")
    in_two_processes(harness, *run, tmp_path / "two")
    answers = []
    for name in ("one", "two"):
        (path,) = (tmp_path / name).rglob("samples_tiny_*.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        # The harness has a process with fewer samples answer one of them again.
        answers.append({row["doc_id"]: set(row["resps"][0]) for row in rows})
    assert answers[0] == answers[1]
    assert len(answers[0]) == 3
