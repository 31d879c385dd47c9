"""
What all ways of writing an answer have in common: `write(instructions, contexts, max_new_tokens, exactly=False)`.

Each module here makes such functions from loaded models; `exactly` writes `max_new_tokens` tokens and ignores EOS, for
timing. Tokenizers are part of the work: prompt in, text out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Written:
    """
    Answers to a batch of instructions.

    Args:
        texts (`list[str]`)
        token_ids (`list[list[int]]`): in the vocabulary of the model that wrote them, up to and including EOS.
    """

    texts: list[str]
    token_ids: list[list[int]]


Writer = Callable[..., Written]


def generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, torch.Tensor],
    max_new_tokens: int,
    exactly: bool,
    **options,
) -> Written:
    """transformers' own `generate`, greedily unless `options` say otherwise, without the prompt in its answers."""
    eos = tokenizer.eos_token_id
    length = {"min_new_tokens": max_new_tokens} if exactly else {}
    options = {"do_sample": False, "pad_token_id": eos, "eos_token_id": eos} | length | options
    with torch.no_grad():
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    if not model.config.is_encoder_decoder:
        sequences = sequences[:, inputs["input_ids"].shape[1] :]
    return up_to_eos(tokenizer, sequences)


def up_to_eos(tokenizer: PreTrainedTokenizerBase, sequences: torch.LongTensor) -> Written:
    """Answers `(batch, length)`, cut after their EOS."""
    eos = tokenizer.eos_token_id
    token_ids = [row[: row.index(eos) + 1] if eos in row else row for row in sequences.tolist()]
    return Written(tokenizer.batch_decode(token_ids, skip_special_tokens=True), token_ids)
