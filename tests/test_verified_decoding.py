"""Verified decoding against transformers' own greedy `generate`."""

import json
import shutil
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from conftest import CONTEXTS, FREE, INSTRUCTIONS, stir_slot_adapters

from eval_tasks.baselines.autoregressive import autoregressive
from modeling_protogen import ProtoGenForConditionalGeneration, verified_decoding
from modeling_protogen.autoregressive import DecoderState
from modeling_protogen.block_decoding import Drafter, GenerationBuffer
from modeling_protogen.draft_length import FIRST_PAUSE, LONGEST_PAUSE, SPEED, DraftLength, PassCosts
from modeling_protogen.frozen_decoder import logits_of
from modeling_protogen.prompt_lookup import continuation
from modeling_protogen.proto_tokens import position_ids
from modeling_protogen.verified_decoding import gain_of, slots_that_pay, worth_verifying
from trainers.data import Example
from trainers.decoders import load_decoder
from trainers.teacher import greedy_answers

MORE = [*INSTRUCTIONS, "tell me about paris", "what is the capital of france and who sat under the tree"]
MORE_CONTEXTS = [*CONTEXTS, None, "long context about the cat"]
TOKENS = 24
SEEN = {"decoder_sees_prompt": True}
CHUNKS = {"arrangement": "e_m", "chunk_size": 3, "max_chunks": 2}
UPSAMPLED = {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8, "upsamples_prompt": True}
FIELDS = [
    {},
    SEEN | {"latent_source": "decoder"},
    SEEN | {"latent_source": "decoder", "first_tokens": "decoder"},
    SEEN | {"latent_source": "both", "first_tokens": "decoder"} | CHUNKS,
    SEEN | {"latent_source": "both", "slot_adapter_rank": 2} | CHUNKS,
    SEEN | {"latent_source": "none", "slot_adapter_rank": 2, "coherence_dim": 3, "first_tokens": "drafts"},
    SEEN | {"latent_source": "decoder"} | UPSAMPLED,
    {"latent_source": "decoder"},
]


def without_eos(model):
    """No token ends an answer."""
    model.config.decoder_config.eos_token_id = None
    model.decoder.generation_config.eos_token_id = None


def greedy(model, processor, instruction, context):
    inputs = processor(instruction, context)
    written = model.decoder.generate(
        input_ids=inputs["decoder_prompt_ids"],
        attention_mask=inputs["decoder_prompt_mask"],
        do_sample=False,
        max_new_tokens=TOKENS,
        pad_token_id=0,
    )
    return written[0, inputs["decoder_prompt_ids"].shape[1] :].tolist()


def verified(model, processor, batch_size, /, **options):
    answers, outputs = [], []
    for first in range(0, len(MORE), batch_size):
        part = slice(first, first + batch_size)
        inputs = processor(MORE[part], MORE_CONTEXTS[part])
        output = model.generate(
            **inputs, mode="verified", max_new_tokens=TOKENS, return_dict_in_generate=True, **options
        )
        answers += [row[:n].tolist() for row, n in zip(output.sequences, output.lengths, strict=True)]
        outputs.append(output)
    return answers, outputs


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("ends", [True, False], ids=["eos", "no eos"])
def test_the_answer_is_the_greedy_one(build, decoder_dir, fields, ends):
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    if not ends:
        without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    assert ends or all(len(answer) == TOKENS for answer in expected)
    # By default a draft is a chunk, which is no draft where a chunk is one token.
    options = {"block_size": 6} if model.config.chunk_size == 1 else {}
    # Where positions cost nothing drafts are trees.
    for batch_size, costs in ((1, {}), (2, {}), (5, {}), (1, FREE), (5, FREE)):
        answers, outputs = verified(model, processor, batch_size, **options, **costs)
        assert answers == expected
        # Of several texts, one in which nothing is found has no draft while others are drafted for.
        drafted = [(output.num_drafts > 0).tolist() for output in outputs]
        assert ends or all(any(texts) if batch_size > 1 else all(texts) for texts in drafted)


@pytest.mark.parametrize("thin", [False, True])
def test_every_eos_ends_an_answer_and_no_penalty_changes_one(build, llama_dir, tmp_path, thin):
    """Of the decoder's generation configuration its EOS count, in all that writes, also from a checkpoint."""
    folder = shutil.copytree(llama_dir, tmp_path / "decoder")
    plain, processor = build(llama_dir, decoder_sees_prompt=True)
    without_eos(plain)
    whole = greedy(plain, processor, MORE[0], None)
    stop = whole[3]
    own = {"eos_token_id": [2, stop], "repetition_penalty": 1.3, "suppress_tokens": [whole[0]]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    model, processor = build(folder, decoder_sees_prompt=True, thin=thin)
    model.save_pretrained(tmp_path / "model")
    expected = whole[: min(whole.index(end) for end in (2, stop) if end in whole) + 1]
    for each in (model, ProtoGenForConditionalGeneration.from_pretrained(tmp_path / "model")):
        assert each.config.eos_token_ids == [2, stop]
        assert greedy(each, processor, MORE[0], None) == expected
        inputs = processor(MORE[0])
        assert each.generate(**inputs, mode="verified", max_new_tokens=TOKENS)[0].tolist() == expected
        assert greedy_answers(each.decoder, processor, [Example("i", MORE[0], "", "")], TOKENS) == [expected]
        assert autoregressive(each.decoder, processor)([MORE[0]], [None], TOKENS).token_ids == [expected]
    _, decoder = load_decoder(str(folder), None, "float32", model.device)
    assert greedy_answers(decoder, processor, [Example("i", MORE[0], "", "")], TOKENS) == [expected]


def test_right_drafts_are_kept_and_save_passes(build, llama_dir, monkeypatch):
    """A decoder that says the same token whatever it reads is drafted without error."""
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    model.config.decoder_config.eos_token_id = None
    table = model.decoder.get_input_embeddings().weight
    with torch.no_grad():
        for layer in model.decoder.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        # Tied and of length 1: each token is the most likely one after itself.
        table.copy_(torch.nn.functional.normalize(table))
    forward = model.proto_predictor.forward
    monkeypatch.setattr(
        model.proto_predictor, "forward", lambda *args: replace(forward(*args), m=table[7].expand(1, 1, -1))
    )
    inputs = processor("who sat")
    inputs["decoder_prompt_ids"][:, -1] = 7
    output = model.generate(
        **inputs, mode="verified", max_new_tokens=TOKENS, block_size=8, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == [[7] * TOKENS]
    # Each pass but the prompt's writes a draft and the token after it, down to the last one; and drafts grow.
    assert output.num_passes - 2 <= output.num_drafts.item() < output.num_passes < TOKENS / 2
    kept = output.accepted_lengths.item() * output.num_drafts.item()
    assert kept + output.num_passes == pytest.approx(TOKENS)


def plan_drafts(monkeypatch, expected, num_right):
    """Drafts that are right in the first `num_right(size)` places, and wrong after that."""
    buffers = []
    start, draft = GenerationBuffer.__init__, Drafter.draft

    def begin(self, *args):
        start(self, *args)
        buffers.append(self)

    def planned(self, states, logits, certain, sampling):
        _, table = draft(self, states, logits, certain, sampling)
        size = table.shape[1]
        for row, answer in enumerate(expected):
            right, written = num_right(size), len(buffers[-1].tokens[row])
            for place in range(size):
                token = answer[written + place] if written + place < len(answer) else 0
                table[row, place, (token + (place >= right)) % table.shape[2]] = 1e4
        return table.argmax(-1), table

    monkeypatch.setattr(GenerationBuffer, "__init__", begin)
    monkeypatch.setattr(Drafter, "draft", planned)


def test_texts_of_a_batch_grow_at_different_paces(build, decoder_dir, monkeypatch):
    """Drafts that are right up to a random place, another for each text: what was wrong leaves no trace."""
    model, processor = build(decoder_dir, decoder_sees_prompt=True, latent_source="decoder")
    without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    inputs = processor(MORE, MORE_CONTEXTS)
    random = torch.Generator().manual_seed(0)
    plan_drafts(monkeypatch, expected, lambda size: torch.randint(0, size + 1, (1,), generator=random).item())
    options = {"block_size": 6, "return_dict_in_generate": True} | FREE
    output = model.generate(**inputs, mode="verified", max_new_tokens=TOKENS, **options)
    assert output.sequences.tolist() == expected
    assert output.num_passes < TOKENS
    assert 0.2 < output.accepted_lengths.mean() < 5
    assert output.accepted_lengths.unique().numel() > 1


@pytest.mark.parametrize("rows", [1, 5])
def test_wrong_drafts_cost_no_pass(build, decoder_dir, monkeypatch, rows):
    """Where nothing is kept a pass writes one token, as without drafts, and there are few of them."""
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE[:rows], MORE_CONTEXTS[:rows], strict=True)]
    plan_drafts(monkeypatch, expected, lambda size: 0)
    monkeypatch.setattr("modeling_protogen.verified_decoding.continuation", lambda ids, longest: [])
    inputs = processor(MORE[:rows], MORE_CONTEXTS[:rows])
    output = model.generate(
        **inputs, mode="verified", max_new_tokens=TOKENS, block_size=8, return_dict_in_generate=True
    )
    assert output.sequences.tolist() == expected
    assert output.accepted_lengths.tolist() == [0] * rows
    assert output.num_passes == TOKENS
    assert 0 < output.num_drafts[0] < TOKENS - 2


def test_drafts_are_as_long_as_they_pay():
    length = DraftLength(4, 0.5)
    assert length.chances(3) == [0.5, 0.25, 0.125]
    assert length.kept(4) == pytest.approx(0.5 + 0.25 + 0.125 + 0.0625)
    assert length.next([0.1, 0.3, 0.2]) == 2
    assert length.next([-0.1, -0.3]) == length.next([]) == 0
    for _ in range(20):
        length.note(2, 2.0)
    # What is expected counts as four drafts.
    assert length.rates[:2] == pytest.approx([(4 * 0.5 + 20) / 24] * 2)
    assert length.rates[2:] == [0.5, 0.5]
    for _ in range(150):
        length.note(2, 1.0)
    assert length.rates[0] > 0.99 > 0.01 > length.rates[1]


def test_what_positions_cost_a_text():
    costs = PassCosts(position=0.1, slots=0.5)
    assert costs.price(1, 3) == pytest.approx(SPEED * 0.3)
    assert costs.price(1, 3, has_slots=True) == pytest.approx(SPEED * 0.8)
    # Each of four texts gets a token in a pass of 1.3.
    assert costs.price(4, 3, has_slots=True) == pytest.approx(SPEED * (1.2 + 0.5) / 1.3)


def test_unsure_drafts_are_not_verified():
    sure = [0.9, 0.8, 0.1, 0.05]
    assert worth_verifying(sure, 0.0) == sure
    assert worth_verifying(sure, 0.2) == [0.9, 0.8]
    assert worth_verifying([0.1, 0.9], 0.2) == worth_verifying([], 0.2) == []
    assert gain_of(sure, 0.2) == pytest.approx(0.9 + 0.8 - 2 * 0.2)


@pytest.mark.parametrize("batch", [1, 3])
def test_slots_lie_where_what_they_bring_is_more_than_what_they_cost(batch):
    """Against all sizes and all sets of ends, of chains and of trees."""
    random = torch.Generator().manual_seed(batch)
    seen = set()
    for _ in range(60):
        number = int(torch.randint(0, 5, (), generator=random))
        parents, chances, is_last = [], [], [1.0]
        for token in range(number):
            is_chain = torch.rand((), generator=random) < 0.7
            parents.append(token if is_chain else int(torch.randint(token + 1, (), generator=random)))
            chances.append(is_last[parents[-1]] * torch.rand((), generator=random).item())
            is_last[parents[-1]] -= chances[-1]
            is_last.append(chances[-1])
        after_wrong, after_right = DraftLength(3, 0.0), DraftLength(3, 0.0)
        after_wrong.rates, after_right.rates = torch.rand(2, 3, generator=random).tolist()
        costs = PassCosts(*(0.05 * torch.rand(2, generator=random)).tolist())

        def gain(size, ends, parents=parents, is_last=is_last, sources=(after_wrong, after_right), costs=costs):
            kept = [sources[end not in parents].kept(size) for end in ends]
            chances = [is_last[end] for end in ends]
            later = sum(p * (tokens - costs.price(batch, size)) for p, tokens in zip(chances, kept, strict=True))
            return later - costs.price(batch, (size + 1) * len(ends), True)

        places = range(number + 1)
        sets = [ends for n in range(1, number + 2) for ends in combinations(places, n)]
        best = max(((gain(size, ends), size, list(ends)) for size in (1, 2, 3) for ends in sets), key=lambda x: x[0])
        expected = best[1:] if best[0] > 0 else (0, [])
        by_slots = {False: after_wrong, True: after_right}
        assert slots_that_pay(chances, parents, by_slots, [2, 3, 4], batch, costs) == tuple(expected)
        seen.add((expected[0], len(expected[1]) - number))
    assert len(seen) > 5


def test_which_draft_is_verified_does_not_depend_on_the_tokens_drawn(build, decoder_dir, monkeypatch):
    """Else those that are verified would be chosen ones, and samples no longer the decoder's."""
    fields = SEEN | {"latent_source": "none", "first_tokens": "drafts", "coherence_dim": 3, "chunk_size": 4}
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    without_eos(model)
    drafts, gains, draft, by_slots = [], [], Drafter.draft, verified_decoding.drafted_by_slots

    def drawn(self, *args):
        drafts.append(draft(self, *args))
        return drafts[-1]

    def with_gain(*args):
        found = by_slots(*args)
        gains.append(found[0].gain)
        return found

    monkeypatch.setattr(Drafter, "draft", drawn)
    monkeypatch.setattr(verified_decoding, "drafted_by_slots", with_gain)
    first = []
    for seed in range(6):
        drafts.clear(), gains.clear()
        torch.manual_seed(seed)
        model.generate(**processor(MORE[0]), mode="verified", max_new_tokens=8, do_sample=True, position_cost=0.01)
        first.append((tuple(drafts[0][0][0].tolist()), gains[0]))
    tokens, gain = map(set, zip(*first, strict=True))
    assert len(tokens) > 1
    assert len(gain) == 1


def test_costs_are_measured_and_kept(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    model.measure_pass_costs()
    config = model.generation_config
    assert 0 <= config.position_cost < 10
    assert 0 <= config.slots_cost < 10
    config.position_cost = 0.125
    model.save_pretrained(tmp_path)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.position_cost == 0.125
    assert verified(loaded, processor, 5)[0] == verified(model, processor, 1)[0]


def test_drafts_that_never_pay_are_tried_ever_less_often():
    length, drafted = DraftLength(2, 0.0), []
    for number in range(400):
        size = length.next([-0.1, -0.2])
        if size:
            drafted.append(number)
            length.note(size, 0.0)
    gaps = [b - a for a, b in pairwise(drafted)]
    assert drafted[0] == FIRST_PAUSE
    assert gaps == sorted(gaps)
    assert gaps[-1] == LONGEST_PAUSE + 1


def test_texts_go_on_as_before():
    text = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 2, 3]
    assert continuation(text, 10) == [7, 8, 2, 3]
    assert continuation(text, 1) == [7]
    assert continuation([4, *text[:3], 6, 1, 2, 3, 8, 1, 2, 3], 2) == [8, 1]
    # Three tokens tell more than two.
    assert continuation([1, 2, 3, 5, 9, 2, 3, 6, 1, 2, 3], 1) == [5]
    assert continuation([5, 6, 7], 4) == continuation([5], 4) == continuation([], 4) == []


@pytest.mark.parametrize("batch_size", [1, 5])
def test_drafts_from_the_text_are_verified(build, decoder_dir, monkeypatch, batch_size):
    """Right ones save passes, and wrong ones change nothing."""
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    answers = {tuple(answer[:1]): answer for answer in expected}
    assert len(answers) > 1

    prompts = [processor(*pair)["decoder_prompt_ids"][0].tolist() for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    texts = [prompt + answer for prompt, answer in zip(prompts, expected, strict=True)]

    def known(ids, longest):
        text = next(text for text in texts if text[: len(ids)] == ids)
        return text[len(ids) :][:longest]

    plain, (before, *_) = verified(model, processor, batch_size)
    monkeypatch.setattr("modeling_protogen.verified_decoding.continuation", known)
    found, (after, *_) = verified(model, processor, batch_size)
    assert found == plain == expected
    assert after.num_passes < before.num_passes
    monkeypatch.setattr(
        "modeling_protogen.verified_decoding.continuation",
        lambda *args: [(token + 1) % model.config.decoder_config.vocab_size for token in known(*args)],
    )
    assert verified(model, processor, batch_size)[0] == expected


def test_a_loaded_checkpoint_decodes_the_same(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True, latent_source="decoder", thin=True)
    model.save_pretrained(tmp_path)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    assert verified(loaded, processor, 5)[0] == verified(model, processor, 5)[0]


def test_bad_requests_are_named(build, llama_dir):
    model, processor = build(llama_dir)
    inputs = processor(INSTRUCTIONS)
    with pytest.raises(ValueError, match="mode='fast' is not one of one_step, refine, adaptive, verified"):
        model.generate(**inputs, mode="fast")
    with pytest.raises(ValueError, match=r"block_size must lie in 1\.\.8 tokens; got 9"):
        model.generate(**inputs, mode="verified", block_size=9)
    with pytest.raises(ValueError, match="give decoder_prompt_ids"):
        model.generate(input_ids=inputs["input_ids"], mode="verified")


@pytest.mark.parametrize("source", ["none", "decoder", "encoder"])
@torch.no_grad()
def test_drafts_are_what_training_behind_anchors_sees(build, decoder_dir, source):
    fields = SEEN | {"latent_source": source, "first_tokens": "drafts", "slot_adapter_rank": 2, "chunk_size": 4}
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    processor.max_answer_length = 32
    answer = [5, 9, 7, 8, 6, 11, 4]
    batch = processor(INSTRUCTIONS[:2], CONTEXTS[:2], [answer, answer])
    trained = model(**batch, anchors=torch.tensor([[0, 2], [0, 2]])).answer_logits.view(2, 2, 3, -1)
    prompt = batch["decoder_prompt_ids"], batch["decoder_prompt_mask"]
    given = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    prediction = model.predict(**given, decoder_prompt_ids=prompt[0], decoder_prompt_mask=prompt[1])
    drafter, text = Drafter(model, prediction), DecoderState(model.decoder, 2)
    _, behind = text.read(*prompt, 1, drafter.slots(3))
    torch.testing.assert_close(
        logits_of(model.decoder, behind[:, 0, drafter.places(3)]), trained[:, 0], atol=1e-4, rtol=1e-4
    )
    # Behind each of two tokens that are read together.
    start = torch.tensor([answer[:2]] * 2)
    for ends, place in (([0, 1], 1), ([-1], 0)):
        _, behind = text.read(start, torch.ones_like(start), 2, drafter.slots(3), ends)
        of_slots = logits_of(model.decoder, behind[:, place, drafter.places(3)])
        torch.testing.assert_close(of_slots, trained[:, 1], atol=1e-4, rtol=1e-4)
        text.forget(torch.tensor([2, 2]), [False, False])
    # Behind the first of the two alone, as if the second were not read.
    _, behind = text.read(start, torch.ones_like(start), 2, drafter.slots(3), [0])
    alone = DecoderState(model.decoder, 2)
    alone.read(*prompt)
    _, expected = alone.read(start[:, :1], torch.ones_like(start[:, :1]), 1, drafter.slots(3))
    torch.testing.assert_close(behind, expected, atol=1e-4, rtol=1e-4)
    assert text.ids.shape[1] == prompt[0].shape[1] + 2


def test_slots_for_the_first_tokens_are_those_of_training_but_where_the_decoder_is_certain(build, decoder_dir):
    model, processor = build(decoder_dir, **SEEN, first_tokens="slots", slot_adapter_rank=2)
    stir_slot_adapters(model)
    batch = processor(INSTRUCTIONS[:2], CONTEXTS[:2], [[8, 6, 11, 4]] * 2)
    prompt = [batch[name] for name in ("decoder_prompt_ids", "decoder_prompt_mask")]
    with torch.no_grad():
        trained = model(**batch).answer_logits.view(2, 4, -1)
        own = model.decoder(prompt[0], attention_mask=prompt[1], position_ids=position_ids(prompt[1])).logits[:, -1]
        prediction = model.predict(batch["input_ids"], batch["attention_mask"])
        drafter, text = Drafter(model, prediction), DecoderState(model.decoder, 2)
        states, behind = text.read(*prompt, 1, drafter.slots(3))
    torch.testing.assert_close(logits_of(model.decoder, states[:, 0]), own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        logits_of(model.decoder, behind[:, 0, drafter.places(3)]), trained[:, 1:], atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(own, trained[:, 0], atol=0.1)
