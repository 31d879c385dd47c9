"""Fitting tiny decoders: it converges, keeps what it measured, and leaves the decoder as it was."""

import pytest
import torch
from conftest import weights_hash
from transformers import AutoModelForCausalLM

from trainers.fitting import FittingArguments, ProtoTokenFitter
from trainers.proto_bank import BankInfo, ProtoTokenBank, decoder_fingerprint

TEXTS = [("a", [5, 9, 4]), ("b", [7, 7, 3, 12, 2]), ("c", [20]), ("d", [11, 6, 30, 8])]


def info_for(decoder, **fields):
    fields = {
        "arrangement": "e_mN",
        "chunk_size": 4,
        "num_e_tokens": 1,
        "m_scope": "per_example",
        "sink": "bos",
    } | fields
    return BankInfo("tiny", None, decoder_fingerprint(decoder), dim=decoder.config.hidden_size, **fields)


def fitter_for(decoder, fit_max_steps=60, fit_attempts=3, fit_learning_rate=0.1, **fields):
    arguments = FittingArguments(
        fit_max_steps=fit_max_steps, fit_attempts=fit_attempts, fit_learning_rate=fit_learning_rate
    )
    return ProtoTokenFitter(decoder, info_for(decoder, **fields), arguments)


@pytest.mark.parametrize(
    "fields",
    [{}, {"arrangement": "e_m"}, {"arrangement": "e_m", "num_e_tokens": 2, "sink": "none"}],
    ids=str,
)
def test_fits_short_texts_and_keeps_the_vectors_that_were_measured(decoder_dir, fields):
    decoder = AutoModelForCausalLM.from_pretrained(decoder_dir)
    before = weights_hash(decoder)
    fitter = fitter_for(decoder, **fields)
    entries = fitter.fit(TEXTS)
    assert weights_hash(decoder) == before
    assert [entry.id for entry in entries] == ["a", "b", "c", "d"]
    assert [entry.token_ids for entry in entries] == [tokens for _, tokens in TEXTS]
    assert [len(entry.m) for entry in entries] == [1, 2, 1, 1]
    assert sum(entry.accuracy for entry in entries) / 4 > 0.8
    # One at a time, without the rest of the batch or its padding.
    assert [fitter.measure([entry])[0] for entry in entries] == pytest.approx([entry.accuracy for entry in entries])


def test_fitting_learns(decoder):
    start = fitter_for(decoder, fit_max_steps=1, fit_attempts=1).fit(TEXTS)
    end = fitter_for(decoder, fit_max_steps=60, fit_attempts=1).fit(TEXTS)
    assert sum(entry.accuracy for entry in start) < sum(entry.accuracy for entry in end)


def test_the_best_vectors_are_those_before_the_step(decoder, monkeypatch):
    """With a learning rate that ruins everything the first measurement stays the best, and its vectors are kept."""
    fitter = fitter_for(decoder, fit_max_steps=3, fit_attempts=1, fit_learning_rate=0.0)
    still = fitter.fit(TEXTS)
    ruined = fitter_for(decoder, fit_max_steps=3, fit_attempts=1, fit_learning_rate=1e4)
    measured = []
    entries = ruined.fit(TEXTS, on_step=lambda step, perfect, accuracy: measured.append(accuracy))
    for entry, unmoved in zip(entries, still, strict=True):
        assert entry.accuracy >= unmoved.accuracy
        if entry.steps == 0:
            assert torch.equal(entry.e, unmoved.e)
    assert ruined.measure(entries) == pytest.approx([entry.accuracy for entry in entries])
    assert measured == sorted(measured)


def test_texts_do_not_influence_each_other(decoder):
    """A text fitted beside others ends where it ends alone, from the same start."""
    together = fitter_for(decoder, fit_max_steps=15, fit_attempts=1)
    alone = fitter_for(decoder, fit_max_steps=15, fit_attempts=1)
    expected = alone.fit(TEXTS[:1])[0]
    entry = together.fit(TEXTS)[0]
    assert (entry.accuracy, entry.steps) == (expected.accuracy, expected.steps)
    torch.testing.assert_close(entry.e, expected.e, rtol=1e-3, atol=1e-4)


def test_perfect_texts_leave_and_only_the_others_start_afresh(decoder, monkeypatch):
    fitter = fitter_for(decoder, fit_max_steps=30, fit_attempts=2)
    sizes = []
    loss = fitter._loss
    monkeypatch.setattr(fitter, "_loss", lambda texts: sizes.append(len(texts)) or loss(texts))
    entries = fitter.fit(TEXTS)
    assert sizes[0] == 4
    assert sizes[:30] == sorted(sizes[:30], reverse=True)
    assert min(sizes) < 4
    assert len(sizes) == 60 or all(entry.accuracy == 1 for entry in entries)


def test_shared_m_is_one_vector(decoder):
    fitter = fitter_for(decoder, fit_max_steps=150, m_scope="shared")
    entries = fitter.fit(TEXTS)
    assert torch.unique(torch.cat([entry.m for entry in entries]), dim=0).shape[0] == 1
    assert sum(entry.accuracy for entry in entries) / 4 > 0.5
    assert fitter.measure(entries) == pytest.approx([entry.accuracy for entry in entries])


def test_fitted_vectors_fit_the_bank(decoder, tmp_path):
    fitter = fitter_for(decoder, fit_max_steps=5, fit_attempts=1)
    entries = fitter.fit(TEXTS)
    ProtoTokenBank(tmp_path, fitter.info).append(entries)
    stored = [ProtoTokenBank(tmp_path)[entry.id] for entry in entries]
    assert fitter.measure(stored) == pytest.approx([entry.accuracy for entry in entries])


def test_impossible_requests_are_refused(decoder):
    with pytest.raises(ValueError, match="per_example and shared, not 'per_category'"):
        fitter_for(decoder, m_scope="per_category")
    decoder.config.bos_token_id = None
    with pytest.raises(ValueError, match="sink=bos needs a decoder with a bos_token_id"):
        fitter_for(decoder)
