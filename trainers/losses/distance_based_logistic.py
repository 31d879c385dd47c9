"""Distance-based logistic loss between predicted and banked proto-tokens."""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.proto_tokens import flatten_proto_tokens

from .candidates import map_candidate_chunks


class DistanceBasedLogisticLoss(nn.Module):
    """
    Log loss of the probability that a predicted and a banked text match, given the squared Euclidean distance `D` of
    their normalised proto-tokens and a margin `m`:

        p_ij = (1 + exp(-m)) / (1 + exp(D_ij - m))
        L = 1/B sum_i (-log p_ii - 1/(B-1) sum_{j != i} log(1 - p_ij))

    All pairs of the batches of all processes are used; matching and other pairs weigh the same in sum. A batch of
    one has no other pairs.

    Args:
        margin (`float`): distance at which a pair is as likely a match as not, about; distances lie in 0..4.

    References:
        Vo & Hays, 2016, "Localizing and orienting street views using overhead imagery",
        https://arxiv.org/abs/1608.00161, section 3.5.

    Relations:
        [`SigLIPLoss`] is the same problem on cosines, with a learned temperature and bias.

    Inputs:
        `outputs.e`, `batch["bank_e"]` `(batch, chunks, num_e_tokens, dim)`; `outputs.m`, `batch["bank_m"]`
        `(batch, chunks, dim)`.
    """

    needs = {"bank"}

    def __init__(self, margin: float = 1.0):
        super().__init__()
        self.margin = margin

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        predicted = F.normalize(flatten_proto_tokens(outputs.e, outputs.m), dim=-1)
        banked = F.normalize(flatten_proto_tokens(batch["bank_e"], batch["bank_m"]), dim=-1)
        margin = torch.tensor(self.margin, device=predicted.device)

        def part(predicted, candidates, is_match):
            distance = (2 - 2 * predicted @ candidates.T).clamp_min(0)
            # log p = log(1 + e^-m) - log(1 + e^(D-m)), and 1 - p = (e^(D-m) - e^-m) / (1 + e^(D-m)).
            log_p = F.softplus(-margin) - F.softplus(distance - margin)
            log_not_p = distance.expm1().clamp_min(1e-12).log() - margin - F.softplus(distance - margin)
            return -torch.stack([log_p[is_match].sum(), log_not_p[~is_match].sum(), (~is_match).sum()])

        match, other, num_others = map_candidate_chunks(part, predicted, banked).sum(0)
        loss = match / len(predicted)
        return loss - other / num_others if num_others else loss
