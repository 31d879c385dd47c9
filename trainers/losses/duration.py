"""Cross-entropy of how many answer tokens each of the prompt's accounts for."""

import torch
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.objectives import duration_nll


class DurationLoss(nn.Module):
    """
    Cross-entropy of the duration `d` of each of the prompt's tokens, which `upsamples_prompt` needs to know: the mean
    over a prompt's tokens, then over prompts. Examples whose durations are -100 have no part in it.

        L = 1/B sum_i 1/P_i sum_s -log p(d_is)

    References:
        Gu et al., 2018, "Non-Autoregressive Neural Machine Translation", https://arxiv.org/abs/1711.02281, where it is
        called fertility.

    Inputs:
        `outputs.duration_logits` `(batch, prompt, classes)`; `batch["durations"]`, `batch["decoder_prompt_mask"]`
        `(batch, prompt)`.
    """

    needs = {"durations"}

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return duration_nll(outputs.duration_logits, batch["durations"], batch["decoder_prompt_mask"])
