"""
Under mixed precision accelerate copies all that a model returns to float32: the logits are a training step's largest
tensor, and the losses take them as they are.
"""

import functools
from types import MethodType

from accelerate.utils.operations import ConvertOutputsToFp32, convert_to_fp32
from torch import nn


def keep_logits(model: nn.Module) -> None:
    """Keeps logits in the decoder's dtype when accelerate upcasts model outputs to float32."""
    conversion = getattr(model.forward, "__wrapped__", None)
    if not isinstance(conversion, ConvertOutputsToFp32):
        return
    in_autocast = conversion.model_forward

    @functools.wraps(in_autocast)
    def forward(self, *args, **kwargs):
        output = in_autocast(self, *args, **kwargs)
        kept = {name: value if name == "answer_logits" else convert_to_fp32(value) for name, value in output.items()}
        return type(output)(**kept)

    model.forward = MethodType(forward, model)
