"""Capacity, and the paper's way to fit a text."""

import math

import pandas as pd
import pytest
import torch
from test_scripts import call, recipe  # noqa: F401  (fixtures)

from eval_tasks.baselines.one_text_fit import fit_one_text
from eval_tasks.report import read_result
from eval_tasks.studies import capacity
from eval_tasks.studies.capacity import LENGTHS, capacity_metrics, fixed_m
from eval_tasks.text_metrics import information_bits
from trainers.decoders import load_decoder
from trainers.fitting import FittingArguments, ProtoTokenFitter
from trainers.proto_bank import BankEntry, BankInfo, ProtoTokenBank


def test_lengths_are_powers_of_the_square_root_of_two():
    assert tuple(int(2 ** (half / 2)) for half in range(4, 21)) == LENGTHS


def test_information_is_the_sum_of_the_tokens_surprisals(decoder):
    text = [5, 9, 4]
    expected = 0.0
    for place, token in enumerate(text):
        logits = decoder(torch.tensor([[1, *text[:place]]])).logits[0, -1]
        expected -= math.log2(logits.softmax(-1)[token].item())
    assert information_bits(decoder, text) == pytest.approx(expected, rel=1e-4)
    decoder.config.bos_token_id = None
    assert information_bits(decoder, text) < expected


def row(length, accuracy, **setting):
    setting = {"source": "natural", "arrangement": "e_mN", "m_scope": "per_example", "sink": "bos"} | setting
    return {"length": length, "accuracy": accuracy, "bits": 10.0 * length, "id": "a", "category": ""} | setting


def test_capacity_is_the_longest_length_that_holds():
    rows = []
    for length, accuracies in {4: (1.0, 1.0), 5: (1.0, 0.96), 8: (1.0, 0.99), 11: (0.5, 0.7)}.items():
        rows += [row(length, accuracy) for accuracy in accuracies]
    rows += [row(4, 0.9, source="random_words", m_scope="shared")] * 2
    metrics = capacity_metrics(rows, 0.99)
    assert metrics["natural_own_m_C_tokens"] == 8
    assert metrics["natural_own_m_H_LM_bits"] == [80.0, 80.0, 80.0]
    assert metrics["natural_own_m_11_tokens_accuracy"] == pytest.approx([0.6, 0.5, 0.7])
    assert metrics["natural_own_m_5_tokens_exact_match"] == [0.5, 0.0, 1.0]
    assert metrics["random_words_shared_m_C_tokens"] == 0
    assert metrics["random_words_shared_m_H_LM_bits"] == 0.0


def test_categories_have_figures_where_there_are_some():
    rows = [row(n, 0.5 + n / 100, id=f"{c}{n}", category=c) for c in ("open", "closed") for n in (10, 20)]
    metrics = capacity_metrics(rows, 0.99)
    assert metrics["all_open_accuracy"][0] == pytest.approx(0.65)
    assert not [
        name for name in capacity_metrics([row(4, 1.0)] * 2, 0.99) if name.endswith("_accuracy") and "4" not in name
    ]


def test_an_m_that_is_not_trained(decoder):
    table = decoder.get_input_embeddings().weight
    assert fixed_m("fixed_zero", decoder, 0).abs().sum() == 0
    torch.testing.assert_close(fixed_m("fixed_mean", decoder, 0), table.mean(0, keepdim=True))
    assert fixed_m("fixed_random", decoder, 0).std() == pytest.approx(table.std().item(), rel=0.5)
    assert not fixed_m("fixed_random", decoder, 0).equal(fixed_m("fixed_random", decoder, 1))


def test_the_papers_loop_ends_when_the_text_is_perfect(decoder):
    fit = fit_one_text(decoder, [5, 9, 4], sink_id=1, max_steps=2000)
    assert fit.accuracy == 1
    assert 0 < fit.steps < 2000
    info = BankInfo("", None, "", "e_mN", 4, 1, "per_example", "bos", 24)
    fitter = ProtoTokenFitter(decoder, info, FittingArguments())
    assert fitter.measure(BankEntry("a", [5, 9, 4], fit.e.view(1, 1, -1), fit.m.view(1, -1), 1.0, fit.steps)) == 1
    spent = fit_one_text(decoder, [5, 9, 4, 8, 7, 20], sink_id=None, max_steps=2)
    assert spent.steps == 2
    assert spent.accuracy < 1


def test_the_capacity_study(call, recipe, tmp_path, monkeypatch):  # noqa: F811
    arguments = ["--config", recipe, "--study", "capacity", "--capacity_texts", 2, "--capacity_lengths", 5, 4]
    arguments += ["--fit_max_steps", 3, "--fit_shared_m_steps", 3, "--capacity_sources", "random_words"]
    arguments += ["--capacity_m_scopes", "per_example", "shared", "fixed_mean"]
    fit_bank, cells = capacity.fit_bank, []

    def interrupted(fitter, bank, *rest):
        cells.append(bank.folder.name)
        if len(cells) == 4:
            raise KeyboardInterrupt
        return fit_bank(fitter, bank, *rest)

    monkeypatch.setattr(capacity, "fit_bank", interrupted)
    assert call("study", *arguments).startswith("interrupted")
    assert "written to" in call("study", *arguments)
    assert cells[:3] == cells[4:7], "the cells in the same order; those that are done fit nothing"
    folder = tmp_path / "run"
    metrics = read_result(folder / "study.json")["metrics"]
    assert {"own_m_sink_C_tokens", "shared_m_no_sink_H_LM_bits", "mean_embedding_m_sink_C_tokens"} <= set(metrics)
    rows = pd.read_csv(folder / "study.csv", keep_default_na=False)
    assert len(rows[["m_scope", "sink"]].drop_duplicates()) == 6
    for (m_scope, sink, length), part in rows.groupby(["m_scope", "sink", "length"]):
        banks = list((folder / "banks").glob(f"*/random_words-e_mN-{m_scope}-{sink}-{length}"))
        bank = ProtoTokenBank(banks[0])
        assert [bank.row(id)["accuracy"] for id in part["id"]] == pytest.approx(part["accuracy"].tolist())
        if m_scope == "fixed_mean":
            entries = [bank[id] for id in bank.ids]
            assert all(entry.m.equal(bank.shared_m()[""]) for entry in entries)
    assert (folder / "capacity.png").stat().st_size > 10_000


def test_capacity_compares_decoders(call, recipe, tmp_path, llama_dir):  # noqa: F811
    names = [llama_dir, f"{llama_dir}@first:1", f"{llama_dir}@untrained", f"{llama_dir}@untrained-gpt_neox:16x1"]
    arguments = ["--config", recipe, "--study", "capacity", "--capacity_texts", 2, "--capacity_lengths", 3]
    arguments += ["--fit_max_steps", 3, "--capacity_sources", "random_words", "--capacity_m_scopes", "per_example"]
    assert "written to" in call("study", *arguments, "--capacity_sinks", "bos", "--decoders", *names)
    rows = pd.read_csv(tmp_path / "run" / "study.csv")
    assert rows["decoder"].unique().tolist() == [str(name) for name in names]


def test_variants_of_a_decoder(llama_dir):
    whole = load_decoder(str(llama_dir), None, "float32", "cpu")[1]
    first = load_decoder(f"{llama_dir}@first:1", None, "float32", "cpu")[1]
    assert len(first.model.layers) == 1
    for name, weight in first.state_dict().items():
        assert weight.equal(whole.state_dict()[name])
    untrained = [load_decoder(f"{llama_dir}@untrained", None, "float32", "cpu")[1] for _ in range(2)]
    assert untrained[0].lm_head.weight.equal(untrained[1].lm_head.weight)
    assert not untrained[0].lm_head.weight.equal(whole.lm_head.weight)
    with pytest.raises(ValueError, match="has 2 layers; first:3 cannot"):
        load_decoder(f"{llama_dir}@first:3", None, "float32", "cpu")
    with pytest.raises(ValueError, match="unknown variant 'half'"):
        load_decoder(f"{llama_dir}@half", None, "float32", "cpu")
