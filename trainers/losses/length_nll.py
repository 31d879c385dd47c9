"""Gaussian negative log-likelihood of the answer's log length."""

import torch
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.objectives import IGNORE_INDEX, length_nll


class LengthNLLLoss(nn.Module):
    """
    Gaussian negative log-likelihood of the log of the answer's length in tokens, with predicted mean and variance:

        L = 1/B sum_i ((log n_i - mu_i)^2 / sigma_i^2 + log sigma_i^2) / 2

    with the gradient of `gaussian_nll`. The variance is bounded by `ProtoGenConfig.log_length_variance_range`, so
    that the loss cannot run away.

    References:
        Nix & Weigend, 1994, "Estimating the mean and variance of the target probability distribution", ICNN.

    Inputs:
        `outputs.log_length_mean`, `outputs.log_length_variance` `(batch,)`; `batch["length_labels"]` `(batch,)`, or
        `batch["labels"]` `(batch, length)` when the true lengths are not given.
    """

    needs = set()

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        lengths = batch.get("length_labels")
        if lengths is None:
            lengths = (batch["labels"] != IGNORE_INDEX).sum(-1)
        return length_nll(outputs.log_length_mean, outputs.log_length_variance, lengths)
