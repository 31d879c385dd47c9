"""Pull of `e` to a projected teacher embedding."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput


class AnchorLoss(nn.Module):
    """
    Cosine distance between the `e` of each text's first chunk and the text's teacher embedding `t`, brought to the
    width of `e` by a fixed random map `P` with orthonormal rows or columns, which keeps the angles between texts:

        L = 1/B sum_i (1 - cos(e_i, P t_i))

    Args:
        seed (`int`): of the map.

    References:
        The anchor of arXiv:2602.18301, whose abstract names it; the form is ours.

    Relations:
        [`RelationalDistillationLoss`] asks for the teacher's similarities only, not for places.

    Inputs:
        `outputs.e` `(batch, chunks, num_e_tokens, dim)`; `batch["teacher_embeddings"]` `(batch, teacher_dim)`.
    """

    needs = {"embeddings"}

    def __init__(self, seed: int = 0):
        super().__init__()
        self.seed = seed

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        # How many chunks there are depends on the batch's longest answer.
        e, embeddings = outputs.e[:, 0].flatten(1).float(), batch["teacher_embeddings"].float()
        projection = random_map(e.shape[1], embeddings.shape[1], self.seed).to(e.device)
        return (1 - F.cosine_similarity(e, embeddings @ projection.T)).mean()


@cache
def random_map(dim: int, teacher_dim: int, seed: int) -> torch.Tensor:
    """A random `(dim, teacher_dim)` with orthonormal rows or columns, whichever are fewer."""
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(max(dim, teacher_dim), min(dim, teacher_dim), generator=generator)
    columns = torch.linalg.qr(tall).Q
    return columns if dim >= teacher_dim else columns.T
