"""Plain regression onto banked proto-tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.proto_tokens import flatten_proto_tokens


class MeanSquaredErrorLoss(nn.Module):
    """
    Mean squared difference between predicted and banked proto-tokens, over texts and dimensions. A text has many
    solutions and their mean is none of them (Mezentsev & Oseledets, 2025, https://arxiv.org/abs/2505.21189, section 5):
    this is here for comparison.

    Inputs:
        `outputs.e`, `batch["bank_e"]` `(batch, chunks, num_e_tokens, dim)`; `outputs.m`, `batch["bank_m"]`
        `(batch, chunks, dim)`.
    """

    needs = {"bank"}

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = flatten_proto_tokens(outputs.e, outputs.m)
        return F.mse_loss(predicted, flatten_proto_tokens(batch["bank_e"], batch["bank_m"]))
