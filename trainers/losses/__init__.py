"""
Training objectives, one `nn.Module` a file. Each is called with the model's output and the batch, returns a scalar, and
says in `needs` what it reads that is not always there ([`needs_of`]).

`LOSSES` gives the names under which `ProtoGenTrainingArguments.losses` weights them.
"""

from collections.abc import Iterable

from .anchor import AnchorLoss
from .distance_based_logistic import DistanceBasedLogisticLoss
from .draft import DraftLoss
from .duration import DurationLoss
from .error_nll import ErrorNLLLoss
from .info_nce import InfoNCELoss
from .length_nll import LengthNLLLoss
from .mean_squared_error import MeanSquaredErrorLoss
from .reconstruction import ReconstructionLoss
from .relational_distillation import RelationalDistillationLoss
from .siglip import SigLIPLoss
from .soft_targets import OnPolicyLoss, SoftReconstructionLoss
from .token_head import TokenHeadLoss

LOSSES = {
    "reconstruction": ReconstructionLoss,
    "soft_reconstruction": SoftReconstructionLoss,
    "on_policy": OnPolicyLoss,
    "draft": DraftLoss,
    "token_head": TokenHeadLoss,
    "duration": DurationLoss,
    "length_nll": LengthNLLLoss,
    "error_nll": ErrorNLLLoss,
    "siglip": SigLIPLoss,
    "distance_based_logistic": DistanceBasedLogisticLoss,
    "info_nce": InfoNCELoss,
    "mean_squared_error": MeanSquaredErrorLoss,
    "anchor": AnchorLoss,
    "relational_distillation": RelationalDistillationLoss,
}


def needs_of(names: Iterable[str]) -> set[str]:
    """
    What losses of these names need beside proto-tokens, lengths and labels, as their `needs` say:

    - `answer_logits`: the decoder's pass;
    - `bank`: `bank_e` and `bank_m`, the banked proto-tokens of training texts, which evaluation has not;
    - `embeddings`: `teacher_embeddings`, a sentence encoder's, which evaluation has not either;
    - `durations`: what each of the prompt's tokens accounts for;
    - `output_embeddings`: the decoder's;
    - `label_targets`, `on_policy_targets`: what the teacher says of the labels, and of the student's own answers.
    """
    return set().union(*(LOSSES[name].needs for name in names))
