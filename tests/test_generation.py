"""One-step decoding against the model's own forward and a plain softmax."""

import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS, stir_slot_adapters, weights_hash
from transformers import GenerationConfig

TOKENS = {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8}
FIELDS = [
    {},
    {"decoder_sees_prompt": True},
    {"decoder_sees_prompt": True, "first_tokens": "decoder"},
    {"decoder_sees_prompt": True, "latent_source": "decoder", "slot_adapter_rank": 2},
    {"latent_source": "decoder"},
    {"arrangement": "e_m", "chunk_size": 3, "max_chunks": 3, "max_answer_length": 8},
    {"decoder_sees_prompt": True, "upsamples_prompt": True, "slot_adapter_rank": 2} | TOKENS,
    {"upsamples_prompt": True, "slot_adapter_rank": 2} | TOKENS,
    {"arrangement": "halves"},
]


def without_eos(model):
    """No token ends an answer."""
    model.config.decoder_config.eos_token_id = None
    model.config.decoder_config.pad_token_id = 0


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_tokens_and_confidence_are_those_of_forward(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    without_eos(model)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    lengths = torch.tensor([3, 8, 1])
    labels = torch.where(torch.arange(8) < lengths[:, None], 5, -100)
    with torch.no_grad():
        logits = model(**batch, labels=labels).answer_logits
    before = weights_hash(model.decoder)
    output = model.generate(**batch, length=lengths, return_dict_in_generate=True)
    assert weights_hash(model.decoder) == before

    assert output.lengths.tolist() == [3, 8, 1]
    probabilities = logits.softmax(-1)
    for row, (tokens, chance) in enumerate(
        zip(logits.argmax(-1).split([3, 8, 1]), probabilities.max(-1).values.split([3, 8, 1]), strict=True)
    ):
        n = len(tokens)
        assert output.sequences[row, :n].tolist() == tokens.tolist()
        assert output.sequences[row, n:].tolist() == [0] * (8 - n)
        torch.testing.assert_close(output.token_confidences[row, :n], chance)
        assert (output.token_confidences[row, n:] == 0).all()
        torch.testing.assert_close(output.confidences[row], chance.prod() ** (1 / n))
    assert torch.equal(model.generate(**batch, length=lengths), output.sequences)


@pytest.mark.parametrize("fields", FIELDS[:-1], ids=str)
def test_a_batch_equals_its_texts_alone(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **fields)
    stir_slot_adapters(model)
    output = model.generate(**processor(INSTRUCTIONS, CONTEXTS), return_dict_in_generate=True)
    for row, (instruction, context) in enumerate(zip(INSTRUCTIONS, CONTEXTS, strict=True)):
        alone = model.generate(**processor(instruction, context), return_dict_in_generate=True)
        n = alone.lengths.item()
        assert output.lengths[row] == n
        assert output.sequences[row, :n].tolist() == alone.sequences[0].tolist()
        torch.testing.assert_close(output.predicted_lengths[row], alone.predicted_lengths[0])


@pytest.mark.parametrize(("latent_source", "own"), [("encoder", 1), ("none", 1), ("decoder", 2), ("both", 2)])
def test_an_answer_begins_with_the_decoders_own_tokens_or_with_those_of_slots(build, decoder_dir, latent_source, own):
    written = {}
    for first_tokens in ("decoder", "slots"):
        fields = {"decoder_sees_prompt": True, "latent_source": latent_source, "first_tokens": first_tokens}
        model, processor = build(decoder_dir, **fields)
        without_eos(model)
        batch = processor(INSTRUCTIONS, CONTEXTS)
        written[first_tokens] = model.generate(**batch, length=8)[:, :own]
    prompt = {"input_ids": batch["decoder_prompt_ids"], "attention_mask": batch["decoder_prompt_mask"]}
    greedy = model.decoder.generate(**prompt, max_new_tokens=own, do_sample=False)[:, -own:]
    assert torch.equal(written["decoder"], greedy)
    assert not torch.equal(written["slots"], greedy), "untrained slots write something else"


@torch.no_grad()
def test_what_follows_a_drawn_first_token_was_predicted_after_it(build, decoder_dir):
    model, processor = build(decoder_dir, decoder_sees_prompt=True, latent_source="decoder", first_tokens="decoder")
    without_eos(model)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    most_likely = model.generate(**batch, length=8)
    torch.manual_seed(1)
    output = model.generate(**batch, length=8, do_sample=True, return_dict_in_generate=True)
    assert not torch.equal(output.sequences[:, 0], most_likely[:, 0])
    for row, tokens in enumerate(output.sequences):
        prompt = processor(INSTRUCTIONS[row], CONTEXTS[row])["decoder_prompt_ids"]
        p = model.decoder(torch.cat([prompt, tokens[None, :1]], dim=1)).logits[0, -2:].softmax(-1)
        torch.testing.assert_close(output.token_confidences[row, :2], p[[0, 1], tokens[:2]], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("latent_source", "passes"), [("encoder", 1), ("decoder", 2)])
def test_prompt_and_slots_are_read_in_one_pass_where_the_encoder_is_the_source(
    build, decoder_dir, latent_source, passes
):
    fields = {"decoder_sees_prompt": True, "upsamples_prompt": True, "latent_source": latent_source} | TOKENS
    model, processor = build(decoder_dir, **fields)
    without_eos(model)
    calls = []
    model.decoder.base_model.register_forward_hook(lambda *_: calls.append(1))
    batch = processor(INSTRUCTIONS, CONTEXTS)
    model.generate(**batch)
    assert len(calls) == passes
    if latent_source == "encoder":
        for mode in ("adaptive", "verified"):
            with pytest.raises(
                ValueError, match=f"mode={mode} writes block after block, and this model .* use one_step"
            ):
                model.generate(**batch, mode=mode)
            one_by_one = model.generate(**batch, mode=mode, block_size=1, max_new_tokens=8)
            prompt = {"input_ids": batch["decoder_prompt_ids"], "attention_mask": batch["decoder_prompt_mask"]}
            greedy = model.decoder.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, -8:]
            assert torch.equal(one_by_one, greedy)
        drawn = model.generate(**batch, mode="refine", do_sample=True, num_return_sequences=2)
        assert len(drawn) == 2 * len(INSTRUCTIONS)
        assert len(model.generate(**batch, num_candidates=2)) == len(INSTRUCTIONS)


def test_answers_are_cut_after_eos(build, llama_dir):
    model, processor = build(llama_dir)
    without_eos(model)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    whole = model.generate(**batch, length=8)
    eos = whole[0, 2].item()
    model.config.decoder_config.eos_token_id = [eos, 10_000]
    model.config.decoder_config.pad_token_id = 7
    output = model.generate(**batch, length=8, return_dict_in_generate=True)
    for row in range(3):
        tokens = whole[row].tolist()
        n = tokens.index(eos) + 1 if eos in tokens else 8
        assert output.lengths[row] == n
        assert output.sequences[row].tolist() == (tokens[:n] + [7] * 8)[: output.sequences.shape[1]]


def test_lengths_come_from_the_predicted_distribution(build, llama_dir):
    model, processor = build(llama_dir)
    without_eos(model)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    with torch.no_grad():
        prediction = model(**batch)
    mean, sigma = prediction.log_length_mean, prediction.log_length_variance.sqrt()
    for k in (-1.0, 0.0, 0.5):
        output = model.generate(**batch, num_length_sigmas=k, return_dict_in_generate=True)
        expected = (mean + k * sigma).exp().round().clamp(1, 8).long()
        assert output.lengths.tolist() == expected.tolist()
        torch.testing.assert_close(output.predicted_lengths, mean.exp())
        torch.testing.assert_close(output.length_sigmas, mean.exp() * sigma)


@pytest.mark.parametrize("length", [0, 9, -1, torch.tensor([1, 2, 9])])
def test_impossible_lengths_are_refused(build, llama_dir, length):
    model, processor = build(llama_dir)
    with pytest.raises(ValueError, match=r"length must lie in 1\.\.8 tokens"):
        model.generate(**processor(INSTRUCTIONS), length=length)


def test_a_length_stays_below_the_most_tokens(build, llama_dir):
    model, processor = build(llama_dir)
    without_eos(model)
    inputs = processor(INSTRUCTIONS)
    whole = model.generate(**inputs, length=6)
    assert torch.equal(model.generate(**inputs, length=6, max_new_tokens=4), whole[:, :4])
    lengths = torch.tensor([2, 6, 5])
    output = model.generate(**inputs, length=lengths, max_length=5, return_dict_in_generate=True)
    assert output.lengths.tolist() == [2, 5, 5]


def test_options_of_other_decoders_are_not_swallowed(build, llama_dir):
    model, processor = build(llama_dir)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(**processor(INSTRUCTIONS), num_beams=5)
    with pytest.raises(ValueError, match=r"output_scores is not for .*answer_logits of a call of the model"):
        model.generate(**processor(INSTRUCTIONS), output_scores=True)
    with pytest.raises(ValueError, match="num_beams is not for mode=one_step, .*; mode=one_step has num_candidates"):
        model.generate(**processor(INSTRUCTIONS), generation_config=GenerationConfig(num_beams=3))
    batch = processor(INSTRUCTIONS)
    output = model(**batch)
    with pytest.raises(ValueError, match="proto_tokens are not for mode=verified"):
        model.generate(**batch, mode="verified", proto_tokens=(output.e, output.m))
    with pytest.raises(ValueError, match="length is not for mode=verified, which takes block_size"):
        model.generate(**processor(INSTRUCTIONS), mode="verified", length=5)


def test_long_answers_take_the_confidence_path_in_blocks(build, llama_dir):
    from modeling_protogen.sampling import log_normalizer

    logits = torch.randn(300, 11, dtype=torch.bfloat16) * 5
    torch.testing.assert_close(log_normalizer(logits, rows=128), logits.float().logsumexp(-1))


def test_uncertain_answers_are_not_given(build, llama_dir):
    model, processor = build(llama_dir)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    whole = model.generate(**batch, return_dict_in_generate=True)
    threshold = whole.uncertainties.median().item()
    output = model.generate(**batch, abstain_above=threshold, return_dict_in_generate=True)
    assert output.abstained.tolist() == (whole.uncertainties > threshold).tolist()
    assert output.abstained.sum() == 1
    pad = model.config.answer_pad_token_id
    for row, abstained in enumerate(output.abstained):
        expected = [pad] * whole.sequences.shape[1] if abstained else whole.sequences[row].tolist()
        assert output.sequences[row].tolist() == expected
        assert output.lengths[row] == (0 if abstained else whole.lengths[row])
    assert torch.equal(model.generate(**batch, abstain_above=threshold), output.sequences)
    torch.testing.assert_close(output.uncertainties, whole.uncertainties)


def test_an_answer_of_unknown_uncertainty_is_not_given(build, llama_dir):
    model, processor = build(llama_dir, uncertainty_score="predicted_error")
    torch.nn.init.constant_(model.proto_predictor.error.projection.weight, torch.nan)
    output = model.generate(**processor(INSTRUCTIONS), abstain_above=1.0, return_dict_in_generate=True)
    assert output.uncertainties.isnan().all()
    assert output.abstained.all()


def test_the_longest_lengths_are_cut(build, llama_dir):
    model, processor = build(llama_dir)
    without_eos(model)
    assert model.clamp_lengths(torch.tensor([1e20, torch.inf, 0, 2.6])).tolist() == [8, 8, 1, 3]
    assert model.generate(**processor("who sat"), num_length_sigmas=1e30).shape == (1, 8)
    with pytest.raises(ValueError, match="a predicted length is NaN"):
        model.clamp_lengths(torch.tensor([3.0, torch.nan]))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"decoder_sees_prompt": True, "latent_source": "decoder", "upsamples_prompt": True}
        | {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8},
    ],
    ids=["no durations", "durations"],
)
@torch.no_grad()
def test_the_score_of_a_sequence_is_that_of_all_its_tokens_and_durations(build, llama_dir, fields):
    model, processor = build(llama_dir, **fields)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    output = model.generate(**batch, length=6, return_dict_in_generate=True, output_uncertainty_scores=True)
    durations = model.predict(**batch).duration_logits
    for row, length in enumerate(output.lengths.tolist()):
        right = output.token_confidences[row, :length].prod()
        if fields:
            p = durations[row].softmax(-1).max(-1).values
            right = right * p[batch["decoder_prompt_mask"][row].bool()].prod()
        assert output.uncertainty_scores["sequence"][row].item() == pytest.approx(1 - right.item(), abs=1e-6)
    assert (durations is None) == (not fields)


def test_candidates_are_of_the_instruction_that_they_answer(build, llama_dir):
    """Also what is not used to write them: the scores of the chosen ones are those of their instructions."""
    fields = {"decoder_sees_prompt": True, "latent_source": "decoder", "upsamples_prompt": True}
    model, processor = build(llama_dir, **fields, arrangement="e_only", chunk_size=1, max_chunks=8)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    options = {"length": 6, "return_dict_in_generate": True, "output_uncertainty_scores": True}
    plain = model.generate(**batch, **options)
    ranked = model.generate(**batch, **options, num_candidates=3, candidate_noise=0)
    assert torch.equal(ranked.sequences, plain.sequences)
    for name, scores in plain.uncertainty_scores.items():
        torch.testing.assert_close(ranked.uncertainty_scores[name], scores, msg=name)
