"""The ProtoGen model: a trainable encoder predicts proto-tokens, a frozen decoder writes the answer in one pass."""

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoProcessor

from .configuration_protogen import ProtoGenConfig
from .generation_protogen import ProtoGenGenerationConfig
from .modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenOutput
from .processing_protogen import ProtoGenProcessor

__all__ = [
    "ProtoGenConfig",
    "ProtoGenForConditionalGeneration",
    "ProtoGenGenerationConfig",
    "ProtoGenOutput",
    "ProtoGenProcessor",
]

# With the package imported, the auto classes load ProtoGen models without remote code.
AutoConfig.register("protogen", ProtoGenConfig, exist_ok=True)
AutoModel.register(ProtoGenConfig, ProtoGenForConditionalGeneration, exist_ok=True)
AutoModelForSeq2SeqLM.register(ProtoGenConfig, ProtoGenForConditionalGeneration, exist_ok=True)
AutoProcessor.register(ProtoGenConfig, ProtoGenProcessor, exist_ok=True)
