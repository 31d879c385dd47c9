"""Cross-entropy of drafts, whose later tokens count less."""

import torch
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.objectives import IGNORE_INDEX, log_probabilities

# Weight of a drafted token relative to the one before it.
DECAY = 0.8


class DraftLoss(nn.Module):
    """
    Cross-entropy of drafts of a few tokens: the second is of use where the first is right, and so on.

        L = 1/B sum_i sum_k w_k -log p(y_ik | e_i, m_i),  w_k = 0.8^k / sum_j 0.8^j

    over the drafts `i` of a batch and their tokens `k`, of which one at a text's end has fewer.

    References:
        Cai et al., 2024, "Medusa", https://arxiv.org/abs/2401.10774, section 2.2.1.

    Relations:
        [`ReconstructionLoss`] counts all tokens of a text alike.

    Inputs:
        `outputs.answer_logits` `(drafted_tokens, vocab)`; `batch["labels"]` `(drafts, length)`, -100 after the end.
    """

    needs = {"answer_logits"}

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"]
        is_token = labels != IGNORE_INDEX
        weight = DECAY ** torch.arange(labels.shape[1], device=labels.device)
        log_p = log_probabilities(outputs.answer_logits, labels[is_token][:, None])[:, 0]
        return -((weight / weight.sum()).expand(labels.shape)[is_token] * log_p).sum() / len(labels)
