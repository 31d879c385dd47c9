"""Cross-entropy with the teacher's distribution instead of one token."""

import torch
from torch import nn

from modeling_protogen.modeling_protogen import ProtoGenOutput
from modeling_protogen.objectives import IGNORE_INDEX, log_probabilities, mean_over_texts


class SoftTargetLoss(nn.Module):
    """
    Cross-entropy of the one-step distribution `p` with the teacher's most likely tokens `K` and their probabilities
    `q`, which add up to 1:

        L = 1/B sum_i 1/N_i sum_t sum_{v in K_it} -q_it(v) log p_it(v)

    With one token it is [`ReconstructionLoss`] on the teacher's choice.

    Args:
        targets (`str`): key of the batch with the teacher's token ids and probabilities, each `(answer_tokens, k)`.

    References:
        Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531.

    Inputs:
        `outputs.answer_logits` `(answer_tokens, vocab)`; `batch[targets]`; `batch["labels"]` `(batch, length)`, -100
        after the end, for the lengths.
    """

    targets: str

    def forward(self, outputs: ProtoGenOutput, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids, q = batch[self.targets]
        log_p = log_probabilities(outputs.answer_logits, ids)
        return mean_over_texts(-(q * log_p).sum(-1), batch["labels"] != IGNORE_INDEX)


class SoftReconstructionLoss(SoftTargetLoss):
    """[`SoftTargetLoss`] where the teacher reads the label's own tokens: what it would have said at each of them."""

    targets = "label_targets"
    needs = {"answer_logits", "label_targets"}


class OnPolicyLoss(SoftTargetLoss):
    """
    [`SoftTargetLoss`] where the teacher reads the student's own one-step answer: what it would have said after the
    tokens that the student wrote.

    References:
        Multi-token prediction by self-distillation, https://arxiv.org/abs/2602.06019.
    """

    targets = "on_policy_targets"
    needs = {"answer_logits", "on_policy_targets"}
