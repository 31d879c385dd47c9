"""The teacher's similarities between texts, imposed on `e`."""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput


class RelationalDistillationLoss(nn.Module):
    """
    Mean squared difference between the batch's cosine similarities of `e` and those of the teacher's embeddings `t`,
    over pairs of different texts:

        L = 1/(B (B-1)) sum_{i != j} (cos(e_i, e_j) - cos(t_i, t_j))^2

    References:
        Park et al., 2019, "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068, with cosine similarity
        as the relation of a pair; Tung & Mori, 2019, "Similarity-Preserving Knowledge Distillation",
        https://arxiv.org/abs/1907.09682.

    Relations:
        [`AnchorLoss`] also fixes where each `e` lies.

    Inputs:
        `outputs.e` `(batch, chunks, num_e_tokens, dim)`; `batch["teacher_embeddings"]` `(batch, teacher_dim)`. A batch
        of one has no pairs.
    """

    needs = {"embeddings"}

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        difference = similarities(outputs.e) - similarities(batch["teacher_embeddings"])
        apart = ~torch.eye(len(difference), dtype=torch.bool, device=difference.device)
        return difference[apart].square().sum() / max(1, apart.sum().item())


def similarities(vectors: torch.Tensor) -> torch.Tensor:
    """Cosine similarities `(batch, batch)` of `(batch, ...)`."""
    unit = F.normalize(vectors.flatten(1).float(), dim=-1)
    return unit @ unit.T
