"""Adaptive, refined, drawn and ranked answers against slow formulas and transformers' own `generate`."""

import json

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, adapted_decoder, coherent, stir_slot_adapters
from scipy.stats import chisquare
from test_verified_decoding import FIELDS, MORE, MORE_CONTEXTS, TOKENS, greedy, without_eos
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, TextStreamer

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenGenerationConfig
from modeling_protogen.adaptive_decoding import EXPECTED
from modeling_protogen.draft_length import DraftLength
from modeling_protogen.generation_protogen import MODES
from modeling_protogen.one_step_decoding import candidates
from modeling_protogen.proto_tokens import build_layout, fill_slots
from modeling_protogen.sampling import Sampling
from modeling_protogen.verified_decoding import accept


def answers_of(output):
    return [row[:n].tolist() for row, n in zip(output.sequences, output.lengths, strict=True)]


def slow_adaptive(model, processor, instruction, context, block_size, threshold):
    """One text, everything read anew for each block."""
    adapted, adapted_layers = adapted_decoder(model)
    config, inputs = model.config, processor(instruction, context)
    prompt = inputs["decoder_prompt_ids"][inputs["decoder_prompt_mask"].bool()][None]
    embed, answer, prediction = model.decoder.get_input_embeddings(), [], model.predict(**inputs)

    def slots_of(size):
        shape = config.arrangement, config.chunk_size, config.max_chunks, config.num_e_tokens
        idle = 0 if config.first_tokens == "drafts" else 1
        layout = build_layout(torch.tensor([idle + size]), *shape)
        predicts = layout.predicts[0]
        predicts[predicts.nonzero()[:idle]] = False
        return fill_slots(layout, prediction.e, prediction.m), predicts

    prices = [1.5 * (0.1 + 0.027 * slots_of(size)[0].shape[1]) for size in range(1, block_size)]
    draft_length = DraftLength(len(prices), EXPECTED)
    while len(answer) < TOKENS:
        text = torch.cat([prompt, torch.tensor([answer], dtype=torch.long)], dim=1)
        wanted = draft_length.next([draft_length.kept(size) - price for size, price in enumerate(prices, 1)])
        size = min(wanted, TOKENS - len(answer) - 1)
        slots, predicts = slots_of(size) if size else (embed(text[:, :0]), [])
        for layer in adapted_layers:
            layer.start = text.shape[1]
        states = adapted.base_model(inputs_embeds=torch.cat([embed(text), slots], dim=1)).last_hidden_state[0]
        own, drafted = states[text.shape[1] - 1], states[text.shape[1] :][predicts]
        logits = [adapted.get_output_embeddings()(own)]
        for state in drafted:
            if model.coherence is not None:
                written = torch.stack([each.argmax() for each in logits])
                state = coherent(model.coherence, state, embed(written).flip(0))
            logits.append(adapted.get_output_embeddings()(state))
        p = torch.stack(logits).softmax(-1)
        new = 1
        while new <= size and p[new].max() >= threshold:
            new += 1
        answer += p[:new].argmax(-1).tolist()
        if size:
            draft_length.note(size, new - 1)
    return answer


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@torch.no_grad()
def test_adaptive_decoding_is_the_slow_loop(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    without_eos(model)
    inputs = processor(MORE, MORE_CONTEXTS)
    # Low among these models' probabilities, so that blocks have all lengths.
    options = {"mode": "adaptive", "max_new_tokens": TOKENS, "block_size": 5, "return_dict_in_generate": True}
    confidences = model.generate(**inputs, **options, confidence_threshold=0).token_confidences
    threshold = confidences.quantile(0.1).item() * 0.999
    output = model.generate(**inputs, **options, confidence_threshold=threshold)
    expected = [
        slow_adaptive(model, processor, *pair, block_size=5, threshold=threshold)
        for pair in zip(MORE, MORE_CONTEXTS, strict=True)
    ]
    assert answers_of(output) == expected
    assert 0 < output.accepted_lengths.mean() < 4


def test_adaptive_decoding_that_is_never_sure_is_greedy(build, decoder_dir):
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    without_eos(model)
    inputs = processor(MORE, MORE_CONTEXTS)
    options = {"confidence_threshold": 1, "slots_cost": 2.0, "return_dict_in_generate": True}
    output = model.generate(**inputs, mode="adaptive", max_new_tokens=TOKENS, **options)
    assert answers_of(output) == [greedy(model, processor, *pair) for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    assert (output.accepted_lengths == 0).all()
    # Where drafts do not pay they get rare.
    assert (output.num_drafts < TOKENS - 2).all()


@pytest.mark.parametrize("mode", ["adaptive", "verified"])
def test_what_follows_the_end_of_an_answer_is_not_counted_as_kept(build, decoder_dir, mode):
    """Each pass writes one token of the decoder's own, unless the draft before that one ends the answer."""
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    without_eos(model)
    inputs = processor(MORE[0])
    options = {"mode": mode, "max_new_tokens": TOKENS, "block_size": 8, "return_dict_in_generate": True}
    if mode == "adaptive":
        options["confidence_threshold"] = 0
    whole = model.generate(**inputs, **options).sequences[0].tolist()
    for length, end in enumerate(whole, 1):
        if end in whole[: length - 1]:
            continue
        model.config.decoder_config.eos_token_id = [end]
        output = model.generate(**inputs, **options)
        assert output.lengths.tolist() == [length]
        kept = (output.accepted_lengths * output.num_drafts).round().item()
        assert length - output.num_passes in ({kept} if mode == "adaptive" else {kept, kept - 1})


def test_refining_all_of_it_ends_at_the_greedy_answer(build, decoder_dir):
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    without_eos(model)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    expected = [greedy(model, processor, *pair)[:8] for pair in zip(INSTRUCTIONS, CONTEXTS, strict=True)]
    options = {"mode": "refine", "length": 8, "confidence_threshold": 1}
    refined = [model.generate(**inputs, **options, num_refinements=n).tolist() for n in (1, 8)]
    assert refined[1] == expected
    # Each pass sets at least one more token right for good.
    assert [row[0] for row in refined[0]] == [row[0] for row in expected]


@torch.no_grad()
def test_refining_changes_what_is_unsure_alone(build, decoder_dir):
    model, processor = build(decoder_dir)
    without_eos(model)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    lengths = torch.tensor([8, 3, 5])
    draft = model.generate(**inputs, length=lengths, return_dict_in_generate=True)
    threshold = draft.token_confidences[draft.token_confidences > 0].median().item()
    output = model.generate(
        **inputs, mode="refine", length=lengths, confidence_threshold=threshold, return_dict_in_generate=True
    )
    changes = 0
    for row, n in enumerate(lengths):
        prompt = processor(INSTRUCTIONS[row], CONTEXTS[row])["decoder_prompt_ids"]
        tokens = draft.sequences[row, :n]
        own = model.decoder(torch.cat([prompt, tokens[None]], dim=1)).logits[0, prompt.shape[1] - 1 : -1].softmax(-1)
        unsure = draft.token_confidences[row, :n] < threshold
        assert output.sequences[row, :n].tolist() == torch.where(unsure, own.argmax(-1), tokens).tolist()
        torch.testing.assert_close(
            output.token_confidences[row, :n],
            torch.where(unsure, own.max(-1).values, draft.token_confidences[row, :n]),
        )
        changes += unsure.sum().item()
    assert 0 < changes < lengths.sum()


@pytest.mark.parametrize("fields", [{}, {"decoder_sees_prompt": True, "latent_source": "decoder"}], ids=str)
@torch.no_grad()
def test_the_candidate_that_the_decoder_likes_best_is_returned(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **fields)
    inputs = processor(INSTRUCTIONS, CONTEXTS)

    def liking(instruction, context, answer):
        prompt = processor(instruction, context)["decoder_prompt_ids"]
        ids = torch.cat([prompt, torch.tensor([answer])], dim=1)
        log_p = model.decoder(ids).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        return log_p[range(len(answer)), answer].mean().item()

    torch.manual_seed(3)
    prediction = model.predict(**inputs)
    many, quantiles = candidates(prediction, 4, 0.5 * model.config.proto_token_std)
    torch.testing.assert_close(many.e[::4], prediction.e)
    assert not torch.equal(many.e[1::4], prediction.e)
    if prediction.prompt_cache is not None:  # Is left as it was.
        assert prediction.prompt_cache.layers[0].keys.shape[0] == len(INSTRUCTIONS)
    assert quantiles[:4].tolist() == pytest.approx([0, -0.6745, 0, 0.6745], abs=1e-4)
    lengths = model.clamp_lengths((many.log_length_mean + quantiles * many.log_length_variance.sqrt()).exp())
    torch.manual_seed(3)
    output = model.generate(**inputs, num_candidates=4, return_dict_in_generate=True)
    for row, answer in enumerate(answers_of(output)):
        found = []
        for candidate in range(4 * row, 4 * row + 4):
            one = {"proto_tokens": (many.e[candidate, None], many.m[candidate, None]), "length": lengths[candidate]}
            found.append(model.generate(**processor(INSTRUCTIONS[row], CONTEXTS[row]), **one)[0].tolist())
        likings = [liking(INSTRUCTIONS[row], CONTEXTS[row], tokens) for tokens in found]
        assert answer == found[likings.index(max(likings))]
    assert output.predicted_lengths.tolist() == pytest.approx(prediction.log_length_mean.exp().tolist())


def test_the_same_candidates_are_the_one_step_answer(build, llama_dir):
    model, processor = build(llama_dir)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    lengths = torch.tensor([3, 8, 5])
    ranked = model.generate(**inputs, num_candidates=3, candidate_noise=0, length=lengths)
    assert torch.equal(ranked, model.generate(**inputs, length=lengths))


def same_distribution(counts, probabilities):
    """Whether a chi-square test finds no difference; rare tokens are one kind."""
    if counts[probabilities == 0].any():
        return False
    expected = probabilities * counts.sum()
    common = expected >= 5
    pairs = [torch.cat([x[common], x[~common].sum()[None]]) for x in (counts.double(), expected.double())]
    observed, expected = (pair[pairs[1] > 0] for pair in pairs)
    return chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6, top_p=0.8)], ids=str)
def test_kept_drafts_have_the_decoders_distribution(sampling):
    """Leviathan et al., 2023, theorem 1: whatever is drafted, what is written is distributed as without drafts."""
    torch.manual_seed(0)
    rows, vocab = 40_000, 12
    own = torch.randn(3, vocab)
    draft_logits = (own[:2] + 0.5 * torch.randn(2, vocab)).expand(rows, -1, -1)
    drafts = sampling.pick(draft_logits)
    kept, following = accept(drafts, draft_logits, own.expand(rows, -1, -1), sampling)
    written = torch.cat([drafts, drafts[:, :1]], dim=1).scatter(1, kept[:, None], following[:, None])
    assert 0.1 < (kept == 2).float().mean() < 0.9
    p = sampling.probabilities(own)
    for place in range(3):
        counts = written[kept >= place, place].bincount(minlength=vocab)
        assert same_distribution(counts, p[place])
    # The drafts themselves are distributed otherwise.
    assert not same_distribution(drafts[:, 0].bincount(minlength=vocab), p[0])


@torch.no_grad()
def test_verified_samples_have_the_decoders_distribution(build, decoder_dir):
    model, processor = build(decoder_dir, decoder_sees_prompt=True, latent_source="decoder")
    without_eos(model)
    torch.manual_seed(0)
    rows, sampling = 4000, Sampling(0.5, 0.9, top_k=50)
    inputs = {name: tensor.expand(rows, -1) for name, tensor in processor("who sat").items()}
    output = model.generate(
        **inputs,
        mode="verified",
        # A batch of thousands is not worth a draft where they cost something.
        position_cost=0.0,
        slots_cost=0.0,
        max_new_tokens=4,
        do_sample=True,
        temperature=0.5,
        top_p=0.9,
        return_dict_in_generate=True,
    )
    assert output.accepted_lengths.unique().numel() > 1

    # The exact distribution of the third token, over all beginnings.
    prompt = processor("who sat")["decoder_prompt_ids"]
    vocab = model.decoder.config.vocab_size
    pairs = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    logits = model.decoder(torch.cat([prompt.expand(len(pairs), -1), pairs], dim=1)).logits
    p = sampling.probabilities(logits[:, -3:])
    chance = p[:, 0].gather(1, pairs[:, :1])[:, 0] * p[:, 1].gather(1, pairs[:, 1:])[:, 0]
    third = (chance[:, None] * p[:, 2]).sum(0)
    assert third.sum().item() == pytest.approx(1, abs=1e-5)
    assert same_distribution(output.sequences[:, 2].bincount(minlength=vocab), third)


@torch.no_grad()
def test_one_step_samples_are_drawn_from_each_position(build, llama_dir):
    model, processor = build(llama_dir)
    without_eos(model)
    torch.manual_seed(0)
    inputs = processor("who sat")
    labels = torch.tensor([[5, 5]])
    p = Sampling(0.7, 0.95, top_k=9).probabilities(model(**inputs, labels=labels).answer_logits)
    many = {name: tensor.expand(4000, -1) for name, tensor in inputs.items()}
    written = model.generate(**many, length=2, do_sample=True, temperature=0.7, top_k=9, top_p=0.95)
    for place in range(2):
        assert same_distribution(written[:, place].bincount(minlength=p.shape[1]), p[place])


@pytest.mark.parametrize("mode", MODES)
def test_tokens_stream_as_they_are_written(build, llama_dir, mode):
    model, processor = build(llama_dir, decoder_sees_prompt=True)

    class Recorder(TextStreamer):
        text = ""

        def on_finalized_text(self, text, stream_end=False):
            self.text += text

    recorder = Recorder(processor.decoder_tokenizer, skip_prompt=True)
    written = model.generate(**processor("who sat"), mode=mode, max_new_tokens=12, streamer=recorder)
    assert recorder.text == processor.decoder_tokenizer.decode(written[0])
    with pytest.raises(ValueError, match="only supports batch size 1"):
        model.generate(**processor(INSTRUCTIONS), mode=mode, streamer=recorder)


@pytest.mark.parametrize("mode", MODES)
def test_answers_have_a_limit(build, llama_dir, mode):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    without_eos(model)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    whole = model.generate(**inputs, mode=mode)
    assert whole.shape[1] > 3
    assert model.generate(**inputs, mode=mode, max_new_tokens=3, max_length=5).shape[1] == 3
    # As in transformers the first of them counts.
    assert model.generate(**inputs, mode=mode, max_new_tokens=4, max_length=3).shape[1] == 4
    short = model.generate(**inputs, mode=mode, max_length=3)
    longer = [len(row) >= 3 for row in answers_of(model.generate(**inputs, mode=mode, return_dict_in_generate=True))]
    assert torch.equal(short[longer], whole[longer, :3])


@pytest.mark.parametrize("mode", MODES)
def test_several_answers_to_an_instruction_are_next_to_each_other(build, llama_dir, mode):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    without_eos(model)
    options = {"mode": mode, "do_sample": True, "max_new_tokens": 4}
    inputs = processor(INSTRUCTIONS[:2], CONTEXTS[:2])
    torch.manual_seed(0)
    several = model.generate(**inputs, **options, num_return_sequences=3)
    torch.manual_seed(0)
    repeated = {name: tensor.repeat_interleave(3, dim=0) for name, tensor in inputs.items()}
    assert torch.equal(several, model.generate(**repeated, **options))
    assert len({tuple(row) for row in several.tolist()}) > 2


def test_a_saved_configuration_is_honoured_and_arguments_win(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    without_eos(model)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    plain, verified = model.generate(**inputs), model.generate(**inputs, mode="verified", max_new_tokens=5)
    model.generation_config = ProtoGenGenerationConfig(mode="verified", max_new_tokens=5)
    model.save_pretrained(tmp_path)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    without_eos(loaded)
    assert torch.equal(loaded.generate(**inputs), verified)
    assert torch.equal(loaded.generate(**inputs, max_new_tokens=3), verified[:, :3])
    assert torch.equal(loaded.generate(**inputs, generation_config=ProtoGenGenerationConfig()), plain)
    # What earlier versions saved with a model.
    old = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2}
    old |= {"output_attentions": False, "output_hidden_states": False, "transformers_version": "5.23.0"}
    (tmp_path / "generation_config.json").write_text(json.dumps(old))
    again = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    without_eos(again)
    assert torch.equal(again.generate(**inputs), plain)
    # One of transformers' own says what it can, and is not changed.
    given = GenerationConfig(max_new_tokens=2, do_sample=True, top_p=0.9)
    assert torch.equal(loaded.generate(**inputs, generation_config=given, do_sample=False), plain[:, :2])
    assert given.do_sample


def test_one_step_answers_end_at_a_stop_string(build, decoder_dir):
    model, processor = build(decoder_dir)
    without_eos(model)
    inputs, tokenizer = processor(MORE, MORE_CONTEXTS), processor.decoder_tokenizer
    whole = model.generate(**inputs, length=8).tolist()
    stop = tokenizer.decode(whole[0][2:4])
    found = model.generate(**inputs, length=8, stop_strings=[stop], processor=processor, return_dict_in_generate=True)
    for answer, tokens in zip(answers_of(found), whole, strict=True):
        ends = [n for n in range(1, 9) if stop in tokenizer.decode(tokens[:n])]
        assert answer == tokens[: ends[0] if ends else 8]


def test_answers_end_at_a_stop_string(build, decoder_dir):
    model, processor = build(decoder_dir, decoder_sees_prompt=True)
    without_eos(model)
    tokenizer = processor.decoder_tokenizer
    inputs = processor(MORE, MORE_CONTEXTS)
    whole = model.generate(**inputs, mode="verified", max_new_tokens=TOKENS).tolist()
    # Two words in the middle of the first answer.
    stop = tokenizer.decode(whole[0][9:11])
    options = {"mode": "verified", "max_new_tokens": TOKENS, "stop_strings": [stop], "return_dict_in_generate": True}
    found = answers_of(model.generate(**inputs, **options, processor=processor))
    for answer, tokens in zip(found, whole, strict=True):
        ends = [n for n in range(1, TOKENS + 1) if stop in tokenizer.decode(tokens[:n])]
        assert answer == tokens[: ends[0] if ends else TOKENS]
    assert len(found[0]) <= 11
    options["stop_strings"] = stop
    assert answers_of(model.generate(**inputs, **options, processor=processor)) == found
    with pytest.raises(ValueError, match="stop_strings need the tokenizer"):
        model.generate(**inputs, **options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"do_sample": True, "temperature": -1.0}, "temperature must not be negative"),
        ({"do_sample": True, "top_k": -1}, "top_k must not be negative; got -1"),
        ({"do_sample": True, "top_k": 2.5}, r"top_k must be a whole number; got 2\.5"),
        ({"max_new_token": 3}, r"max_new_token \(did you mean max_new_tokens\?\) is not for mode=one_step"),
        ({"top_k": 3}, "do_sample=True is needed with top_k, by which"),
        ({"do_sample": True, "top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"temperature": 0.5, "top_p": 0.5}, "do_sample=True is needed with temperature and top_p, by which"),
        ({"mode": "adaptive", "block_size": 9}, r"block_size must lie in 1\.\.8 tokens; got 9"),
        ({"mode": "verified", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"mode": "verified", "max_new_tokens": 3.0}, r"max_new_tokens must be a whole number; got 3\.0"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"num_return_sequences": 2}, r"Greedy methods .* do not support `num_return_sequences`"),
        ({"num_candidates": 0}, "num_candidates must be at least 1"),
        ({"num_candidates": 2.5}, r"num_candidates must be a whole number; got 2\.5"),
        ({"length": 3.7}, r"length must be a whole number of tokens; got 3\.7"),
        ({"mode": "adaptive", "confidence_threshold": 1.5}, r"confidence_threshold must lie in 0\.\.1; got 1\.5"),
        ({"mode": "refine", "confidence_threshold": -0.1}, r"confidence_threshold must lie in 0\.\.1; got -0\.1"),
        ({"num_candidates": 2, "candidate_noise": -1}, "candidate_noise must lie in 0..inf; got -1"),
        ({"abstain_above": float("nan")}, "abstain_above must be a number; got nan"),
        ({"num_length_sigmas": "long"}, "num_length_sigmas must be a number; got 'long'"),
        ({"mode": "refine", "num_refinements": 0}, "num_refinements must be at least 1"),
    ],
)
def test_impossible_options_are_named(build, llama_dir, options, problem):
    model, processor = build(llama_dir)
    with pytest.raises(ValueError, match=problem):
        model.generate(**processor(INSTRUCTIONS), **options)


@pytest.mark.parametrize("ids", [torch.tensor([4, 5]), torch.empty(0, 3, dtype=torch.long)], ids=["1-D", "empty"])
def test_ids_are_a_batch(build, llama_dir, ids):
    model, _ = build(llama_dir, latent_source="decoder", decoder_sees_prompt=True)
    for mode in MODES:
        with pytest.raises(ValueError, match=r"decoder_prompt_ids must have the shape \(batch, length\), with a text"):
            model.generate(decoder_prompt_ids=ids, mode=mode)


def test_inputs_that_are_not_unpacked_are_named(build, llama_dir):
    model, processor = build(llama_dir)
    with pytest.raises(
        ValueError, match=r"input_ids must be a tensor; got BatchFeature.* model\.generate\(\*\*processor"
    ):
        model.generate(processor("who sat"))


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_without_a_mask_is_all_text(build, llama_dir, mode):
    model, processor = build(llama_dir, latent_source="both", decoder_sees_prompt=True)
    inputs = processor("who sat")
    whole = {name: part for name, part in inputs.items() if name != "decoder_prompt_mask"}
    assert torch.equal(model.generate(**whole, mode=mode), model.generate(**inputs, mode=mode))
    torch.testing.assert_close(model(**whole).answer_logits, model(**inputs).answer_logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["decoder", "proto_predictor"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_weights_that_are_not_finite_are_refused(build, llama_dir, mode, part, do_sample):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    for parameter in getattr(model, part).parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"are not finite|is NaN"):
        model.generate(**processor(INSTRUCTIONS), mode=mode, do_sample=do_sample)


def test_a_temperature_of_one_is_the_default(build, llama_dir):
    model, processor = build(llama_dir)
    inputs = processor(INSTRUCTIONS)
    plain = model.generate(**inputs)
    for neutral in ({"temperature": 1}, {"temperature": None, "top_p": None}, {"temperature": 1.0, "top_p": 1}):
        assert torch.equal(model.generate(**inputs, **neutral), plain)
        torch.manual_seed(0)
        drawn = model.generate(**inputs, do_sample=True, **neutral)
        torch.manual_seed(0)
        assert torch.equal(drawn, model.generate(**inputs, do_sample=True))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.nbytes)
        return made


def test_drawing_takes_no_more_memory_than_the_logits():
    logits = torch.randn(32, 64, 1000)
    drafts, sampling = logits[:, 1:].max(-1).indices, Sampling(0.7, 0.9)
    with LargestTensor() as memory:
        sampling.pick(logits)
    assert memory.largest < logits.nbytes / 2
    with LargestTensor() as memory:
        accept(drafts, logits[:, 1:].contiguous(), logits, sampling)
    assert memory.largest <= logits.nbytes


def test_reading_drafts_needs_the_prompt(build, llama_dir):
    model, processor = build(llama_dir)
    inputs = processor(INSTRUCTIONS)
    for options in ({"mode": "refine"}, {"mode": "adaptive"}, {"num_candidates": 2}):
        with pytest.raises(ValueError, match="give decoder_prompt_ids"):
            model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
