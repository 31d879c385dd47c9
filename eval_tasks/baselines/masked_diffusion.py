"""
Masked diffusion: answers start as masks, and in each pass of a bidirectional model the surest of its predictions stay
(LLaDA, Nie et al., 2025, https://arxiv.org/abs/2502.09992: blocks from left to right, low-confidence remasking).
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modeling_protogen.autoregressive import up_to_eos
from modeling_protogen.processing_protogen import pad_left, rendered_ids, user_message
from modeling_protogen.sampling import Sampling, log_probability

from .writing import Writer, Written


def tokens_to_keep(masked: torch.LongTensor, steps: int) -> torch.LongTensor:
    """How many of the masked tokens `(batch,)` stay after each step, early steps one more: `(batch, steps)`."""
    extra = torch.arange(steps, device=masked.device) < (masked % steps)[:, None]
    return (masked // steps)[:, None] + extra


@torch.no_grad()
def denoise(
    model: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.Tensor,
    mask_token_id: int,
    max_new_tokens: int,
    steps: int,
    block_size: int,
    sampling: Sampling,
) -> torch.LongTensor:
    """
    Args:
        prompt_ids, prompt_mask (`torch.LongTensor` of shape `(batch, prompt)`): padded on the left.
        max_new_tokens (`int`): tokens written, in blocks of `block_size`, each in `steps * block_size / max_new_tokens`
            passes.

    Returns:
        `torch.LongTensor` of shape `(batch, max_new_tokens)`.

    Raises:
        ValueError: if blocks do not divide the answer, or steps the blocks.
    """
    num_blocks, rest = divmod(max_new_tokens, block_size)
    if rest or steps % num_blocks:
        raise ValueError(
            f"{max_new_tokens} tokens must be a multiple of blocks of {block_size}, and {steps} steps of their number."
        )
    start = prompt_ids.shape[1]
    ids = torch.cat([prompt_ids, prompt_ids.new_full((len(prompt_ids), max_new_tokens), mask_token_id)], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(ids[:, start:])], dim=1)
    for block in range(num_blocks):
        first = start + block * block_size
        part = slice(first, first + block_size)
        counts = tokens_to_keep((ids[:, part] == mask_token_id).sum(1), steps // num_blocks)
        for count in counts.T:
            # Contiguous, for the reason that `answer_logits` has.
            logits = model(input_ids=ids, attention_mask=mask).logits[:, part].contiguous()
            tokens = sampling.pick(logits)
            is_masked = ids[:, part] == mask_token_id
            confidence = log_probability(logits, tokens).masked_fill(~is_masked, -torch.inf)
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            stays = is_masked & (rank < count[:, None])
            ids[:, part] = torch.where(stays, tokens, ids[:, part])
    return ids[:, start:]


def masked_diffusion(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mask_token_id: int,
    tokens_per_step: int = 1,
    block_size: int = 32,
    temperature: float = 0.0,
) -> Writer:
    """
    Args:
        model (`PreTrainedModel`): bidirectional; `GSAI-ML/LLaDA-8B-Instruct` and its like, with their
            `mask_token_id` (126336 there).
        tokens_per_step (`int`): tokens that stay in each pass; 1 is the best and the slowest.
    """

    def prompt_ids(message):
        if not tokenizer.chat_template:
            return tokenizer(message, split_special_tokens=True).input_ids

        def render(texts):
            chat = [{"role": "user", "content": text} for text in texts]
            return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

        return rendered_ids(tokenizer, render, [message])

    def write(instructions, contexts, max_new_tokens, exactly=False):
        rows = [prompt_ids(message) for message in map(user_message, instructions, contexts)]
        ids, mask = (part.to(model.device) for part in pad_left(rows))
        block = min(block_size, max_new_tokens)
        length = -(-max_new_tokens // block) * block
        steps = length // block * -(-block // tokens_per_step)
        written = denoise(model, ids, mask, mask_token_id, length, steps, block, Sampling(temperature))
        token_ids = up_to_eos(written[:, :max_new_tokens], [tokenizer.eos_token_id])
        return Written(tokenizer.batch_decode(token_ids, skip_special_tokens=True), token_ids)

    return write
