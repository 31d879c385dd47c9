"""The ProtoGen model: a trainable encoder predicts proto-tokens, a frozen decoder writes the answer in one pass."""

from .configuration_protogen import ProtoGenConfig
from .modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenOutput
from .processing_protogen import ProtoGenProcessor

__all__ = ["ProtoGenConfig", "ProtoGenForConditionalGeneration", "ProtoGenOutput", "ProtoGenProcessor"]
