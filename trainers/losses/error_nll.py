"""Gaussian negative log-likelihood of the share of an answer's tokens that are wrong."""

import torch
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.objectives import error_nll


class ErrorNLLLoss(nn.Module):
    """
    Teaches the model how wrong it will be: Gaussian negative log-likelihood, with predicted mean and variance, of the
    share `d` of the label's tokens that the one-step argmax misses:

        L = 1/B sum_i ((d_i - mu_i)^2 / sigma_i^2 + log sigma_i^2) / 2

    with the gradient of `gaussian_nll`. The share is data here: no gradient flows to the tokens.

    References:
        Nix & Weigend, 1994, "Estimating the mean and variance of the target probability distribution", ICNN.

    Relations:
        [`LengthNLLLoss`] is the same likelihood for the length.

    Inputs:
        `outputs.answer_logits` `(answer_tokens, vocab)`; `outputs.error_mean`, `outputs.error_variance` `(batch,)`;
        `batch["labels"]` `(batch, length)`, -100 after the end.
    """

    needs = {"answer_logits"}

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return error_nll(outputs.error_mean, outputs.error_variance, outputs.answer_logits, batch["labels"])
