"""Sigmoid loss between predicted and banked proto-tokens."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.proto_tokens import flatten_proto_tokens

from .candidates import map_candidate_chunks


class SigLIPLoss(nn.Module):
    """
    Pairwise sigmoid loss between predicted and banked proto-tokens. Every pair of the batches of all processes is a
    binary problem; with `x_i` the normalised prediction of text i, `y_j` the normalised banked vector of text j, `z_ij`
    1 where they are of one text and -1 elsewhere, and learned temperature `t` and bias `b`:

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

    needs = {"bank"}

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = F.normalize(flatten_proto_tokens(outputs.e, outputs.m), dim=-1)
        banked = F.normalize(flatten_proto_tokens(batch["bank_e"], batch["bank_m"]), dim=-1)

        def part(predicted, candidates, is_match):
            logits = self.log_temperature.exp() * predicted @ candidates.T + self.bias
            return -F.logsigmoid(torch.where(is_match, logits, -logits)).sum()

        return map_candidate_chunks(part, predicted, banked).sum() / len(predicted)
