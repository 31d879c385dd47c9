"""Capacity, and the paper's way to fit a text."""

import csv
import math

import pytest
import torch
import train
from test_scripts import call, recipe  # noqa: F401  (fixtures)
from transformers import AutoTokenizer

from eval_tasks.baselines.one_text_fit import fit_one_text
from eval_tasks.report import read_result
from trainers import capacity
from trainers.capacity import LENGTHS, capacity_figures, capacity_texts, information_bits
from trainers.fitting import FittingArguments, ProtoTokenFitter
from trainers.proto_bank import BankEntry, BankInfo, ProtoTokenBank

ANSWERS = ["the cat sat on the mat", "blue", "cat dog and bird ran under the tree", "who sat"]


def test_lengths_are_powers_of_the_square_root_of_two():
    assert tuple(int(2 ** (half / 2)) for half in range(4, 21)) == LENGTHS


def test_texts_are_beginnings_of_answers_or_random_words(llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    prose = capacity_texts(tokenizer, "prose", ANSWERS, 2, 5, seed=0)
    assert tokenizer.batch_decode(prose) == ["the cat sat on the", "cat dog and bird ran"]
    words = capacity_texts(tokenizer, "random_words", ANSWERS, 6, 9, seed=0)
    assert [len(text) for text in words] == [9] * 6
    assert len({tuple(text) for text in words}) == 6
    assert set(tokenizer.decode([t for text in words for t in text]).split()) <= set(" ".join(ANSWERS).split())
    assert words == capacity_texts(tokenizer, "random_words", ANSWERS, 6, 9, seed=0)
    with pytest.raises(ValueError, match="only 2 of the texts have 5 tokens, 3 are needed"):
        capacity_texts(tokenizer, "prose", ANSWERS, 3, 5, seed=0)
    with pytest.raises(ValueError, match="unknown source of texts 'verse'"):
        capacity_texts(tokenizer, "verse", ANSWERS, 3, 5, seed=0)


def test_information_is_the_sum_of_the_tokens_surprisals(decoder):
    text = [5, 9, 4]
    expected = 0.0
    for place, token in enumerate(text):
        logits = decoder(torch.tensor([[1, *text[:place]]])).logits[0, -1]
        expected -= math.log2(logits.softmax(-1)[token].item())
    assert information_bits(decoder, text) == pytest.approx(expected, rel=1e-4)
    decoder.config.bos_token_id = None
    assert information_bits(decoder, text) < expected


def test_capacity_is_the_longest_length_that_holds():
    cell = {"source": "prose", "m_scope": "per_example", "sink": "bos"}
    accuracies = {4: 1.0, 5: 0.98, 8: 0.99, 11: 0.5}
    rows = [cell | {"length": n, "accuracy": accuracy, "bits": 10.0 * n} for n, accuracy in accuracies.items()]
    rows.append(cell | {"source": "random_words", "m_scope": "shared", "length": 4, "accuracy": 0.9, "bits": 40.0})
    assert capacity_figures(rows, 0.99) == {
        "prose_own_m_bos_C_tokens": 8,
        "prose_own_m_bos_H_LM_bits": 80.0,
        "random_words_shared_m_bos_C_tokens": 0,
        "random_words_shared_m_bos_H_LM_bits": 0.0,
    }


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


def test_the_capacity_stage(call, recipe, tmp_path, monkeypatch):  # noqa: F811
    arguments = ["--config", recipe, "--stage", "capacity", "--capacity_texts", 2, "--capacity_max_length", 5]
    arguments += ["--fit_max_steps", 3, "--fit_settle_steps", 3, "--capacity_sources", "random_words"]
    fit_bank, cells = capacity.fit_bank, []

    def interrupted(fitter, bank, *rest):
        cells.append(bank.folder.name)
        if len(cells) == 4:
            raise KeyboardInterrupt
        return fit_bank(fitter, bank, *rest)

    monkeypatch.setattr(capacity, "fit_bank", interrupted)
    assert call(train, *arguments).startswith("interrupted")
    assert "written to" in call(train, *arguments)
    assert cells[:3] == cells[4:7], "the cells in the same order; those that are done fit nothing"
    folder = tmp_path / "run"
    figures = read_result(folder / "capacity.json")["figures"]
    assert {"random_words_own_m_bos_C_tokens", "random_words_shared_m_none_H_LM_bits"} <= set(figures)
    rows = list(csv.DictReader((folder / "capacity.csv").open()))
    assert {(row["m_scope"], row["sink"]) for row in rows} == {
        (m, sink) for m in ("per_example", "shared") for sink in ("bos", "none")
    }
    for row in rows:
        bank = ProtoTokenBank(folder / "banks" / f"random_words-{row['m_scope']}-{row['sink']}-{row['length']}")
        assert sum(bank.row(id)["accuracy"] for id in bank.ids) / 2 == pytest.approx(float(row["accuracy"]))
    assert (folder / "capacity.png").stat().st_size > 10_000
