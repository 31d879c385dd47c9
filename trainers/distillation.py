"""What the frozen decoder, reading the prompt, says of given answers: soft targets for every position in one pass."""

import torch
from transformers import PreTrainedModel

from modeling_protogen.modeling_protogen import IGNORE_INDEX
from modeling_protogen.proto_tokens import position_ids


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
    is_token = answers != IGNORE_INDEX
    mask = torch.cat([prompt_mask.long(), is_token[:, :-1].long()], dim=1)
    # The prompt's last position predicts the first token, each token the next.
    predicts = torch.cat([torch.zeros_like(prompt_mask[:, :-1], dtype=torch.bool), is_token], dim=1)
    with torch.no_grad():
        logits = decoder(
            input_ids=torch.cat([prompt_ids, answers[:, :-1].clamp_min(0)], dim=1),
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=False,
            logits_to_keep=predicts,
        ).logits
    values, ids = logits.topk(top_k)
    return ids, values.float().softmax(-1)
