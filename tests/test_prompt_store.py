"""Stored prompts: what is loaded is what reading gives, and every prompt is read once."""

import pytest
import torch
from conftest import ANSWERS, CONTEXTS, INSTRUCTIONS, save_decoder
from transformers import AutoModelForCausalLM

from modeling_protogen.prefix import read_prefix
from trainers import prompt_store
from trainers.prompt_store import PromptStore


@pytest.fixture
def reads(monkeypatch):
    """How many prompts were read, call by call."""
    counts, read = [], prompt_store.read_prefix

    def counted(decoder, ids, mask):
        counts.append(len(ids))
        return read(decoder, ids, mask)

    monkeypatch.setattr(prompt_store, "read_prefix", counted)
    return counts


@pytest.mark.parametrize("source", ["encoder", "decoder", "both", "none"])
def test_a_model_learns_the_same_from_stored_prompts(build, decoder_dir, source, tmp_path, reads):
    model, processor = build(decoder_dir, latent_source=source, decoder_sees_prompt=True)
    model.train()
    if model.encoder is not None:
        model.encoder.eval()  # no dropout
    inputs = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    prompt = {name: value for name, value in inputs.items() if name not in ("labels", "length_labels")}

    def learned():
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.proto_predictor.parameters() if p.grad is not None]

    expected, expected_gradients = learned()
    answers = model.generate(**prompt)
    model.read_prompt = PromptStore(tmp_path / "prompts", model.decoder)
    for _ in range(2):
        loss, gradients = learned()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, expected_gradients)
    assert torch.equal(model.generate(**prompt), answers)
    assert reads == [3]


def test_other_batches_and_other_processes_find_what_is_there(build, llama_dir, tmp_path, reads):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    first, second = PromptStore(tmp_path, model.decoder), PromptStore(tmp_path, model.decoder)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    prompt = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
    first(model.decoder, *prompt)
    alone = processor(INSTRUCTIONS[0])
    cache, states = second(model.decoder, alone["decoder_prompt_ids"], alone["decoder_prompt_mask"])
    expected_cache, expected = read_prefix(model.decoder, *prompt)
    length = states.shape[1]
    torch.testing.assert_close(states[0], expected[0, -length:])
    for layer, expected_layer in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys[0], expected_layer.keys[0, :, -length:])
    assert reads == [3]
    more = processor([*INSTRUCTIONS[:2], "who is the cat"], [*CONTEXTS[:2], None])
    second(model.decoder, more["decoder_prompt_ids"], more["decoder_prompt_mask"])
    assert reads == [3, 1]
    assert len(PromptStore(tmp_path, model.decoder)) == 4


def test_a_store_is_of_one_decoder(decoder, tmp_path):
    PromptStore(tmp_path, decoder)
    with pytest.raises(ValueError, match="as another decoder, or dtype, read them: use another folder"):
        PromptStore(tmp_path, decoder.bfloat16())
    sliding = AutoModelForCausalLM.from_pretrained(save_decoder(tmp_path / "mistral", "mistral"))
    with pytest.raises(ValueError, match="layers attend to all positions; leave it out"):
        PromptStore(tmp_path / "other", sliding)
