"""
Training objectives, one `nn.Module` a file. Each is called with the model's output and the batch, and returns a scalar.

`LOSSES` gives the names under which `ProtoGenTrainingArguments.losses` weights them.
"""

from .distance_based_logistic import DistanceBasedLogisticLoss
from .info_nce import InfoNCELoss
from .length_nll import LengthNLLLoss
from .mean_squared_error import MeanSquaredErrorLoss
from .reconstruction import ReconstructionLoss
from .siglip import SigLIPLoss
from .soft_targets import OnPolicyLoss, SoftReconstructionLoss

LOSSES = {
    "reconstruction": ReconstructionLoss,
    "soft_reconstruction": SoftReconstructionLoss,
    "on_policy": OnPolicyLoss,
    "length_nll": LengthNLLLoss,
    "siglip": SigLIPLoss,
    "distance_based_logistic": DistanceBasedLogisticLoss,
    "info_nce": InfoNCELoss,
    "mean_squared_error": MeanSquaredErrorLoss,
}

# Those that compare predictions with banked proto-tokens.
BANK_LOSSES = ("siglip", "distance_based_logistic", "info_nce", "mean_squared_error")

__all__ = [
    "BANK_LOSSES",
    "LOSSES",
    "DistanceBasedLogisticLoss",
    "InfoNCELoss",
    "LengthNLLLoss",
    "MeanSquaredErrorLoss",
    "OnPolicyLoss",
    "ReconstructionLoss",
    "SigLIPLoss",
    "SoftReconstructionLoss",
]
