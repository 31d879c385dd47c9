"""
What all ways of writing an answer have in common: `write(instructions, contexts, max_new_tokens, exactly=False)`.

Each module here makes such functions from loaded models; `exactly` writes `max_new_tokens` tokens and ignores EOS, for
timing. Tokenizers are part of the work: prompt in, text out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modeling_protogen.autoregressive import up_to_eos
from modeling_protogen.configuration_protogen import as_list


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
    inputs: dict[str, torch.Tensor],
    max_new_tokens: int,
    exactly: bool,
    **options,
) -> list[list[int]]:
    """
    The tokens of transformers' own `generate`, up to and including the first of the model's EOS and without the prompt;
    greedily unless `options` say otherwise.
    """
    length = {"min_new_tokens": max_new_tokens} if exactly else {}
    eos = as_list(model.generation_config.eos_token_id)
    options = {"do_sample": False, "pad_token_id": eos[0] if eos else 0} | length | options
    with torch.no_grad():
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    if not model.config.is_encoder_decoder:
        sequences = sequences[:, inputs["input_ids"].shape[1] :]
    return up_to_eos(sequences, eos)
