"""What the frozen decoder, reading the prompt, says of given answers: soft targets for every position in one pass."""

import torch
from transformers import Cache, PreTrainedModel

from modeling_protogen.autoregressive import teacher_forced_logits
from modeling_protogen.frozen_decoder import read_prefix
from modeling_protogen.objectives import IGNORE_INDEX


def teacher_top_k(
    decoder: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.Tensor,
    answers: torch.LongTensor,
    top_k: int,
    prompt_cache: Cache | None = None,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """
    The teacher's most likely tokens at each position of the answers, given the prompt and the answer's tokens before.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(batch, prompt)`): padded on the left.
        answers (`torch.LongTensor` of shape `(batch, length)`): -100 after the end.
        prompt_cache (`Cache`, *optional*): the prompt's keys and values, where it has been read.

    Returns:
        Token ids and probabilities (float32, of these tokens alone, adding up to 1), each `(answer_tokens, top_k)`,
        answer after answer.
    """
    prompt = prompt_ids, prompt_mask
    if prompt_cache is None:
        prompt_cache, _ = read_prefix(decoder, *prompt, [])
    logits = teacher_forced_logits(decoder, *prompt, answers.clamp_min(0), answers != IGNORE_INDEX, prompt_cache)
    values, ids = logits.topk(top_k)
    return ids, values.float().softmax(-1)
