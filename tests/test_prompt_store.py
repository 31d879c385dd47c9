"""Stored prompts: what is loaded is what reading gives, and every prompt is read once."""

import pytest
import torch
from conftest import ANSWERS, CONTEXTS, INSTRUCTIONS, set_dropout

from modeling_protogen.frozen_decoder import read_prefix
from trainers import prompt_store
from trainers.prompt_store import PromptStore


@pytest.fixture
def reads(monkeypatch):
    """How many prompts were read, call by call."""
    counts, read = [], prompt_store.read_prefix

    def counted(decoder, ids, mask, layers):
        counts.append(len(ids))
        return read(decoder, ids, mask, layers)

    monkeypatch.setattr(prompt_store, "read_prefix", counted)
    return counts


@pytest.mark.parametrize("source", ["encoder", "decoder", "both", "none"])
def test_a_model_learns_the_same_from_stored_prompts(build, decoder_dir, source, tmp_path, reads):
    model, processor = build(decoder_dir, latent_source=source, decoder_sees_prompt=True)
    set_dropout(model, 0.0)
    model.train()
    inputs = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    prompt = {name: value for name, value in inputs.items() if name not in ("labels", "length_labels")}

    def learned():
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.proto_predictor.parameters() if p.grad is not None]

    expected, expected_gradients = learned()
    answers = model.generate(**prompt)
    model.prompt_store = PromptStore(tmp_path / "prompts", model.decoder, model.config.layers_read)
    for _ in range(2):
        loss, gradients = learned()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, expected_gradients)
    assert torch.equal(model.generate(**prompt), answers)
    assert reads == [3]


@pytest.mark.parametrize("layers", [[], [2], [0, 1, 2]], ids=str)
def test_other_batches_and_other_processes_find_what_is_there(build, llama_dir, tmp_path, reads, layers):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    first, second = (PromptStore(tmp_path, model.decoder, layers) for _ in range(2))
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    prompt = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
    first(model.decoder, *prompt, layers)
    alone = processor(INSTRUCTIONS[0])
    cache, states = second(model.decoder, alone["decoder_prompt_ids"], alone["decoder_prompt_mask"], layers)
    expected_cache, expected = read_prefix(model.decoder, *prompt, layers)
    length = alone["decoder_prompt_ids"].shape[1]
    if layers:
        assert states.shape == (1, length, len(layers), 24)
        torch.testing.assert_close(states[0], expected[0, -length:])
        hidden = model.decoder(alone["decoder_prompt_ids"], output_hidden_states=True).hidden_states
        for place, layer in enumerate(layers):
            torch.testing.assert_close(states[0, :, place], hidden[layer][0], rtol=1e-4, atol=1e-5)
    else:
        assert states is None
    for layer, expected_layer in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys[0], expected_layer.keys[0, :, -length:])
        torch.testing.assert_close(layer.values[0], expected_layer.values[0, :, -length:])
    assert reads == [3]
    more = processor([*INSTRUCTIONS[:2], "who is the cat"], [*CONTEXTS[:2], None])
    second(model.decoder, more["decoder_prompt_ids"], more["decoder_prompt_mask"], layers)
    assert reads == [3, 1]
    assert len(PromptStore(tmp_path, model.decoder, layers)) == 4


def test_who_needs_fewer_states_gets_those(build, llama_dir, tmp_path, reads):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    store, inputs = PromptStore(tmp_path, model.decoder, [0, 2]), processor(INSTRUCTIONS, CONTEXTS)
    prompt = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
    assert store(model.decoder, *prompt, [])[1] is None
    both, last = (store(model.decoder, *prompt, layers)[1] for layers in ([0, 2], [2]))
    assert torch.equal(both[:, :, 1:], last)
    assert not torch.equal(both[:, :, :1], last)
    assert reads == [3]
    with pytest.raises(ValueError, match=r"keeps the states of layers \[0, 2\], not those of \[1\]"):
        store(model.decoder, *prompt, [1, 2])


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "prompts.json"])
def test_a_damaged_file_is_named(build, llama_dir, tmp_path, damage):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    prompt = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
    PromptStore(tmp_path, model.decoder, [2])(model.decoder, *prompt, [2])
    (path,) = tmp_path.glob("*.json" if damage == "prompts.json" else "*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content if damage == "flipped bit" else content[:-2])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: .* Remove"):
        PromptStore(tmp_path, model.decoder, [2])(model.decoder, *prompt, [2])
    path.unlink()
    PromptStore(tmp_path, model.decoder, [2])(model.decoder, *prompt, [2])


def test_a_store_is_of_one_decoder_and_its_layers(decoder, tmp_path):
    PromptStore(tmp_path, decoder, [0, 2])
    message = "as another decoder or dtype read them, or other layers: use another folder"
    for layers in ([], [0], [0, 1, 2]):
        with pytest.raises(ValueError, match=message):
            PromptStore(tmp_path, decoder, layers)
    with pytest.raises(ValueError, match=message):
        PromptStore(tmp_path, decoder.bfloat16(), [0, 2])
