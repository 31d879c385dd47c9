"""
What all ways of writing an answer have in common: `write(instructions, contexts, max_new_tokens, exactly=False)`.

Each module here makes such functions from loaded models; `exactly` writes `max_new_tokens` tokens and ignores EOS, for
timing. Tokenizers are part of the work: prompt in, text out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_protogen.autoregressive import up_to_eos
from modeling_protogen.configuration_protogen import as_list
from trainers.data import Example


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


def written(write: Writer, examples: list[Example], longest: int, name: str, batch_size: int = 32) -> list[str]:
    """The answers to examples, batch after batch; `name` is what progress is shown under."""
    answers = []
    for first in tqdm(range(0, len(examples), batch_size), desc=name):
        part = examples[first : first + batch_size]
        answers += write([e.instruction for e in part], [e.context for e in part], longest).texts
    return answers


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
