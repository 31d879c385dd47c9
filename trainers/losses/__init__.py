"""
Training objectives, one `nn.Module` a file. Each is called with the model's output and the batch, and returns a scalar.

`LOSSES` gives the names under which `ProtoGenTrainingArguments.losses` weights them.
"""

from .anchor import AnchorLoss
from .distance_based_logistic import DistanceBasedLogisticLoss
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

# Those that need the decoder's pass.
DECODER_LOSSES = ("reconstruction", "soft_reconstruction", "on_policy", "error_nll")
# Those that compare predictions with banked proto-tokens, and those that do with a sentence encoder's embeddings.
BANK_LOSSES = ("siglip", "distance_based_logistic", "info_nce", "mean_squared_error")
EMBEDDING_LOSSES = ("anchor", "relational_distillation")

__all__ = [
    "BANK_LOSSES",
    "DECODER_LOSSES",
    "EMBEDDING_LOSSES",
    "LOSSES",
    "AnchorLoss",
    "DistanceBasedLogisticLoss",
    "DurationLoss",
    "ErrorNLLLoss",
    "InfoNCELoss",
    "LengthNLLLoss",
    "MeanSquaredErrorLoss",
    "OnPolicyLoss",
    "ReconstructionLoss",
    "RelationalDistillationLoss",
    "SigLIPLoss",
    "SoftReconstructionLoss",
    "TokenHeadLoss",
]
