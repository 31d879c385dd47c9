"""
Proto-tokens behind many places of a text, its anchors, in one pass of the decoder over nothing but them: each anchor's
slots see the text before it and one another. Behind an anchor the decoder itself predicts the next token, and the slots
hold those that follow it.
"""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .frozen_decoder import read_prefix, slot_positions
from .objectives import IGNORE_INDEX
from .slot_adapters import slots_at_the_end


def text_so_far(
    prompt_ids: torch.LongTensor, prompt_mask: torch.Tensor, labels: torch.LongTensor
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """
    Prompts `(batch, prompt)` and answers `(batch, length)`, -100 after their ends, but for each answer's last token, in
    one row each.

    Returns:
        Ids and mask `(batch, text)`, padded on the left, and how many of each row's tokens are the answer's `(batch,)`.
    """
    is_read = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    ids = torch.cat([prompt_ids, labels.clamp_min(0)], dim=1)
    mask = torch.cat([prompt_mask.long(), is_read.long()], dim=1)
    order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    return ids.gather(1, order), mask.gather(1, order), is_read.sum(1)


def labels_behind(labels: torch.LongTensor, anchors: torch.LongTensor, size: int) -> torch.LongTensor:
    """
    What the slots behind anchors hold: of answers `(batch, length)` with `anchors` `(batch, anchors)` tokens before
    them, the `size` tokens after the next one, `(batch * anchors, size)`; -100 beyond the end.
    """
    places = anchors[..., None] + 1 + torch.arange(size, device=labels.device)
    return F.pad(labels, (0, size), value=IGNORE_INDEX).gather(1, places.flatten(1)).view(-1, size)


def random_anchors(labels: torch.LongTensor, number: int) -> torch.LongTensor:
    """Places `(batch, number)` in answers `(batch, length)` that at least two tokens follow, where there are any."""
    return (torch.rand(len(labels), number, device=labels.device) * _num_places(labels)).long()


def even_anchors(labels: torch.LongTensor, number: int) -> torch.LongTensor:
    """As [`random_anchors`], at even distances from the first."""
    return torch.arange(number, device=labels.device) * _num_places(labels) // number


def _num_places(labels: torch.LongTensor) -> torch.LongTensor:
    return (labels != IGNORE_INDEX).sum(1, keepdim=True).sub(1).clamp_min(1)


def pair_mask(
    mask: torch.Tensor,
    ends: torch.LongTensor,
    size: int,
    dtype: torch.dtype,
    num_new: int = 0,
    follows: torch.BoolTensor | None = None,
) -> torch.Tensor:
    """
    What the texts' last tokens and the slots behind anchors see, as an attention mask that is added to the scores,
    `(batch, 1, num_new + slots, text + slots)`.

    Args:
        mask (`torch.Tensor` of shape `(batch, text)`): of the texts' tokens.
        ends (`torch.LongTensor` of shape `(batch, anchors)`): how many places of the text lie before each anchor.
        size (`int`): slots behind each.
        num_new (`int`): tokens at the texts' ends that are read in the same pass.
        follows (`torch.BoolTensor` of shape `(tokens, tokens)`, *optional*): which of the last of these tokens each
            follows from, as [`ancestors`], where they are no chain; then anchors are the same in all texts.
    """
    text, slot = torch.arange(mask.shape[1], device=mask.device), torch.arange(ends.shape[1] * size, device=mask.device)
    new_ends = text[len(text) - num_new :].add(1).expand(len(mask), -1)
    sees_text = text < torch.cat([new_ends, ends.repeat_interleave(size, dim=1)], dim=1)[..., None]
    if follows is not None:
        number = len(follows)
        anchors = (ends[0] - 1 - (len(text) - number)).repeat_interleave(size)
        tokens = torch.cat([torch.arange(number, device=mask.device), anchors])
        sees_text[:, num_new - number :, len(text) - number :] &= follows[tokens]
    sees_slot = (slot[:, None] // size == slot // size) & (slot[:, None] >= slot)
    sees_slot = F.pad(sees_slot, (0, 0, num_new, 0)).expand(len(mask), -1, -1)
    sees = torch.cat([sees_text & mask.bool()[:, None], sees_slot], dim=2)
    return torch.zeros(sees.shape, dtype=dtype, device=mask.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def states_behind(
    decoder: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.Tensor,
    labels: torch.LongTensor,
    anchors: torch.LongTensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """
    The decoder's last states `(batch, anchors, size, dim)` at proto-tokens behind each anchor, the same as in a pass of
    its own over the text before it and its slots.

    Args:
        prompt_ids, prompt_mask, labels: as in [`text_so_far`].
        anchors (`torch.LongTensor` of shape `(batch, anchors)`): as in [`labels_behind`].
        slots (`torch.Tensor` of shape `(batch, size, dim)`): the same behind all anchors of a text.
    """
    ids, mask, num_read = text_so_far(prompt_ids, prompt_mask, labels)
    cache, _ = read_prefix(decoder, ids, mask, [])
    ends = ids.shape[1] - num_read[:, None] + anchors.minimum(num_read[:, None])
    number, size = ends.shape[1], slots.shape[1]
    tokens_before = F.pad(mask.cumsum(1), (1, 0)).gather(1, ends)
    with slots_at_the_end(number * size):
        output = decoder.base_model(
            inputs_embeds=slots.to(decoder.dtype).repeat(1, number, 1),
            attention_mask=pair_mask(mask, ends, size, decoder.dtype),
            position_ids=slot_positions(decoder, tokens_before, size),
            past_key_values=cache,
            use_cache=True,
        )
    return output.last_hidden_state.unflatten(1, (number, size))
