"""Cross-entropy of the answer through the frozen decoder."""

import torch
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.objectives import reconstruction_loss


class ReconstructionLoss(nn.Module):
    """
    Cross-entropy of the answer's tokens under the frozen decoder's one-step logits; the main loss. Gradients reach the
    encoder through the decoder:

        L = 1/B sum_i 1/N_i sum_t -log p(y_it | e_i, m_i)

    The mean is over a text's tokens first, then over texts, so that equal micro-batches average exactly under gradient
    accumulation.

    References:
        Proto-tokens: Mezentsev & Oseledets, 2025, https://arxiv.org/abs/2505.21189.

    Inputs:
        `outputs.answer_logits` `(answer_tokens, vocab)`; `batch["labels"]` `(batch, length)`, -100 after the end.
    """

    needs = {"answer_logits"}

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return reconstruction_loss(outputs.answer_logits, batch["labels"])
