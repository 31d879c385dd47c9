"""Cross-entropy of how many answer tokens each of the prompt's accounts for."""

import torch
import torch.nn.functional as F
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.objectives import IGNORE_INDEX, mean_over_texts


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

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch["decoder_prompt_mask"].bool() & (batch["durations"] != IGNORE_INDEX)
        if not mask.any():
            return outputs.duration_logits.sum() * 0
        logits = outputs.duration_logits.float()
        nll = F.cross_entropy(logits[mask], batch["durations"][mask], reduction="none")
        return mean_over_texts(nll, mask[mask.any(1)])
