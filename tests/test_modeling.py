"""The model against slow, direct computations with the same weights."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ANSWERS,
    CONTEXTS,
    INSTRUCTIONS,
    adapted_decoder,
    save_decoder,
    save_encoder,
    stir_slot_adapters,
    weights_hash,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, RobertaModel

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor, frozen_decoder, objectives
from modeling_protogen.frozen_decoder import answer_logits, read_prefix
from modeling_protogen.objectives import reconstruction_loss
from modeling_protogen.proto_tokens import build_layout, fill_slots
from trainers.data import batch_durations

VARIANTS = [
    {},
    {"arrangement": "e_m"},
    {"arrangement": "e_m", "num_e_tokens": 2, "chunk_size": 3, "max_chunks": 3},
    {"arrangement": "interleaved", "sink": "none"},
    {"arrangement": "halves", "chunk_size": 4, "max_chunks": 2},
    {"arrangement": "e_only"},
    {"m_scope": "shared"},
    {"m_scope": "fixed"},
    {"m_scope": "per_category", "categories": ["open", "closed"]},
    {"predictor_dim": 128, "num_source_layers": 2, "num_query_layers": 2},
    {"slot_adapter_rank": 2},
    {"latent_source": "decoder"},
    {"latent_source": "both", "first_tokens": "decoder", "slot_adapter_rank": 2, "sink": "none"},
    *(
        {"decoder_sees_prompt": True, "first_tokens": first_tokens} | fields
        for first_tokens in ("slots", "decoder")
        for fields in (
            {},
            {"chunk_size": 3, "max_chunks": 3},
            {"latent_source": "none"},
            {"latent_source": "both"},
            {"latent_source": "both", "decoder_layers_read": [2], "slot_adapter_rank": 2},
            {"latent_source": "decoder", "chunk_size": 3, "max_chunks": 3},
            {"latent_source": "decoder", "arrangement": "e_m", "slot_adapter_rank": 2},
        )
    ),
    *(
        {"decoder_sees_prompt": True, "latent_source": source, "upsamples_prompt": True} | fields
        for source in ("encoder", "decoder", "both")
        for fields in (
            {"arrangement": "e_only", "chunk_size": 1, "max_chunks": 8},
            {"arrangement": "e_mN", "chunk_size": 3, "max_chunks": 3, "slot_adapter_rank": 2},
        )
    ),
    {"upsamples_prompt": True, "arrangement": "e_only", "chunk_size": 1, "max_chunks": 8},
]


def batch_for(model, processor):
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    if model.config.m_scope == "per_category":
        batch["category_ids"] = torch.tensor([0, 1, 1])
    return batch


def slots_of_one_text(config, e, m, length):
    """A text's proto-tokens one after another, and the slots that predict: loops, straight from the definition."""
    slots, predicting = [], []
    for start in range(0, length, config.chunk_size):
        chunk, tokens = start // config.chunk_size, min(config.chunk_size, length - start)
        if config.arrangement == "e_m":
            *unguided, last = list(e[chunk])
            guided = [last] + [m[chunk]] * (tokens - 1)
        elif config.arrangement == "e_mN":
            unguided, guided = list(e[chunk]), [m[chunk]] * tokens
        elif config.arrangement == "interleaved":
            unguided, guided = [], [m[chunk] if t % 2 else e[chunk, 0] for t in range(tokens)]
        elif config.arrangement == "halves":
            unguided, guided = [], [e[chunk, 0] if t < tokens / 2 else m[chunk] for t in range(tokens)]
        else:
            unguided, guided = [], [e[chunk, 0]] * tokens
        predicting += [False] * len(unguided) + [True] * len(guided)
        slots += unguided + guided
    return torch.stack(slots), torch.tensor(predicting)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_logits_equal_one_text_at_a_time(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **fields)
    config, batch = model.config, batch_for(model, processor)
    stir_slot_adapters(model)
    decoder, adapted = adapted_decoder(model)
    with torch.no_grad():
        output = model(**batch)
        expected = []
        for row, answer in enumerate(ANSWERS):
            one = processor(INSTRUCTIONS[row], CONTEXTS[row])
            category = batch["category_ids"][row : row + 1] if "category_ids" in batch else None
            prediction = model.predict(**one, category_ids=category)
            length = len(answer.split()) + 1
            slots, predicting = slots_of_one_text(config, prediction.e[0], prediction.m[0], length)
            prefix = one["decoder_prompt_ids"][0] if config.decoder_sees_prompt else torch.tensor([1])
            if config.sink == "none":
                prefix = prefix[:0]
            own = 0
            if config.decoder_sees_prompt and config.first_tokens == "decoder":
                own = 1  # The prompt's last token predicts the answer's first.
                if config.latent_source in ("decoder", "both"):  # Which then stands after it and predicts the second.
                    own = 2
                    for layer in adapted:
                        layer.start = len(prefix)
                    first = decoder(prefix[None]).logits[0, -1].argmax()
                    prefix = torch.cat([prefix, first[None]])
            predicting = torch.cat([torch.zeros(len(prefix), dtype=torch.bool), predicting])
            predicting[predicting.nonzero()[:own]] = False
            predicting[len(prefix) - own : len(prefix)] = True
            if length < own:
                predicting[len(prefix) - own + length :] = False
            for layer in adapted:
                layer.start = len(prefix)
            inputs = torch.cat([decoder.get_input_embeddings()(prefix), slots])
            expected.append(decoder(inputs_embeds=inputs[None]).logits[0, predicting])
    torch.testing.assert_close(output.answer_logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert output.lengths.tolist() == [len(answer.split()) + 1 for answer in ANSWERS]


@pytest.mark.parametrize("decoder_dir", ["llama", "neox", "mistral"], indirect=True)
@pytest.mark.parametrize("num_autoregressive_tokens", [0, 1, 2])
@pytest.mark.parametrize("group_tokens", [1024, 8])
def test_reusing_the_prompts_cache_changes_neither_logits_nor_gradients(
    build, decoder_dir, group_tokens, num_autoregressive_tokens, monkeypatch
):
    model, processor = build(decoder_dir)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    prompt = batch["decoder_prompt_ids"], batch["decoder_prompt_mask"]
    assert (prompt[1].sum(1) < prompt[1].shape[1]).any(), "the prompts must be ragged"
    monkeypatch.setattr(frozen_decoder, "GROUP_TOKENS", group_tokens)
    assert len(frozen_decoder.bucket_by_length(prompt[1])) == (1 if group_tokens > 100 else 3)
    layout = build_layout(torch.tensor([5, 2, 8]), "e_mN", chunk_size=8, num_chunks=1)
    results = []
    for cached in (False, True):
        e = torch.linspace(-1, 1, 3 * 24).reshape(3, 1, 1, 24).requires_grad_()
        m = torch.linspace(1, -2, 3 * 24).reshape(3, 1, 24).requires_grad_()
        cache = read_prefix(model.decoder, *prompt, [])[0] if cached else None
        logits = answer_logits(
            model.decoder, fill_slots(layout, e, m), layout, *prompt, num_autoregressive_tokens, cache
        )
        logits.square().mean().backward()
        results.append((logits.detach(), e.grad, m.grad))
        assert not cached or cache.get_seq_length() == prompt[0].shape[1]
    for joined, cached in zip(*results, strict=True):
        torch.testing.assert_close(joined, cached, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_gradients_reach_all_that_is_trained_and_nothing_else(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **fields)
    model.train()
    batch = batch_for(model, processor)
    if model.config.upsamples_prompt:
        batch["durations"] = batch_durations(batch, lambda before, after: False)
    model(**batch).loss.backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, _ in model.named_parameters() if name.startswith("decoder.")} <= frozen
    assert ("proto_predictor.m_table.weight" in frozen) == (model.config.m_scope == "fixed")
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert all(name.startswith("encoder.pooler") for name in without), without
    # Through the decoder the gradient flows down to the encoder's first layer; its words are frozen.
    if model.encoder is not None:
        assert "encoder.embeddings.word_embeddings.weight" in frozen
        assert model.encoder.embeddings.position_embeddings.weight.grad.abs().sum() > 0


def test_losses_equal_their_formulas(build, llama_dir):
    model, processor = build(llama_dir)
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    output = model(**batch)
    start, means = 0, []
    for row in batch["labels"]:
        tokens = row[row != -100]
        log_probabilities = output.answer_logits[start : start + len(tokens)].log_softmax(-1)
        means.append(-log_probabilities[range(len(tokens)), tokens].mean())
        start += len(tokens)
    torch.testing.assert_close(output.reconstruction_loss, torch.stack(means).mean())

    error = batch["length_labels"].log() - output.log_length_mean
    nll = (error**2 / output.log_length_variance + output.log_length_variance.log()) / 2
    torch.testing.assert_close(output.length_nll, nll.mean())
    wrong, start = [], 0
    for row in batch["labels"]:
        tokens = row[row != -100]
        found = output.answer_logits[start : start + len(tokens)].argmax(-1)
        wrong.append((found != tokens).float().mean())
        start += len(tokens)
    error = torch.stack(wrong) - output.error_mean
    nll = (error**2 / output.error_variance + output.error_variance.log()) / 2
    torch.testing.assert_close(output.error_nll, nll.mean())
    expected = output.reconstruction_loss + 0.1 * output.length_nll + 0.1 * output.error_nll
    torch.testing.assert_close(output.loss, expected)


def test_the_loss_in_small_slices_equals_the_loss_at_once(monkeypatch):
    torch.manual_seed(0)
    labels = torch.tensor([[3, 1, -100], [0, 2, 4]])
    results = []
    for limit in (2**22, 7):
        monkeypatch.setattr(objectives, "MAX_FLOAT_LOGITS", limit)
        logits = torch.linspace(-3, 2, 25).sin().reshape(5, 5).requires_grad_()
        reconstruction_loss(logits, labels).backward()
        results.append(logits.grad)
    expected = torch.linspace(-3, 2, 25).sin().reshape(5, 5).requires_grad_()
    nll = -expected.log_softmax(-1)[range(5), [3, 1, 0, 2, 4]]
    (nll[:2].mean() / 2 + nll[2:].mean() / 2).backward()
    for grad in results:
        torch.testing.assert_close(grad, expected.grad)


def test_no_float32_copy_of_all_logits(monkeypatch):
    monkeypatch.setattr(objectives, "MAX_FLOAT_LOGITS", 8 * 1000)
    logits = torch.randn(64, 1000).bfloat16().requires_grad_()
    labels = torch.randint(1000, (4, 16))
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype == torch.float32:
                sizes.append(output.numel())
            return output

    with Watch():
        reconstruction_loss(logits, labels).backward()
    assert logits.grad is not None
    assert max(sizes) == 8 * 1000


def test_a_model_without_an_encoder(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, decoder_sees_prompt=True, latent_source="decoder", thin=True)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    assert set(batch) == {"decoder_prompt_ids", "decoder_prompt_mask"}
    assert model.encoder is None
    assert not any(name.startswith("encoder.") for name in model.state_dict())
    # Left padding changes nothing.
    joined = model.predict(**batch)
    for row, (instruction, context) in enumerate(zip(INSTRUCTIONS, CONTEXTS, strict=True)):
        alone = model.predict(**processor(instruction, context))
        torch.testing.assert_close(joined.e[row], alone.e[0], rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path)
    again = ProtoGenProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(**again(INSTRUCTIONS, CONTEXTS)), model.generate(**batch))


def test_length_variance_is_bounded_and_its_gradient_lives(build, llama_dir):
    model, processor = build(llama_dir)
    for bias in (-30.0, 30.0):
        with torch.no_grad():
            model.proto_predictor.length.projection.bias[1] = bias
        output = model(**processor(INSTRUCTIONS))
        low, high = model.config.log_length_variance_range
        log_variance = output.log_length_variance.log()
        assert (log_variance > low - 1e-4).all()
        assert (log_variance < high + 1e-4).all()


def test_without_labels_the_answer_has_its_predicted_length(build, llama_dir):
    model, processor = build(llama_dir)
    output = model(**processor(INSTRUCTIONS))
    expected = output.log_length_mean.exp().round().clamp(1, 8).long()
    assert output.lengths.tolist() == expected.tolist()
    assert len(output.answer_logits) == expected.sum()
    assert output.loss is None


def test_outputs_are_tuples_where_asked_for(build, llama_dir):
    model, processor = build(llama_dir)
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    for one, other in zip(model(**batch, return_dict=False), model(**batch).to_tuple(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_input_embeddings_are_those_of_what_reads_the_instruction(build, llama_dir):
    model, _ = build(llama_dir)
    assert model.get_input_embeddings() is model.encoder.get_input_embeddings()
    other = torch.nn.Embedding(7, 32)
    model.set_input_embeddings(other)
    assert model.encoder.get_input_embeddings() is other
    model, _ = build(llama_dir, latent_source="decoder")
    assert model.get_input_embeddings() is model.decoder.get_input_embeddings()
    # A resized model was saved and could not be loaded.
    with pytest.raises(ValueError, match="word embeddings are frozen"):
        model.resize_token_embeddings(50)


def test_building_keeps_pretrained_weights(build, encoder_dir, decoder_dir):
    model, _ = build(decoder_dir)
    assert weights_hash(model.decoder) == weights_hash(AutoModelForCausalLM.from_pretrained(decoder_dir))
    assert weights_hash(model.encoder) == weights_hash(AutoModel.from_pretrained(encoder_dir))


def test_fresh_proto_tokens_are_as_large_as_fitted_ones(build, tmp_path):
    model, processor = build(save_decoder(tmp_path, "llama", hidden_size=96))
    output = model(**processor(INSTRUCTIONS))
    std = model.decoder.get_input_embeddings().weight.std().item()
    for vectors in (output.e, output.m):
        assert 0.5 * 16 * std < vectors.std().item() < 1.5 * 16 * std


def test_the_decoder_stays_frozen_and_in_eval_mode(build, llama_dir):
    model, _ = build(llama_dir)
    model.requires_grad_(True)
    model.train()
    assert model.encoder.training
    assert not model.decoder.training
    assert not any(p.requires_grad for p in model.decoder.parameters())


def test_missing_inputs_are_named(build, llama_dir):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    batch = processor(INSTRUCTIONS)
    with pytest.raises(ValueError, match="give decoder_prompt_ids"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    model, processor = build(llama_dir, m_scope="per_category", categories=["open"])
    with pytest.raises(ValueError, match="per_category needs category_ids"):
        model(**processor(INSTRUCTIONS))


def test_a_roberta_encoder_reads_its_whole_window_and_no_more(llama_dir, tmp_path):
    """RoBERTa's positions start after its padding id."""
    save_encoder(tmp_path, RobertaModel, max_position_embeddings=22)
    names = str(tmp_path), str(llama_dir)
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(*names)
    assert processor.max_input_length == 20
    model = ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(*names, chunk_size=8)
    batch = processor("who sat", "the cat " * 20)
    assert batch["input_ids"].shape[1] == 20
    assert model(**batch).answer_logits.isfinite().all()


def test_the_first_layers_of_an_encoder(build, llama_dir, tmp_path):
    whole, processor = build(llama_dir)
    cut, _ = build(llama_dir, encoder_num_layers=1)
    cut.save_pretrained(tmp_path)
    batch = {name: value for name, value in processor(INSTRUCTIONS).items() if "decoder" not in name}
    expected = whole.encoder(**batch, output_hidden_states=True).hidden_states[1]
    reloaded = ProtoGenForConditionalGeneration.from_pretrained(tmp_path).eval()
    for model in (cut, reloaded):
        torch.testing.assert_close(model.encoder(**batch).last_hidden_state, expected)


def test_bfloat16_decoder_with_float32_heads(build, llama_dir):
    model, processor = build(llama_dir, decoder_dtype=torch.bfloat16)
    assert model.decoder.dtype == torch.bfloat16
    output = model(**processor(INSTRUCTIONS, None, ANSWERS))
    assert output.e.dtype == torch.float32
    exact, _ = build(llama_dir)
    reference = exact(**processor(INSTRUCTIONS, None, ANSWERS))
    assert F.cosine_similarity(output.answer_logits.float(), reference.answer_logits, dim=-1).min() > 0.99


def test_rows_of_like_lengths_give_the_same_states(build, decoder_dir, monkeypatch):
    model, processor = build(decoder_dir)
    batch = processor([*INSTRUCTIONS, "who"], [*CONTEXTS, None])
    ids, mask = batch["decoder_prompt_ids"], batch["decoder_prompt_mask"]
    cache, states = read_prefix(model.decoder, ids, mask, [0, 2])
    assert states.shape[2] == 2
    assert len(frozen_decoder.bucket_by_length(mask)) == 1

    monkeypatch.setattr(frozen_decoder, "GROUP_TOKENS", 2 * mask.sum(1).median().item())
    groups = frozen_decoder.bucket_by_length(mask)
    assert len(groups) > 1
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == [0, 1, 2, 3]
    for (rows, length), (longer_rows, _) in pairwise(groups):
        assert mask[rows].sum(1).max() == length <= mask[longer_rows].sum(1).min()
        assert len(rows) * length <= frozen_decoder.GROUP_TOKENS
    grouped_cache, grouped = read_prefix(model.decoder, ids, mask, [0, 2])
    torch.testing.assert_close(grouped[mask.bool()], states[mask.bool()], atol=1e-5, rtol=1e-4)
    for layer, expected in zip(grouped_cache.layers, cache.layers, strict=True):
        is_text = mask.bool()[:, None].expand(layer.keys.shape[:3])
        torch.testing.assert_close(layer.keys[is_text], expected.keys[is_text], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.values[is_text], expected.values[is_text], atol=1e-5, rtol=1e-4)


def test_the_encoder_reads_rows_of_like_lengths_with_the_same_states_and_gradients(build, decoder_dir, monkeypatch):
    model, processor = build(decoder_dir)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (mask.sum(1) < mask.shape[1]).any(), "the instructions must be ragged"
    found = []
    for group_tokens in (512, 1):
        monkeypatch.setattr(frozen_decoder, "GROUP_TOKENS", group_tokens)
        model.zero_grad()
        states = model.encode(ids, mask)[0]
        states[mask.bool()].square().sum().backward()
        found.append((states[mask.bool()], *(p.grad for p in model.encoder.parameters() if p.grad is not None)))
    for joined, grouped in zip(*found, strict=True):
        torch.testing.assert_close(joined, grouped, rtol=1e-4, atol=1e-5)
