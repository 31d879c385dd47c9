"""Predicted proto-tokens against the banked ones of all processes, a chunk at a time."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

# Candidates that a batch is compared with at a time; of more than that, scores are made again in the backward pass.
CHUNK = 1024


def all_gather_candidates(vectors: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    The vectors `(batch, dim)` of all processes, one after the other, and the row at which one's own begin. They are
    data and have no gradient, so the gradients of a loss over own predictions and all candidates are exact: averaged
    over processes they are those of one process with the joined batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vectors, 0
    parts = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, vectors.contiguous())
    return torch.cat(parts), dist.get_rank() * len(vectors)


def map_candidate_chunks(
    part: Callable[[torch.Tensor, torch.Tensor, torch.BoolTensor], torch.Tensor],
    predicted: torch.Tensor,
    banked: torch.Tensor,
) -> torch.Tensor:
    """
    Calls `part(predicted, candidates, is_match)` for each chunk of the banked vectors of all processes.

    Args:
        part (`Callable`): from `(batch, dim)`, `(chunk, dim)` and `(batch, chunk)`, true where a candidate is a
            prediction's own, to a tensor.
        predicted, banked (`torch.Tensor` of shape `(batch, dim)`): of this process, row by row the same texts.

    Returns:
        `torch.Tensor` of shape `(chunks, ...)`.
    """
    banked, first = all_gather_candidates(banked)
    own = torch.arange(first, first + len(predicted), device=predicted.device)
    parts = []
    for start in range(0, len(banked), CHUNK):
        candidates = banked[start : start + CHUNK]
        is_match = own[:, None] == torch.arange(start, start + len(candidates), device=own.device)
        if len(banked) > CHUNK:
            parts.append(checkpoint(part, predicted, candidates, is_match, use_reentrant=False))
        else:
            parts.append(part(predicted, candidates, is_match))
    return torch.stack(parts)
