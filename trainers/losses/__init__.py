"""
Training objectives, one `nn.Module` a file. Each is called with the model's output and the batch, and returns a scalar.

`LOSSES` gives the names under which `ProtoGenTrainingArguments.losses` weights them.
"""

from .distance_based_logistic import DistanceBasedLogisticLoss
from .length_nll import LengthNLLLoss
from .reconstruction import ReconstructionLoss
from .siglip import SigLIPLoss

LOSSES = {
    "reconstruction": ReconstructionLoss,
    "length_nll": LengthNLLLoss,
    "siglip": SigLIPLoss,
    "distance_based_logistic": DistanceBasedLogisticLoss,
}

# Those that compare predictions with banked proto-tokens.
BANK_LOSSES = ("siglip", "distance_based_logistic")

__all__ = ["BANK_LOSSES", "LOSSES", "DistanceBasedLogisticLoss", "LengthNLLLoss", "ReconstructionLoss", "SigLIPLoss"]
