"""Softmax over banked proto-tokens: which of them is the predicted text's?"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.proto_tokens import flatten_proto_tokens

from .candidates import map_candidate_chunks

MAX_TEMPERATURE = 100.0


class InfoNCELoss(nn.Module):
    """
    Cross-entropy of finding each text's banked vector among those of the batches of all processes. With normalised
    predictions `x_i` and banked vectors `y_j` and a learned inverse temperature `t`, at most 100:

        L = -1/B sum_i log( exp(t x_i . y_i) / sum_j exp(t x_i . y_j) )

    One-directional, from prediction to bank, as in retrieval.

    References:
        van den Oord et al., 2018, "Representation Learning with Contrastive Predictive Coding",
        https://arxiv.org/abs/1807.03748, equation 4; the temperature as in Radford et al., 2021,
        https://arxiv.org/abs/2103.00020.

    Relations:
        [`SigLIPLoss`] asks of each pair alone.

    Inputs:
        `outputs.e`, `batch["bank_e"]` `(batch, chunks, num_e_tokens, dim)`; `outputs.m`, `batch["bank_m"]`
        `(batch, chunks, dim)`.
    """

    needs = {"bank"}

    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = F.normalize(flatten_proto_tokens(outputs.e, outputs.m), dim=-1)
        banked = F.normalize(flatten_proto_tokens(batch["bank_e"], batch["bank_m"]), dim=-1)
        temperature = self.log_temperature.exp().clamp(max=MAX_TEMPERATURE)

        def part(predicted, candidates, is_match):
            return (temperature * predicted @ candidates.T).logsumexp(1)

        partition = map_candidate_chunks(part, predicted, banked).logsumexp(0)
        return (partition - temperature * (predicted * banked).sum(1)).mean()
