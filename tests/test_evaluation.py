"""Methods on tasks, from the command line to the page."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import WORDS, save_encoder
from lm_eval.api.instance import Instance
from test_scripts import call  # noqa: F401
from transformers import AutoTokenizer, BertForMaskedLM

from eval_tasks.baselines.masked_diffusion import masked_diffusion
from eval_tasks.evaluation import WriterLM, quality_metrics, sample_of, shaded, uncertainty_metrics
from eval_tasks.report import read_result
from eval_tasks.retention import f1_retention


@pytest.fixture
def recipe(build, llama_dir, encoder_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [
        {"instruction": f"{a} {b}", "context": "", "response": a, "category": "c"} for a in WORDS for b in WORDS[:4]
    ]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = str(tmp_path / "model")
    content = {
        "output_dir": str(tmp_path / "runs" / "tiny"),
        "data_dir": str(tmp_path),
        "tasks": ["protogen_dolly"],
        "baseline": "greedy",
        "open_tasks": ["protogen_dolly"],
        "sentence_encoder": str(encoder_dir),
        "fluency_decoder": str(llama_dir),
        "limit": 6,
        "main_metrics": ["acc", "token_f1"],
        "acceptable_error": 1.0,
        "methods": {
            "one_step": {"kind": "protogen", "pretrained": model, "dtype": "float32"},
            "verified": {"kind": "protogen", "pretrained": model, "mode": "verified", "dtype": "float32"},
            "greedy": {"kind": "hf", "pretrained": str(llama_dir), "dtype": "float32"},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_methods_are_compared_question_by_question(call, recipe, tmp_path, monkeypatch):  # noqa: F811
    out = call("evaluate", "--config", recipe)
    assert "one step protogen dolly rouge l" in out
    folder = tmp_path / "runs" / "tiny"
    metrics = read_result(folder / "evaluation.json")["metrics"]
    for metric in ("rouge_l", "bleu", "chrf", "token_f1", "degenerate"):
        assert metrics[f"verified_minus_greedy_protogen_dolly_{metric}"] == [0, 0, 0]
    assert -1 <= metrics["greedy_protogen_dolly_embedding_similarity"][0] <= 1
    assert metrics["greedy_protogen_dolly_bits_a_token"][0] > 0
    assert 0 < metrics["f1_auc_one_step_protogen_dolly"] < 1
    assert 0 <= metrics["calibration_error_one_step_protogen_dolly"] <= 1
    cells = {path.stem: json.loads(path.read_text()) for path in (folder / "cells").iterdir()}
    assert set(cells) == {f"{method}--protogen_dolly" for method in ("one_step", "verified", "greedy")}
    answers = [
        [sample["answer"] for sample in cells[f"{m}--protogen_dolly"]["samples"]] for m in ("verified", "greedy")
    ]
    assert answers[0] == answers[1]
    assert "background: rgba" in (folder / "examples.html").read_text()
    for picture in ("speed", "retention", "coverage", "calibration"):
        assert (folder / f"protogen_dolly_{picture}.png").is_file()
    assert len((folder / "evaluation.csv").read_text().splitlines()) == 1 + 3 * 6 * 7

    # Nothing is answered again, and nothing of another kind is mixed in.
    monkeypatch.setattr("eval_tasks.commands.evaluate.load_method", None)
    assert "one step protogen dolly rouge l" in call("evaluate", "--config", recipe)
    assert "remove it or use another output_dir" in call("evaluate", "--config", recipe, "--limit", 2)

    call("report", "--readmes", "--results", tmp_path, "--runs", tmp_path / "none", "--evaluations", tmp_path / "runs")
    page = (tmp_path / "runs" / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert "https://" not in page


def test_uncertainty_is_measured_of_each_task_and_of_as_many_answers_of_all():
    rng = np.random.default_rng(0)
    rated = pd.DataFrame({"method": "sure", "task": ["known"] * 20 + ["new"] * 200, "value": [1.0] * 20 + [0.0] * 200})
    rated["uncertainty"] = 1 - rated["value"] + rng.uniform(-0.1, 0.1, 220)
    unsure = rated.assign(method="unsure", uncertainty=np.nan)
    with pytest.warns(UserWarning, match="not defined"):
        metrics = uncertainty_metrics(pd.concat([rated, unsure]), 0.7)
    assert not any("unsure" in name for name in metrics)
    assert metrics["f1_auc_sure_all_tasks"] == metrics["f1_auc_optimal_sure_all_tasks"]
    halves = f1_retention(np.repeat([0.0, 1.0], 20), np.repeat([0.0, 1.0], 20), 0.7)
    assert metrics["f1_auc_sure_all_tasks"] == pytest.approx(halves.area)
    assert metrics["auroc_wrong_sure_all_tasks"] == 1
    assert np.isnan(metrics["f1_auc_sure_new"])
    assert metrics["calibration_error_sure_known"] < 0.1
    alone = uncertainty_metrics(rated[:20], 0.7)
    assert {name.removesuffix("_sure_known") for name in alone} > {"f1_auc", "f1_at_95", "spearman_quality"}
    assert not any("all_tasks" in name for name in alone)


def test_parity_is_gathered(call, recipe, tmp_path):  # noqa: F811
    content = yaml.safe_load(recipe.read_text())
    methods = content["methods"]
    methods = {"hf": methods["greedy"], "protogen": methods["verified"], "one_step": methods["one_step"]}
    content |= {"methods": methods, "baseline": "hf"}
    recipe.write_text(yaml.safe_dump(content))
    call("evaluate", "--config", recipe, "--gen_kwargs", "max_gen_toks=7")
    call("bench", "parity", "--run", tmp_path / "runs" / "tiny", "--result", tmp_path / "parity.json")
    metrics = read_result(tmp_path / "parity.json")["metrics"]
    assert (metrics["answers_compared"], metrics["answers_different"], metrics["dolly_difference"]) == (6, 0, 0)
    assert metrics["dolly_accuracy_hf"] != metrics["dolly_accuracy_one_step"]
    path = tmp_path / "runs" / "tiny" / "cells" / "protogen--protogen_dolly.json"
    cell = json.loads(path.read_text())
    assert max(len(sample["token_confidences"]) for sample in cell["samples"]) == 7
    cell["samples"][1]["answer"] += " more"
    path.write_text(json.dumps(cell))
    call("bench", "parity", "--run", tmp_path / "runs" / "tiny", "--result", tmp_path / "parity.json")
    assert read_result(tmp_path / "parity.json")["metrics"]["answers_different"] == 1


def test_bad_recipes_are_named(call, recipe):  # noqa: F811
    assert "baseline=none is not one of the methods" in call("evaluate", "--config", recipe, "--baseline", "none")
    methods = '--methods={"greedy": {"kind": "gpt", "pretrained": "x"}}'
    assert "kind=gpt is not one of protogen, hf" in call("evaluate", "--config", recipe, methods)


def test_differences_are_paired():
    values = {"a": [0.1, 0.5, 0.9], "b": [0.2, 0.6, 1.0]}
    rows = [
        {"method": method, "task": "t", "doc": str(doc), "metric": "m", "value": value}
        for method, column in values.items()
        for doc, value in enumerate(column)
    ]
    metrics = quality_metrics(pd.DataFrame(rows), "a")
    assert metrics["b_t_m"][0] == pytest.approx(0.6)
    # Each question by 0.1: the interval has no width, whatever the questions' own spread.
    assert metrics["b_minus_a_t_m"] == pytest.approx([0.1, 0.1, 0.1])


def test_other_ways_to_write_are_models_of_the_harness(tmp_path):
    folder = save_encoder(tmp_path, BertForMaskedLM, max_position_embeddings=64)
    model, tokenizer = BertForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    write = masked_diffusion(model, tokenizer, mask_token_id=3, block_size=4)
    prompts = ["who sat on the mat", "the sky", "name three animals"]
    kwargs = {"until": ["dog"], "max_gen_toks": 4}
    requests = [Instance("generate_until", {}, (prompt, kwargs), n) for n, prompt in enumerate(prompts)]
    lm = WriterLM(write, batch_size=2)
    texts = write(prompts[:2], [None, None], 4).texts + write(prompts[2:], [None], 4).texts
    assert lm.generate_until(requests) == [text.split("dog")[0] for text in texts]
    with pytest.raises(ValueError, match="cannot score"):
        lm.loglikelihood(requests)


def test_the_answer_to_a_choice_is_the_most_likely_one():
    logged = {
        "arguments": [("who", " a"), ("who", " b")],
        "resps": [[(-2.0, False)], [(-1.0, True)]],
        "filtered_resps": [(-2.0, False), (-1.0, True)],
        "doc_id": 4,
        "doc": {"subject": "law"},
        "filter": "none",
        "target": 0,
        "metrics": ["acc"],
        "acc": 0.0,
    }
    sample = sample_of("mmlu", logged)
    assert (sample["answer"], sample["target"], sample["prompt"]) == ("1", "0", "who")
    assert sample["metrics"] == {"acc": 0}
    assert sample["category"] == "law"


def test_unsure_tokens_are_shaded():
    html = shaded({"answer": "a<b", "token_confidences": [["a<", 1.0], ["b", 0.5]]})
    assert html == (
        '<span style="background: rgba(255, 60, 60, 0.00)" title="1.00">a&lt;</span>'
        '<span style="background: rgba(255, 60, 60, 0.30)" title="0.50">b</span>'
    )
    assert shaded({"answer": "a<b"}) == "a&lt;b"
