"""Low-rank adapters in the encoder, so that few of its weights are trained (Hu et al., 2021, arXiv:2106.09685)."""

from peft import LoraConfig, get_peft_model

from modeling_protogen import ProtoGenForConditionalGeneration


def add_lora(model: ProtoGenForConditionalGeneration, rank: int) -> None:
    """Freezes the encoder and puts adapters of that rank into all of its linear layers."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model.encoder = get_peft_model(model.encoder, config)


def merge_lora(model: ProtoGenForConditionalGeneration) -> None:
    """Adds the adapters to the weights they adapt: the encoder is a plain one again."""
    model.encoder = model.encoder.merge_and_unload()
