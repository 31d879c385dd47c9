"""Decoders of every family: fitting, one step and verified decoding hold in each, or one sentence refuses it."""

from functools import wraps

import pytest
import torch
import torch.nn.functional as F
from conftest import FREE
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from modeling_protogen import ProtoGenConfig, ProtoGenForConditionalGeneration
from modeling_protogen.autoregressive import teacher_forced_logits
from modeling_protogen.block_decoding import Drafter, GenerationBuffer
from modeling_protogen.frozen_decoder import check_decoder, decoder_fingerprint, logits_of
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text, TextFit
from trainers.proto_bank import BankInfo

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
OPT = {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64}
FAMILIES = {
    "gpt_neox": LLAMA,
    "llama": LLAMA,
    "gpt2": GPT,
    "codegen": GPT | {"rotary_dim": 4},
    "opt": OPT,
    "opt narrow": OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "bloom": {"n_layer": 2, "n_head": 4},
    "granite": LLAMA | {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "cohere": LLAMA | {"logit_scale": 0.25},
    "gemma2": LLAMA | {"head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 4},
    "gemma3_text": LLAMA | {"head_dim": 8, "sliding_window": 4},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 8},
    "mistral": LLAMA | {"sliding_window": 4},
    "phi": LLAMA,
    "phi3": LLAMA | {"sliding_window": 4},
    "falcon alibi": {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    # These count distances by places in the cache.
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "window_size": 4, "attention_types": [[["global", "local"], 1]]},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
}
LENGTHS, TOKENS = [3, 7, 1], 12


def tiny(family, fields):
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.3}
    config = AutoConfig.for_model(family.split()[0], vocab_size=64, hidden_size=32, **special, **fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=FAMILIES)
def decoder(request):
    return tiny(request.param, FAMILIES[request.param])


@pytest.fixture
def model(decoder):
    config = ProtoGenConfig(
        decoder_config=decoder.config.to_dict(),
        latent_source="decoder",
        decoder_sees_prompt=True,
        first_tokens="decoder",
        chunk_size=TOKENS,
        predictor_dim=64,
        num_source_layers=1,
        num_query_layers=1,
        # In OPT some layers read no (batch, length, dim).
        slot_adapter_rank=0 if decoder.config.model_type == "opt" else 2,
    )
    return ProtoGenForConditionalGeneration(config, decoder=decoder).eval()


@pytest.fixture
def prompts():
    """Prompts of several lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    return {
        "decoder_prompt_ids": torch.randint(3, 64, mask.shape, generator=generator) * mask,
        "decoder_prompt_mask": mask.long(),
    }


def alone(prompts, row):
    return {name: part[row : row + 1, -LENGTHS[row] :] for name, part in prompts.items()}


def test_it_is_taken_and_its_logits_are_known(decoder):
    check_decoder(decoder)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        states = decoder.base_model(ids).last_hidden_state
        torch.testing.assert_close(logits_of(decoder, states), decoder(ids).logits, atol=1e-5, rtol=1e-4)


def test_one_step_answers_do_not_depend_on_the_batch(model, prompts):
    together = model.generate(**prompts, length=TOKENS)
    assert together.shape == (3, TOKENS)
    for row in range(3):
        assert torch.equal(model.generate(**alone(prompts, row), length=TOKENS)[0], together[row])


def test_the_first_tokens_are_the_decoders_own(model, prompts):
    prediction = model.predict(**prompts)
    answers = torch.zeros(3, 1, dtype=torch.long)
    own = teacher_forced_logits(model.decoder, *prompts.values(), answers, torch.ones_like(answers, dtype=torch.bool))
    torch.testing.assert_close(prediction.next_logits, own, atol=1e-4, rtol=1e-3)


def plan_drafts(monkeypatch, rows, draft, ahead):
    """
    Drafts for these prompts: `draft(row, place in the answer)` gives a token, and whether it is sure. Before a draft
    stand the tokens written so far, and `ahead` that are to come.
    """
    buffers, start, own = [], GenerationBuffer.__init__, Drafter.draft

    def begin(self, *args):
        start(self, *args)
        buffers.append(self)

    def planned(self, states, logits, certain, sampling):
        _, table = own(self, states, logits, certain, sampling)
        for drafts, row, written in zip(table, rows, buffers[-1].tokens, strict=True):
            for place in range(len(drafts)):
                token, is_sure = draft(row, len(written) + ahead + place)
                drafts[place] = 0.0
                drafts[place, token] = 20.0 if is_sure else 0.1
        return table.argmax(-1), table

    monkeypatch.setattr(GenerationBuffer, "__init__", begin)
    monkeypatch.setattr(Drafter, "draft", planned)


def test_verified_decoding_is_greedy(model, prompts, monkeypatch):
    expected = []
    for row in range(3):
        inputs = alone(prompts, row)
        ids, mask = inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"]
        options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        expected.append(
            model.decoder.generate(input_ids=ids, attention_mask=mask, **options)[0, ids.shape[1] :].tolist()
        )
        found = model.generate(**inputs, mode="verified", max_new_tokens=TOKENS)
        assert found[0].tolist() == expected[row]

    def draft(row, at):
        right = expected[row][min(at, TOKENS - 1)]
        return (right if (at * at + row) % 3 else (right + 1) % 64), True

    plan_drafts(monkeypatch, range(3), draft, 0)
    options = {"mode": "verified", "max_new_tokens": TOKENS, "return_dict_in_generate": True}
    # Where positions cost nothing drafts are trees.
    for costs in ({}, FREE):
        found = model.generate(**prompts, **options, **costs)
        assert found.sequences.tolist() == expected
        assert found.accepted_lengths.unique().numel() > 1


def test_adaptive_answers_do_not_depend_on_the_batch(model, prompts, monkeypatch):
    def draft(row, at):
        return (5 * at + row) % 61 + 3, (at * at + row) % 3 != 0

    options = {"mode": "adaptive", "max_new_tokens": TOKENS, "return_dict_in_generate": True}
    expected = []
    for row in range(3):
        with monkeypatch.context() as context:
            plan_drafts(context, [row], draft, 1)
            expected.append(model.generate(**alone(prompts, row), **options).sequences[0].tolist())
    plan_drafts(monkeypatch, range(3), draft, 1)
    found = model.generate(**prompts, **options)
    assert found.sequences.tolist() == expected
    assert found.accepted_lengths.unique().numel() > 1


def test_fitting_has_the_gradient_of_the_decoders_own_loss(decoder):
    embed = decoder.get_input_embeddings()
    dim = embed.weight.shape[1]
    info = BankInfo("tiny", None, decoder_fingerprint(decoder), "e_mN", 4, 1, "per_example", "bos", dim)
    fitter = ProtoTokenFitter(decoder, info, FittingArguments())
    fit = TextFit(Text("a", [5, 9, 30]))
    fitter.start(fit)
    ((accuracy, least),) = fitter._scores_and_gradients([fit])
    e, m = (vector.detach().clone().requires_grad_() for vector in (fit.e, fit.m))
    embeds = torch.cat([embed(torch.tensor([1])), e[0], m.expand(3, -1)])
    logits = decoder(inputs_embeds=embeds[None]).logits[0, 2:]
    target = torch.tensor(fit.text.token_ids)
    F.cross_entropy(logits, target).backward()
    torch.testing.assert_close(fit.e.grad, e.grad, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(fit.m.grad, m.grad, atol=1e-6, rtol=1e-3)
    assert accuracy == (logits.argmax(-1) == target).float().mean().item()
    assert least == pytest.approx(logits.softmax(-1)[range(3), target].min().item(), rel=1e-4)


HYBRID = LLAMA | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
REFUSED = {
    "mamba": {"num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"num_hidden_layers": 2, "attention_hidden_size": 32},
    "recurrent_gemma": LLAMA | {"lru_width": 32, "num_hidden_layers": 3},
    "qwen3_next": LLAMA | {"head_dim": 8, "num_experts": 2},
    "qwen3_5_text": LLAMA | {"head_dim": 8},
    "granitemoehybrid": HYBRID | {"layer_types": ["mamba", "attention"]},
    # Has attention and a recurrent state in each layer.
    "falcon_h1": HYBRID | {"mamba_d_ssm": 64},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"]},
    "llama4_text": LLAMA | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_serve_is_refused(family):
    message = "its forward takes no past_key_values|as a recurrent state|gives no last_hidden_state"
    with pytest.raises(ValueError, match=message):
        check_decoder(tiny(family, REFUSED[family]))


def test_no_model_is_made_with_what_cannot_serve():
    decoder, other = tiny("llama", LLAMA), tiny("mamba", REFUSED["mamba"])
    config = {"latent_source": "none", "decoder_sees_prompt": True, "predictor_dim": 64}
    config = ProtoGenConfig(decoder_config=decoder.config.to_dict(), **config)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be the frozen decoder"):
        ProtoGenForConditionalGeneration(config, decoder=other)
    model = ProtoGenForConditionalGeneration(config, decoder=decoder)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be the frozen decoder"):
        model.attach_decoder(other)
    assert model.decoder is decoder


def with_positions(number, latent_source, **fields):
    decoder = tiny("gpt2", GPT | {"n_positions": number})
    config = ProtoGenConfig(
        decoder_config=decoder.config.to_dict(),
        latent_source=latent_source,
        decoder_sees_prompt=True,
        predictor_dim=64,
        **{"chunk_size": TOKENS} | fields,
    )
    return ProtoGenForConditionalGeneration(config, decoder=decoder).eval()


@pytest.mark.parametrize("latent_source", ["decoder", "none"])
def test_answers_reach_the_last_position(latent_source):
    """Slots would not: drafts end before, also those of other rows where their text is shorter."""
    model = with_positions(32, latent_source, chunk_size=4, max_chunks=3, arrangement="e_mN", num_e_tokens=2)
    ids = torch.randint(3, 64, (3, 28), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(28) >= torch.tensor([[0], [9], [2]])).long()
    prompts = {"decoder_prompt_ids": ids * mask, "decoder_prompt_mask": mask}
    # The last token is not read.
    options = {"max_new_tokens": 5, "do_sample": False}
    greedy = model.decoder.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)[:, 28:].tolist()
    for costs in ({}, FREE):
        assert model.generate(**prompts, mode="verified", **options, **costs).tolist() == greedy
    assert model.generate(**prompts, mode="adaptive", confidence_threshold=1, **options).tolist() == greedy
    sure = {"mode": "adaptive", "confidence_threshold": 0.0, **options}
    found = model.generate(**prompts, **sure, return_dict_in_generate=True)
    assert found.accepted_lengths[0] <= 1 < found.accepted_lengths[1]
    for row, padding in enumerate([0, 9, 2]):
        one = {name: part[row : row + 1, padding:] for name, part in prompts.items()}
        assert torch.equal(model.generate(**one, **sure)[0], found.sequences[row])
    # What is written at once has slots for all of it.
    options = {"mode": "refine", "confidence_threshold": 1, "num_refinements": 12, "num_length_sigmas": 9}
    refined = model.generate(**prompts, **options, return_dict_in_generate=True)
    assert refined.lengths.tolist() == ([1, 8, 3] if latent_source == "decoder" else [2, 8, 4])
    for row, length in enumerate(refined.lengths.tolist()):
        assert refined.sequences[row, : min(length, 5)].tolist() == greedy[row][:length]


@pytest.mark.parametrize("mode", ["one_step", "verified", "adaptive"])
@pytest.mark.parametrize("latent_source", ["decoder", "none"])
def test_more_positions_than_there_are_is_one_clear_error(mode, latent_source):
    model = with_positions(32, latent_source)
    ids = torch.full((2, 40), 5)
    mask = (torch.arange(40) >= torch.tensor([[37], [33]])).long()  # Padding takes none.
    options = {"max_new_tokens": 4} if mode != "one_step" else {"length": 4}
    assert model.generate(decoder_prompt_ids=ids, decoder_prompt_mask=mask, mode=mode, **options).shape[0] == 2
    with pytest.raises(ValueError, match="the decoder has 32 positions, and a prompt with its answer takes"):
        model.generate(decoder_prompt_ids=ids, decoder_prompt_mask=torch.ones_like(ids), mode=mode, **options)


def test_a_head_that_is_not_known_is_refused(decoder, tmp_path, monkeypatch):
    if not isinstance(decoder, LlamaForCausalLM):
        pytest.skip("one family is enough")
    decoder.save_pretrained(tmp_path)
    forward = LlamaForCausalLM.forward

    @wraps(forward)
    def doubled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ValueError, match="changes its logits after the output layer"):
        ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
            None, str(tmp_path), latent_source="decoder", decoder_sees_prompt=True
        )
