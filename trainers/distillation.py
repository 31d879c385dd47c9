"""What the frozen decoder, reading the prompt, says of given answers: soft targets for every position in one pass."""

import torch
from transformers import PreTrainedModel

from modeling_protogen.autoregressive import own_logits
from modeling_protogen.modeling_protogen import IGNORE_INDEX
from modeling_protogen.prefix import rows_of_like_lengths


def teacher_top_k(
    decoder: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.Tensor,
    answers: torch.LongTensor,
    top_k: int,
) -> tuple[torch.LongTensor, torch.Tensor]:
    """
    The teacher's likeliest tokens at each position of the answers, given the prompt and the answer's tokens before.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(batch, prompt)`): padded on the left.
        answers (`torch.LongTensor` of shape `(batch, length)`): -100 after the end.

    Returns:
        Token ids and probabilities (float32, of these tokens alone, adding up to 1), each `(answer_tokens, top_k)`,
        answer after answer.
    """
    is_token, parts, places = answers != IGNORE_INDEX, [], []
    numbers = torch.arange(answers.numel(), device=answers.device).view_as(answers)
    for rows, length in rows_of_like_lengths(prompt_mask):
        prompt = prompt_ids[rows, -length:], prompt_mask[rows, -length:]
        parts.append(own_logits(decoder, *prompt, answers[rows].clamp_min(0), is_token[rows]).topk(top_k))
        places.append(numbers[rows][is_token[rows]])
    order = torch.cat(places).argsort()
    values, ids = (torch.cat(part)[order] for part in zip(*parts, strict=True))
    return ids, values.float().softmax(-1)
