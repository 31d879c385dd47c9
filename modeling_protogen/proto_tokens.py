"""
Where proto-tokens stand: pure functions from `(e, m, lengths)` to the decoder's inputs.

A *slot* is a decoder position that holds a proto-token. An answer of `N` tokens is cut into chunks of `chunk_size`;
each chunk has its own `(e, m)`, and the chunks' slots follow one another in the same pass. With `C` tokens in a chunk
(the last one may be shorter) and `k` e-tokens:

    e_m          [e_1]..[e_k][m]*(C-1)    the last e predicts the chunk's first token
    e_mN         [e_1]..[e_k][m]*C        the e's predict nothing
    interleaved  [e][m][e][m]...          C slots, each predicts one token
    halves       [e]*ceil(C/2)[m]*floor(C/2)
    e_only       [e]*C

In all but `halves` a slot's content does not depend on the answer's length: a longer layout holds every shorter one.
An answer's first tokens may be predicted by the tokens before the slots; then the slots for them predict nothing.
(Arrangements: table 1 of Mezentsev & Oseledets, arXiv:2505.21189.)
"""

from dataclasses import dataclass

import torch

ARRANGEMENTS = ("e_m", "e_mN", "interleaved", "halves", "e_only")


def num_unguided(arrangement: str, num_e_tokens: int = 1) -> int:
    """Slots at the head of each chunk that predict no answer token."""
    return {"e_m": num_e_tokens - 1, "e_mN": num_e_tokens}.get(arrangement, 0)


@dataclass
class Layout:
    """
    The slots of a batch. Rows shorter than the longest one are padded on the right.

    Args:
        source (`torch.LongTensor` of shape `(batch, slots)`):
            Row of the table `[e of chunk 1, ..., e of chunk K, m of chunk 1, ..., m of chunk K]` that fills the slot.
        mask (`torch.BoolTensor` of shape `(batch, slots)`): whether the slot is in use.
        predicts (`torch.BoolTensor` of shape `(batch, slots)`):
            Whether the slot predicts an answer token. Read row by row, the true slots predict the answers' tokens in
            order.
    """

    source: torch.LongTensor
    mask: torch.BoolTensor
    predicts: torch.BoolTensor


def build_layout(
    lengths: torch.LongTensor, arrangement: str, chunk_size: int, num_chunks: int, num_e_tokens: int = 1
) -> Layout:
    """
    Lays out answers of the given lengths.

    Args:
        lengths (`torch.LongTensor` of shape `(batch,)`): answer lengths in tokens, EOS included.
        arrangement (`str`): one of `ARRANGEMENTS`.
        chunk_size (`int`): answer tokens in a full chunk.
        num_chunks (`int`): chunks for which there are proto-tokens.
        num_e_tokens (`int`): e-tokens a chunk.

    Raises:
        ValueError: if a length is below 1 or above `chunk_size * num_chunks`.
    """
    shortest, longest = lengths.min().item(), lengths.max().item()
    if shortest < 1 or longest > chunk_size * num_chunks:
        raise ValueError(
            f"answer lengths must lie in 1..{chunk_size * num_chunks} tokens "
            f"({num_chunks} chunk(s) of {chunk_size}); got {shortest}..{longest}."
        )
    unguided = num_unguided(arrangement, num_e_tokens)
    slots_per_chunk = unguided + chunk_size
    num_slots = lengths + unguided * (-(-lengths // chunk_size))

    slot = torch.arange(num_slots.max().item(), device=lengths.device)
    chunk, place = slot // slots_per_chunk, slot % slots_per_chunk
    mask = slot < num_slots[:, None]
    if arrangement in ("e_m", "e_mN"):
        is_m = (place >= num_e_tokens).expand_as(mask)
    elif arrangement == "interleaved":
        is_m = (place % 2 == 1).expand_as(mask)
    elif arrangement == "halves":
        tokens_in_chunk = (lengths[:, None] - chunk * chunk_size).clamp(0, chunk_size)
        is_m = place >= (tokens_in_chunk + 1) // 2
    else:
        is_m = torch.zeros_like(mask)

    e_source = chunk * num_e_tokens + place.clamp_max(num_e_tokens - 1)
    m_source = num_chunks * num_e_tokens + chunk
    return Layout(
        source=torch.where(is_m, m_source, e_source),
        mask=mask,
        predicts=mask & (place >= unguided),
    )


def longest_answer(
    num_slots: torch.LongTensor, arrangement: str, chunk_size: int, num_e_tokens: int = 1
) -> torch.LongTensor:
    """Tokens of the longest answer that needs at most so many slots, below 1 if there is none; any shape."""
    unguided = num_unguided(arrangement, num_e_tokens)
    slots_per_chunk = unguided + chunk_size
    return num_slots // slots_per_chunk * chunk_size + (num_slots % slots_per_chunk - unguided).clamp_min(0)


def predicting_positions(layout: Layout, num_autoregressive_tokens: int) -> torch.BoolTensor:
    """
    Whether each of the prefix's last positions, and each slot, predicts an answer token: `(batch,
    num_autoregressive_tokens + slots)`. The first `num_autoregressive_tokens` tokens are the prefix's, and no slot's.
    """
    number = layout.predicts.cumsum(1)
    is_own = number[:, -1:] > torch.arange(num_autoregressive_tokens, device=number.device)
    return torch.cat([is_own, layout.predicts & (number > num_autoregressive_tokens)], dim=1)


def fill_slots(layout: Layout, e: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """
    Puts proto-tokens into their slots; differentiable in every argument but the layout.

    Args:
        layout (`Layout`): from `build_layout`.
        e (`torch.Tensor` of shape `(batch, num_chunks, num_e_tokens, dim)`)
        m (`torch.Tensor` of shape `(batch, num_chunks, dim)`)

    Returns:
        `torch.Tensor` of shape `(batch, slots, dim)`, in the dtype of `e`.
    """
    table = torch.cat([e.flatten(1, 2), m], dim=1)
    return table.gather(1, layout.source[..., None].expand(-1, -1, table.shape[-1]))


def flatten_proto_tokens(e: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """One vector a text, float32: `e` `(batch, chunks, num_e_tokens, dim)` and `m` `(batch, chunks, dim)` joined."""
    return torch.cat([e.flatten(1), m.flatten(1)], dim=1).float()


def position_ids(attention_mask: torch.Tensor) -> torch.LongTensor:
    """Positions counted over the real tokens only, so that left padding changes nothing; shape as the mask."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
