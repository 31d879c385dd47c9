"""Sigmoid loss between predicted and banked proto-tokens."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput


def flatten_proto_tokens(e: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """One vector a text: `e` `(batch, chunks, num_e_tokens, dim)` and `m` `(batch, chunks, dim)` side by side."""
    return torch.cat([e.flatten(1), m.flatten(1)], dim=1).float()


class SigLIPLoss(nn.Module):
    """
    Pairwise sigmoid loss between predicted and banked proto-tokens. Every pair in the batch is a binary problem; with
    `x_i` the normalised prediction of text i, `y_j` the normalised banked vector of text j, `z_ij` 1 on the diagonal
    and -1 elsewhere, and learned temperature `t` and bias `b`:

        L = -1/B sum_i sum_j log sigmoid(z_ij (t x_i . y_j + b))

    `t` starts at 10 and `b` at -10, as in the paper.

    References:
        Zhai et al., 2023, "Sigmoid loss for language image pre-training", https://arxiv.org/abs/2303.15343.

    Relations:
        [`DistanceBasedLogisticLoss`] is the same problem on Euclidean distances, with nothing learned.

    Inputs:
        `outputs.e`, `batch["bank_e"]` `(batch, chunks, num_e_tokens, dim)`; `outputs.m`, `batch["bank_m"]`
        `(batch, chunks, dim)`.
    """

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = F.normalize(flatten_proto_tokens(outputs.e, outputs.m), dim=-1)
        banked = F.normalize(flatten_proto_tokens(batch["bank_e"], batch["bank_m"]), dim=-1)
        logits = self.log_temperature.exp() * predicted @ banked.T + self.bias
        signs = 2 * torch.eye(len(logits), device=logits.device) - 1
        return -F.logsigmoid(signs * logits).sum() / len(logits)
