"""The model that a recipe asks for, also where DeepSpeed spreads it over processes."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_protogen import ProtoGenForConditionalGeneration
from modeling_protogen.configuration_protogen import FITTED_SIZE
from modeling_protogen.frozen_decoder import embedding_std
from modeling_protogen.loading import load_weights

from .arguments import ModelArguments
from .embedded import resolve
from .lora import add_lora
from .protogen_trainer import ProtoGenTrainer


def build_model(model_args: ModelArguments, categories: list[str] | None) -> ProtoGenForConditionalGeneration:
    fields = asdict(model_args)
    encoder, decoder = fields.pop("encoder"), resolve(fields.pop("decoder"))
    encoder = resolve(encoder) if model_args.uses_encoder else None
    dtype = getattr(torch, fields.pop("decoder_dtype"))
    of_processor = ("max_input_length", "max_prompt_length", "prompt_template", "answer_format")
    for name in (*of_processor, "encoder_lora_rank"):
        fields.pop(name)
    if is_deepspeed_zero3_enabled():
        fields["proto_token_std"] = FITTED_SIZE * spread_embedding_std(
            decoder, model_args.decoder_revision, model_args.trust_remote_code
        )
    return ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder, decoder, decoder_dtype=dtype, categories=categories, **fields
    )


def start_from(model: ProtoGenForConditionalGeneration, folder: str) -> None:
    """
    Takes over the trained weights of another run's model. What it lacks stays as it is: slot adapters, the map between
    drafted tokens, and word embeddings of a packed model's encoder.
    """
    weights = load_weights(load_file, Path(folder) / SAFE_WEIGHTS_NAME)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    kept = (
        "decoder.",
        "slot_adapters.",
        "coherence.",
        *([model.word_embeddings_name] if model.encoder is not None else []),
    )
    lacking = [name for name in missing if not name.startswith(kept)]
    if lacking or unexpected:
        raise ValueError(
            f"{folder} has other weights than this recipe's model, {(lacking + unexpected)[0]} for one: start_from "
            "needs a model of the same shape."
        )


def start_deepspeed_on_cpus() -> None:
    """Before a model is built, which ZeRO-3 spreads over the processes at once; by itself it would look for MPI."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def spread_embedding_std(decoder: str, revision: str | None, trust_remote_code: bool) -> float:
    """Standard deviation of the decoder's input embeddings, which ZeRO-3 spreads over the processes."""
    import deepspeed

    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_weights(AutoModelForCausalLM.from_pretrained, decoder, **source)
    with deepspeed.zero.GatheredParameters(model.get_input_embeddings().weight):
        return embedding_std(model)


def whole_model(
    trainer: ProtoGenTrainer, model_args: ModelArguments, categories: list[str] | None
) -> ProtoGenForConditionalGeneration | None:
    """On the main process, all of the weights that DeepSpeed has spread over the processes."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()
    if not trainer.is_world_process_zero():
        return None
    model = build_model(model_args, categories)
    if model_args.encoder_lora_rank:
        add_lora(model, model_args.encoder_lora_rank)
    model.load_state_dict(weights)
    return model
