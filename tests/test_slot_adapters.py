"""Slot adapters: they act at slots, and real tokens take the very path that they take without them."""

import copy

import pytest
import torch
from conftest import ANSWERS, CONTEXTS, INSTRUCTIONS, set_dropout, stir_slot_adapters, weights_hash, word_tokenizer
from safetensors import safe_open
from test_verified_decoding import MORE, MORE_CONTEXTS, greedy, verified, without_eos
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel

from modeling_protogen import ProtoGenForConditionalGeneration
from modeling_protogen.frozen_decoder import joined_inputs
from modeling_protogen.proto_tokens import fill_slots
from modeling_protogen.slot_adapters import LowRank, SlotAdapters, slots_at_the_end
from trainers.data import Example, ProtoGenCollator
from trainers.protogen_trainer import ProtoGenTrainer
from trainers.training_args import ProtoGenTrainingArguments

ADAPTED = {"decoder_sees_prompt": True, "slot_adapter_rank": 2}


def one_pass(model, inputs, lengths):
    """Logits at all positions of `[prompt][slots]`, and the keys and values; and how many slots there are."""
    prediction = model.predict(**inputs)
    layout = model.layout(torch.tensor(lengths), prediction.e.shape[1])
    slots = fill_slots(layout, prediction.e, prediction.m)
    prompt = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
    joined, _ = joined_inputs(model.decoder, slots, layout, *prompt)
    cache = DynamicCache()
    with slots_at_the_end(slots.shape[1]):
        logits = model.decoder(**joined, past_key_values=cache, use_cache=True).logits
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    return [logits, *(part.transpose(1, 2).flatten(2) for part in parts)], slots.shape[1]


@pytest.mark.parametrize("latent_source", ["encoder", "decoder"])
@torch.no_grad()
def test_real_tokens_are_bit_for_bit_as_without(build, decoder_dir, latent_source):
    model, processor = build(decoder_dir, **ADAPTED, latent_source=latent_source)
    inputs = processor(INSTRUCTIONS, CONTEXTS)
    found = []
    for stirred in (False, True):
        if stirred:
            stir_slot_adapters(model)
        tables, num_slots = one_pass(model, inputs, [8, 3, 5])
        is_text = inputs["decoder_prompt_mask"].bool()
        found.append([(table[:, :-num_slots][is_text], table[:, -num_slots:]) for table in tables])
    plain, _ = build(decoder_dir, decoder_sees_prompt=True, latent_source=latent_source)
    assert not any(module._forward_hooks for module in plain.decoder.modules())
    # The same proto-tokens: adapters are drawn after all else that is.
    without = one_pass(plain, inputs, [8, 3, 5])[0]
    for (text, slots), (stirred_text, stirred_slots), bare in zip(*found, without, strict=True):
        assert torch.equal(stirred_text, text)
        assert torch.equal(bare[:, :-num_slots][is_text], text)
        assert not torch.allclose(stirred_slots, slots, atol=1e-2)


@torch.no_grad()
def test_fresh_adapters_change_nothing_and_others_the_answers(build, decoder_dir):
    model, processor = build(decoder_dir, **ADAPTED)
    plain, _ = build(decoder_dir, decoder_sees_prompt=True)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("slot_adapters.")})
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    expected = plain(**batch).answer_logits
    assert torch.equal(model(**batch).answer_logits, expected)
    assert all((low_rank.up.weight == 0).all() for low_rank in model.slot_adapters.maps.values())
    assert all(low_rank.down.weight.std() > 0 for low_rank in model.slot_adapters.maps.values())
    stir_slot_adapters(model)
    assert not torch.allclose(model(**batch).answer_logits, expected, atol=1e-2)
    # Each of them has a part in it.
    for low_rank in model.slot_adapters.maps.values():
        stirred = model(**batch).answer_logits
        low_rank.up.weight.zero_()
        assert not torch.equal(model(**batch).answer_logits, stirred)
    assert torch.equal(model(**batch).answer_logits, expected)


def test_there_is_one_beside_each_linear_layer_but_the_head(build, decoder_dir):
    model, _ = build(decoder_dir, **ADAPTED)
    layers = {name for name, module in model.decoder.base_model.named_modules() if isinstance(module, nn.Linear)}
    assert {key.replace("-", ".") for key in model.slot_adapters.maps} == layers
    assert len(layers) == 2 * (7 if model.config.decoder_config.model_type == "llama" else 4)
    assert not model.decoder.get_output_embeddings()._forward_hooks


def test_layers_that_have_one_are_chosen_by_their_names(build, decoder_dir):
    whole, _ = build(decoder_dir, **ADAPTED)
    names = [key.replace("-", ".") for key in whole.slot_adapters.maps]
    last = names[-1].rpartition(".")[2]
    for modules, expected in (([last], [n for n in names if n.endswith(last)]), ([names[-1]], names[-1:])):
        model, processor = build(decoder_dir, **ADAPTED, slot_adapter_modules=modules)
        assert [key.replace("-", ".") for key in model.slot_adapters.maps] == expected
        stir_slot_adapters(model)
        batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
        beside = model(**batch).answer_logits
        model.eval().fuse_slot_adapters()
        torch.testing.assert_close(model(**batch).answer_logits, beside, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"none of this decoder's linear layers is called proj; they are called .*"):
        build(decoder_dir, **ADAPTED, slot_adapter_modules=["proj"])


@torch.no_grad()
def test_outside_of_its_passes_the_decoder_is_itself(build, decoder_dir):
    model, processor = build(decoder_dir, **ADAPTED)
    stir_slot_adapters(model)
    ids = processor(INSTRUCTIONS[0])["decoder_prompt_ids"]
    expected = AutoModelForCausalLM.from_pretrained(decoder_dir)(ids).logits
    assert torch.equal(model.decoder(ids).logits, expected)
    with slots_at_the_end(4):
        assert not torch.equal(model.decoder(ids).logits, expected)
    # Also after a pass that failed.
    with pytest.raises(IndexError), slots_at_the_end(4):
        model.decoder(torch.tensor([[10_000]]))
    assert torch.equal(model.decoder(ids).logits, expected)


def examples():
    pairs = [(i, a) for i in range(3) for a in range(3)]
    return [Example(f"{i}{a}", INSTRUCTIONS[i], CONTEXTS[i] or "", ANSWERS[a]) for i, a in pairs]


@pytest.mark.parametrize("fields", [{}, {"latent_source": "decoder"}, {"decoder_sees_prompt": False}], ids=str)
def test_training_changes_the_adapters_and_not_the_decoder(build, decoder_dir, tmp_path, fields):
    model, processor = build(decoder_dir, **ADAPTED | fields)
    decoder, start = weights_hash(model.decoder), copy.deepcopy(model.slot_adapters.state_dict())
    args = ProtoGenTrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=3, use_cpu=True, save_strategy="no"
    )
    trainer = ProtoGenTrainer(
        model=model, args=args, train_dataset=examples(), data_collator=ProtoGenCollator(processor)
    )
    trainer.train()
    assert weights_hash(model.decoder) == decoder
    same = {name for name, weight in model.slot_adapters.state_dict().items() if torch.equal(weight, start[name])}
    assert same == set()


def test_micro_batches_add_up_to_the_gradient_of_the_batch(build, llama_dir):
    model, processor = build(llama_dir, **ADAPTED, latent_source="both")
    stir_slot_adapters(model)
    set_dropout(model, 0.0)
    model.train()
    gradients = []
    for rows in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        model.zero_grad()
        for part in rows:
            texts = [*INSTRUCTIONS, "who"][part], [*CONTEXTS, None][part], [*ANSWERS, "a cat"][part]
            (model(**processor(*texts)).loss / len(rows)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.slot_adapters.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("latent_source", ["encoder", "decoder", "both", "none"])
def test_verified_answers_are_greedy_whatever_the_adapters_say(build, decoder_dir, latent_source):
    model, processor = build(decoder_dir, **ADAPTED, latent_source=latent_source)
    stir_slot_adapters(model)
    without_eos(model)
    expected = [greedy(model, processor, *pair) for pair in zip(MORE, MORE_CONTEXTS, strict=True)]
    assert (processor(MORE, MORE_CONTEXTS)["decoder_prompt_mask"] == 0).any(), "the prompts must be padded"
    answers, (output,) = verified(model, processor, len(MORE))
    assert answers == expected
    assert (output.num_drafts > 0).all()


@pytest.mark.parametrize("thin", [False, True])
def test_checkpoints_keep_the_adapters(build, decoder_dir, tmp_path, thin):
    model, processor = build(decoder_dir, **ADAPTED, thin=thin)
    stir_slot_adapters(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        kept = set(file.keys())
    assert {f"slot_adapters.{name}" for name in model.slot_adapters.state_dict()} < kept
    assert any(name.startswith("decoder.") for name in kept) != thin
    loaded, info = ProtoGenForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert weights_hash(loaded.slot_adapters) == weights_hash(model.slot_adapters)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).answer_logits, model(**batch).answer_logits)
    assert torch.equal(loaded.generate(**batch, length=8), model.generate(**batch, length=8))
    assert all(p.requires_grad for p in loaded.slot_adapters.parameters())


@torch.no_grad()
def test_a_decoder_that_is_attached_again_takes_the_adapters_in_once(build, llama_dir, tmp_path):
    model, processor = build(llama_dir, **ADAPTED, thin=True)
    stir_slot_adapters(model)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    expected = model(**batch).answer_logits
    model.attach_decoder(model.decoder)
    assert torch.equal(model(**batch).answer_logits, expected)
    model.attach_decoder(AutoModelForCausalLM.from_pretrained(llama_dir))
    assert torch.equal(model(**batch).answer_logits, expected)


@torch.no_grad()
def test_a_copy_of_a_model_has_adapters_of_its_own(build, llama_dir):
    model, processor = build(llama_dir, **ADAPTED)
    stir_slot_adapters(model)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    expected = model(**batch).answer_logits
    other = copy.deepcopy(model)
    assert torch.equal(other(**batch).answer_logits, expected)
    for low_rank in other.slot_adapters.maps.values():
        low_rank.up.weight.zero_()
    assert not torch.equal(other(**batch).answer_logits, expected)
    assert torch.equal(model(**batch).answer_logits, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"latent_source": "decoder"},
        {"latent_source": "decoder", "first_tokens": "decoder"},
        {"decoder_sees_prompt": False},
        {"decoder_sees_prompt": False, "sink": "none"},
    ],
    ids=str,
)
@torch.no_grad()
def test_fused_adapters_write_the_same(build, decoder_dir, fields):
    model, processor = build(decoder_dir, **ADAPTED | fields)
    stir_slot_adapters(model)
    decoder, kept = weights_hash(model.decoder), set(model.state_dict())
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    prompts = processor(INSTRUCTIONS, CONTEXTS)
    expected, answers = model(**batch).answer_logits, model.generate(**prompts, length=8)
    model.fuse_slot_adapters()
    # Where the decoder writes the first tokens, real tokens stand in the pass, and it stays as it was.
    is_apart = fields.get("first_tokens") != "decoder"
    for low_rank in model.slot_adapters.maps.values():
        low_rank.up.weight.mul_(0 if is_apart else 1)
    for _ in range(2):
        torch.testing.assert_close(model(**batch).answer_logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(**prompts, length=8), answers)
    assert weights_hash(model.decoder) == decoder
    assert set(model.state_dict()) == kept
    embeddings = model.decoder.get_input_embeddings().weight
    assert model.fused.decoder.get_input_embeddings().weight is embeddings
    # What is trained on is not what was fused.
    model.train()
    assert is_apart == (not torch.allclose(model.eval()(**batch).answer_logits, expected, atol=1e-2))


def test_what_cannot_be_fused_is_named(build, llama_dir):
    model, _ = build(llama_dir, decoder_sees_prompt=True)
    with pytest.raises(ValueError, match="no slot adapters to fuse.*slot_adapter_rank=0"):
        model.fuse_slot_adapters()
    model, _ = build(llama_dir, **ADAPTED)
    layer = model.decoder.base_model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised weights"):
        model.fuse_slot_adapters()


class Experts(nn.Module):
    """Reads tokens one by one, as a mixture of experts does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_layers_that_read_tokens_without_their_order_are_refused(build, llama_dir):
    model, processor = build(llama_dir, decoder_sees_prompt=True)
    layers = model.decoder.base_model.layers
    layers[1].mlp = Experts(nn.Linear(24, 24))
    SlotAdapters(2, model.decoder).attach(model.decoder)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    # Where there are no slots there is nothing to refuse.
    model.decoder(batch["decoder_prompt_ids"])
    with pytest.raises(ValueError, match=r"one of this decoder's reads 2 dimensions.*set slot_adapter_rank=0"):
        model(**batch)


def test_a_gpt2_decoder_whose_layers_are_convolutions(build, tmp_path):
    tokenizer = word_tokenizer(["<unk>", "<bos>", "<eos>"], bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(tmp_path)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    config = GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model, processor = build(tmp_path, **ADAPTED)
    shapes = {name: (*low_rank.down.weight.shape, *low_rank.up.weight.shape) for name, low_rank in maps_of(model)}
    assert shapes["h-0-attn-c_attn"] == (2, 24, 72, 2)
    assert len(shapes) == 2 * 4
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    before, fresh = weights_hash(model.decoder), model(**batch).answer_logits
    stir_slot_adapters(model)
    output = model(**batch)
    assert not torch.allclose(output.answer_logits, fresh, atol=1e-2)
    model.fuse_slot_adapters()
    torch.testing.assert_close(model(**batch).answer_logits, output.answer_logits, rtol=1e-4, atol=1e-4)
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.slot_adapters.parameters())
    assert weights_hash(model.decoder) == before


def maps_of(model):
    return model.slot_adapters.maps.items()


def test_a_map_is_of_its_rank():
    low_rank = LowRank(6, 5, 2)
    nn.init.normal_(low_rank.up.weight)
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(low_rank(x), x @ low_rank.down.weight.T @ low_rank.up.weight.T)
    assert torch.linalg.matrix_rank(low_rank.up.weight @ low_rank.down.weight) == 2


def test_a_bfloat16_decoder_takes_in_float32_maps(build, llama_dir):
    model, processor = build(llama_dir, **ADAPTED, decoder_dtype=torch.bfloat16)
    exact, _ = build(llama_dir, **ADAPTED)
    stir_slot_adapters(model)
    exact.slot_adapters.load_state_dict(model.slot_adapters.state_dict())
    assert {p.dtype for p in model.slot_adapters.parameters()} == {torch.float32}
    batch = processor(INSTRUCTIONS, CONTEXTS, ANSWERS)
    output, reference = model(**batch), exact(**batch)
    assert output.answer_logits.dtype == torch.bfloat16
    similar = nn.functional.cosine_similarity(output.answer_logits.float(), reference.answer_logits, dim=-1)
    assert similar.min() > 0.99
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.slot_adapters.parameters())
