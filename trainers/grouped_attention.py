"""
Attention for training through a decoder on a CPU, where the backward pass of the fused kernel takes several times as
long as two plain products: query heads that share keys go through one product, and keys are not repeated for them.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

# Scores that a layer keeps for its backward pass at most; beyond, the fused kernel, which keeps none.
MAX_SCORES = 2**23


def use_grouped_attention(decoder: PreTrainedModel) -> None:
    """Switches a decoder on a CPU from the fused kernel to this, where there is a backward pass to come."""
    if decoder.device.type == "cpu" and decoder.config.get_text_config()._attn_implementation == "sdpa":
        decoder.set_attn_implementation("grouped")


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Softmax attention, as an attention function of transformers.

    Args:
        query (`torch.Tensor` of shape `(batch, heads, queries, dim)`)
        key, value (`torch.Tensor` of shape `(batch, key_heads, keys, dim)`)
        attention_mask (`torch.Tensor` of shape `(batch, 1, queries, keys)`): added to the scores.

    Returns:
        `torch.Tensor` of shape `(batch, queries, heads, dim)`, and no weights.
    """
    batch, heads, queries, dim = query.shape
    key_heads, keys = key.shape[1:3]
    if not query.requires_grad or batch * heads * queries * keys > MAX_SCORES:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = dim**-0.5 if scaling is None else scaling
    scores = query.reshape(batch, key_heads, -1, dim) @ key.mT
    scores = scores.view(batch, heads, queries, keys) * scaling + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    output = weights.view(batch, key_heads, -1, keys) @ value
    return output.view(batch, heads, queries, dim).transpose(1, 2).contiguous(), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", eager_mask)
