"""Fitting tiny decoders: it converges, keeps what it measured, and leaves the decoder as it was."""

import hashlib
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import weights_hash
from transformers import AutoModelForCausalLM

from modeling_protogen.frozen_decoder import answer_logits, decoder_fingerprint, sink_ids
from modeling_protogen.proto_tokens import build_layout, fill_slots
from trainers import fitting
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text, TextFit, passes
from trainers.proto_bank import BankInfo, ProtoTokenBank

TEXTS = [Text("a", [5, 9, 4]), Text("b", [7, 7, 3, 12, 2]), Text("c", [20]), Text("d", [11, 6, 30, 8])]


def info_for(decoder, **fields):
    fields = {
        "arrangement": "e_mN",
        "chunk_size": 4,
        "num_e_tokens": 1,
        "m_scope": "per_example",
        "sink": "bos",
    } | fields
    return BankInfo("tiny", None, decoder_fingerprint(decoder), dim=decoder.config.hidden_size, **fields)


def fitter_for(decoder, info=None, **arguments):
    arguments = {"fit_max_steps": 60, "fit_attempts": 3} | arguments
    return ProtoTokenFitter(decoder, info_for(decoder, **info or {}), FittingArguments(**arguments))


def fit(fitter, texts=TEXTS, m=None):
    """Entries by id."""
    return {entry.id: entry for entries in fitter.fit(texts, m) for entry in entries}


def mean_accuracy(entries):
    return sum(entry.accuracy for entry in entries.values()) / len(entries)


def random_texts(count, longest, seed=0):
    rng = random.Random(seed)
    return [Text(f"t{i}", [rng.randrange(3, 40) for _ in range(rng.randint(1, longest))]) for i in range(count)]


@pytest.mark.parametrize(
    "fields",
    [{}, {"arrangement": "e_m"}, {"arrangement": "e_m", "num_e_tokens": 2, "sink": "none"}],
    ids=str,
)
def test_fits_short_texts_and_keeps_the_vectors_that_were_measured(decoder_dir, fields):
    decoder = AutoModelForCausalLM.from_pretrained(decoder_dir)
    before = weights_hash(decoder)
    fitter = fitter_for(decoder, fields)
    entries = fit(fitter)
    assert weights_hash(decoder) == before
    assert sorted(entries) == ["a", "b", "c", "d"]
    for text in TEXTS:
        assert entries[text.id].token_ids == text.token_ids
        assert len(entries[text.id].m) == math.ceil(len(text.token_ids) / 4)
        # One at a time, without the rest of the batch or its padding.
        assert fitter.measure(entries[text.id]) == pytest.approx(entries[text.id].accuracy)
    assert mean_accuracy(entries) > 0.8


def test_gradients_are_those_of_the_plain_cross_entropy(decoder, monkeypatch):
    """Against the decoder's own logits, whole, for texts of one and two chunks."""
    monkeypatch.setattr(fitting, "MAX_FLOAT_LOGITS", 3 * decoder.config.vocab_size)
    fitter = fitter_for(decoder, fit_attempts=1)
    fits = [TextFit(text) for text in TEXTS]
    for one in fits:
        fitter.start(one)
    scores = fitter._scores_and_gradients(fits)
    for one, (accuracy, least) in zip(fits, scores, strict=True):
        e, m = one.e.detach().requires_grad_(), one.m.detach().requires_grad_()
        target = torch.tensor(one.text.token_ids)
        layout = build_layout(torch.tensor([len(target)]), "e_mN", 4, len(e))
        slots = fill_slots(layout, e[None], m[None])
        logits = answer_logits(decoder, slots, layout, sink_ids(decoder.config, "bos", 1, e.device))
        F.cross_entropy(logits, target).backward()
        torch.testing.assert_close(one.e.grad, e.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.m.grad, m.grad, rtol=1e-4, atol=1e-6)
        assert accuracy == pytest.approx((logits.argmax(-1) == target).float().mean().item())
        assert least == pytest.approx(logits.softmax(-1)[range(len(target)), target].min().item(), rel=1e-4)


def test_fitting_learns(decoder):
    start = fit(fitter_for(decoder, fit_max_steps=1, fit_attempts=1))
    end = fit(fitter_for(decoder, fit_attempts=1))
    assert mean_accuracy(start) < mean_accuracy(end)


def test_the_best_vectors_are_those_before_the_step(decoder):
    """With a learning rate that ruins everything the first measurement stays the best, and its vectors are kept."""
    still = fit(fitter_for(decoder, fit_max_steps=3, fit_attempts=1, fit_learning_rate=0.0))
    fitter = fitter_for(decoder, fit_max_steps=3, fit_attempts=1, fit_learning_rate=1e4)
    for id, entry in fit(fitter).items():
        assert entry.accuracy >= still[id].accuracy
        if entry.steps == 0:
            assert torch.equal(entry.e, still[id].e)
        assert fitter.measure(entry) == pytest.approx(entry.accuracy)


def test_a_text_ends_where_it_ends_alone(decoder):
    """Whatever is fitted beside it, in however many slots, in whatever order."""
    alone = {}
    for text in TEXTS:
        alone |= fit(fitter_for(decoder, fit_max_steps=15, fit_attempts=2), [text])
    for slots, texts in (("4", TEXTS), ("2", TEXTS[::-1]), ("auto", TEXTS[1:] + TEXTS[:1])):
        together = fit(fitter_for(decoder, fit_max_steps=15, fit_attempts=2, fit_slots=slots), texts)
        for id, expected in alone.items():
            assert (together[id].accuracy, together[id].steps) == (expected.accuracy, expected.steps)
            torch.testing.assert_close(together[id].e, expected.e, rtol=1e-3, atol=1e-3)


def test_slots_are_always_full_and_a_text_that_ends_makes_room(decoder, monkeypatch):
    texts = random_texts(20, 4)
    fitter = fitter_for(decoder, fit_slots="6", fit_max_steps=30, fit_attempts=2)
    sizes = []
    step = fitter._scores_and_gradients
    monkeypatch.setattr(fitter, "_scores_and_gradients", lambda fits: sizes.append(len(fits)) or step(fits))
    left, expected = len(texts), []
    seen = []
    for ended in fitter.fit(texts):
        expected.append(min(6, left))
        left -= len(ended)
        seen += [entry.id for entry in ended]
    assert sizes == expected
    assert sorted(seen) == sorted(text.id for text in texts)


def test_only_texts_that_are_not_done_start_afresh_until_attempts_are_spent(decoder, monkeypatch):
    fitter = fitter_for(decoder, fit_slots="2", fit_max_steps=4, fit_attempts=3, fit_learning_rate=1e-6)
    starts = []
    start = fitter.start
    monkeypatch.setattr(fitter, "start", lambda one, m=None: starts.append((one.text.id, one.attempt)) or start(one, m))
    steps = sum(1 for _ in fitter.fit(TEXTS[:2]))
    assert sorted(starts) == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1), ("b", 2)]
    assert steps == 3 * 5  # four updates an attempt, and a measurement after the last


@pytest.mark.filterwarnings("ignore:out of memory")
def test_without_memory_for_all_slots_it_goes_on_with_half(decoder, monkeypatch):
    expected = fit(fitter_for(decoder, fit_max_steps=10, fit_attempts=1))
    fitter = fitter_for(decoder, fit_max_steps=10, fit_attempts=1, fit_slots="4")
    backward, calls = fitter._backward_pass, []

    def small(fits):
        calls.append(len(fits))
        if len(fits) > 1 or len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(fits)

    monkeypatch.setattr(fitting, "passes", lambda fits, max_tokens: [fits])
    monkeypatch.setattr(fitter, "_backward_pass", small)
    with pytest.warns(UserWarning, match="out of memory: going on with 2 slots"), pytest.raises(torch.OutOfMemoryError):
        fit(fitter)  # one text alone does not fit either
    calls[:] = [0] * 3
    with pytest.warns(UserWarning, match="out of memory: going on with 1 slots"):
        entries = fit(fitter)
    for id, entry in expected.items():
        assert entries[id].steps == entry.steps
        torch.testing.assert_close(entries[id].e, entry.e, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(fitter, "_backward_pass", lambda fits: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(fitter)


def test_passes_are_of_like_lengths(decoder):
    fits = [TextFit(text) for text in random_texts(200, 64)]
    groups = list(passes(fits, max_tokens=512))
    assert sorted(id(one) for group in groups for one in group) == sorted(map(id, fits))
    for group in groups:
        lengths = [len(one.text.token_ids) for one in group]
        assert 1 - sum(lengths) / (len(lengths) * max(lengths)) <= 0.1
        assert sum(lengths) <= 512
    assert len(groups) < 40
    assert [len(group) for group in passes(fits[:2], max_tokens=1)] == [1, 1]


def test_padding_stays_under_a_tenth(decoder):
    fitter = fitter_for(decoder, {"chunk_size": 32}, fit_slots="8", fit_max_steps=3, fit_attempts=2)
    fit(fitter, random_texts(60, 32))
    assert 0 < fitter.num_padding / fitter.num_positions < 0.1


def test_automatic_slots_keep_to_memory_and_processor(decoder, monkeypatch):
    fitter = fitter_for(decoder)
    texts = random_texts(300, 4)
    assert fitter.num_slots(texts) == 512 // 4
    assert fitter.num_slots(texts[:5]) == 5
    # Twice the length keeps at least twice the bytes.
    short, long = (fitter._saved_bytes(Text("x", [3] * length)) for length in (16, 32))
    assert 1.8 < long / short < 3
    per_text = fitter._saved_bytes(max(texts, key=lambda text: len(text.token_ids)))
    memory = type("Memory", (), {"available": 2 * per_text * 7 + 1})
    monkeypatch.setattr(fitting.psutil, "virtual_memory", lambda: memory)
    assert fitter.num_slots(texts) == 7


def test_progressive_loss_grows_to_the_whole_text(decoder):
    fitter = fitter_for(decoder, fit_max_steps=10, fit_progressive_share=0.5)
    one = TextFit(Text("a", [3] * 10))
    covered = []
    for one.step in (0, 2, 4, 5, 9):
        weights = fitter._token_weights(one)
        covered.append(int((weights > 0).sum()))
        assert weights.sum().item() == pytest.approx(1)
        assert (weights.diff() <= 0).all()
    assert covered == [2, 6, 10, 10, 10]


def test_a_start_that_is_perfect_ends_at_once(decoder):
    fitter = fitter_for(decoder)
    entries = fit(fitter)
    assert entries["a"].accuracy == 1
    again = fit(fitter, [Text("a", [5, 9, 4], start=(entries["a"].e, entries["a"].m))])
    assert again["a"].steps == 0
    assert torch.equal(again["a"].e, entries["a"].e)


def test_a_text_without_a_margin_is_measured_alone(decoder, monkeypatch):
    fitter = fitter_for(decoder, fit_min_probability=0.0)
    monkeypatch.setattr(fitter, "measure", lambda entry: 0.25)
    assert {entry.accuracy for entry in fit(fitter).values()} == {0.25}
    fitter = fitter_for(decoder, fit_min_probability=0.7, fit_attempts=10)
    monkeypatch.setattr(fitter, "measure", lambda entry: 0.25)
    assert 1.0 in {entry.accuracy for entry in fit(fitter).values()}


@pytest.mark.parametrize("slots", ["auto", "2"])
def test_a_shared_m_is_learned_first_and_then_stays(decoder, slots):
    info = {"m_scope": "shared"}
    fitter = fitter_for(decoder, info, fit_shared_m_steps=60, fit_shared_m_texts=3, fit_slots=slots)
    m, starts = fitter.fit_shared_m(TEXTS)
    assert list(m) == [""]
    assert m[""].shape == (1, 24)
    assert len(starts) == 3
    before = m[""].clone()
    entries = fit(fitter, [replace(t, start=(starts[t.id], None) if t.id in starts else None) for t in TEXTS], m)
    assert torch.equal(m[""], before)
    for entry in entries.values():
        assert torch.equal(entry.m, before.expand(len(entry.m), -1))
        assert fitter.measure(entry) == pytest.approx(entry.accuracy)
    assert mean_accuracy(entries) > 0.5

    given = torch.randn(1, 24, generator=torch.Generator().manual_seed(0)) * fitter.init_std
    fixed = fit(fitter, TEXTS, {"": given})
    assert all(torch.equal(entry.m, given.expand(len(entry.m), -1)) for entry in fixed.values())


def test_a_shared_m_learns(decoder):
    """It serves texts better than the m that it started from."""

    def accuracy(steps):
        fitter = fitter_for(decoder, {"m_scope": "shared"}, fit_shared_m_steps=steps, fit_attempts=1, fit_max_steps=30)
        m, _ = fitter.fit_shared_m(texts)
        return mean_accuracy(fit(fitter, texts, m))

    texts = random_texts(12, 4)
    assert accuracy(80) > accuracy(0)


def test_each_category_gets_its_m_in_any_number_of_slots(decoder):
    texts = [Text(t.id, t.token_ids, group="qa" if i % 2 else "list") for i, t in enumerate(random_texts(10, 4))]
    learned = []
    for slots in ("auto", "3"):
        fitter = fitter_for(decoder, {"m_scope": "per_category"}, fit_shared_m_steps=8, fit_slots=slots)
        m, _ = fitter.fit_shared_m(texts)
        assert sorted(m) == ["list", "qa"]
        assert not torch.equal(m["list"], m["qa"])
        learned.append(m)
    for group in ("list", "qa"):
        torch.testing.assert_close(learned[0][group], learned[1][group], rtol=1e-3, atol=1e-3)


def test_fitted_vectors_fit_the_bank(decoder, tmp_path):
    fitter = fitter_for(decoder, fit_max_steps=5, fit_attempts=1)
    entries = fit(fitter)
    bank = ProtoTokenBank(tmp_path, fitter.info)
    with bank.writing():
        bank.append(list(entries.values()))
    for id, entry in entries.items():
        assert fitter.measure(ProtoTokenBank(tmp_path)[id]) == pytest.approx(entry.accuracy)


def test_starts_depend_on_seed_id_and_attempt_alone(decoder):
    def start(seed, id, attempt):
        one = TextFit(Text(id, [5]), attempt=attempt)
        fitter_for(decoder, fit_seed=seed).start(one)
        return hashlib.sha256(one.e.detach().numpy().tobytes() + one.m.detach().numpy().tobytes()).hexdigest()

    assert start(0, "a", 0) == start(0, "a", 0)
    assert len({start(0, "a", 0), start(1, "a", 0), start(0, "b", 0), start(0, "a", 1)}) == 4


def test_impossible_requests_are_refused(decoder, monkeypatch):
    for slots in ("many", "0", "-1"):
        with pytest.raises(ValueError, match="fit_slots must be auto or a number"):
            fitter_for(decoder, fit_slots=slots)
    with pytest.raises(ValueError, match="fit_attempts must be at least 1, not 0"):
        fitter_for(decoder, fit_attempts=0)
    decoder.config.bos_token_id = None
    with pytest.raises(ValueError, match="sink=bos needs a decoder with a bos_token_id"):
        fitter_for(decoder)
    decoder.config.bos_token_id = 1
    forward = decoder.forward

    def soft_capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(decoder, "forward", soft_capped)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be the frozen decoder: it changes its logits"):
        fitter_for(decoder)
