"""Attention for training on CPUs against transformers' own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trainers import grouped_attention


@pytest.mark.parametrize("max_scores", [2**23, 0])
def test_grouped_attention_is_eager_attention(decoder_dir, max_scores, monkeypatch):
    monkeypatch.setattr(grouped_attention, "MAX_SCORES", max_scores)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, :4] = 0
    results = []
    for implementation in ("eager", "grouped"):
        decoder = AutoModelForCausalLM.from_pretrained(decoder_dir).requires_grad_(False)
        if implementation == "grouped":
            grouped_attention.use_grouped_attention(decoder)
        else:
            decoder.set_attn_implementation(implementation)
        assert decoder.config._attn_implementation == implementation
        dim = decoder.config.hidden_size
        read = decoder(input_ids=torch.arange(12).view(3, 4), attention_mask=mask[:, :4], use_cache=True)
        embeds = torch.linspace(-1, 1, 9 * dim).view(3, 3, dim).requires_grad_()
        output = decoder(inputs_embeds=embeds, attention_mask=mask, past_key_values=read.past_key_values)
        output.logits.square().mean().backward()
        results.append((output.logits.detach(), embeds.grad))
    for eager, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, eager)


def test_eager_decoders_stay_eager(decoder_dir):
    decoder = AutoModelForCausalLM.from_pretrained(decoder_dir, attn_implementation="eager")
    grouped_attention.use_grouped_attention(decoder)
    assert decoder.config._attn_implementation == "eager"
