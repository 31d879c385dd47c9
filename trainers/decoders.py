"""
Decoders by name: a Hub id, a folder or an `embedded:` name, or a variant of one to compare it with:

    NAME@first:10                    its first 10 layers
    NAME@untrained                   the same model with random weights
    NAME@untrained-gpt_neox:256x6    a GPTNeoX of 6 layers of width 256 with random weights, and NAME's tokenizer
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import PROCESSOR_NAME

from modeling_protogen import ProtoGenConfig, ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.frozen_decoder import keep_special_tokens
from modeling_protogen.loading import load_tokenizer, load_weights

from .devices import best_device, fastest_dtype
from .embedded import PREFIX, resolve
from .text_files import read_json

# The fields of a processor, without what says whether it has an encoder.
PROCESSOR_FIELDS = (
    *("max_input_length", "max_prompt_length", "max_answer_length"),
    *("prompt_template", "answer_format", "aligns_encoder", "vocabularies"),
)
VARIANTS = re.compile(r"first:(?P<layers>\d+)|untrained|untrained-gpt_neox:(?P<width>\d+)x(?P<depth>\d+)")

FUSE_HELP = "faster answers by a second copy of the decoder's linear weights, with the slot adapters in it"


def load_decoder(
    name: str, revision: str | None, dtype: str, device: torch.device, trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """
    The decoder's tokenizer and the decoder.

    Args:
        name (`str`): Hub id, folder or `embedded:` name, with `@` and one of `VARIANTS` behind it for a variant.
        revision (`str`, *optional*): on the Hub; the newest by default.
        dtype (`str`): of the weights, as `"bfloat16"`.
        device (`torch.device`): where it goes.
        trust_remote_code (`bool`, defaults to False): run the code that comes with it.

    Raises:
        ValueError: if the variant is not one of those above, or has more layers than the model.
    """
    name, _, variant = name.partition("@")
    path, dtype = resolve(name), getattr(torch, dtype)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(path, **source)
    wanted = VARIANTS.fullmatch(variant)
    if not variant:
        decoder = load_weights(AutoModelForCausalLM.from_pretrained, path, **source, dtype=dtype)
    elif not wanted:
        raise ValueError(f"unknown variant {variant!r} of {name}; there are first:LAYERS, untrained and "
                         "untrained-gpt_neox:WIDTHxLAYERS.")  # fmt: skip
    elif wanted["layers"]:
        config, layers = AutoConfig.from_pretrained(path, **source), int(wanted["layers"])
        if not 1 <= layers <= config.num_hidden_layers:
            raise ValueError(f"{name} has {config.num_hidden_layers} layers; first:{layers} cannot be taken of it.")
        source |= {"dtype": dtype, "num_hidden_layers": layers}
        decoder = load_weights(AutoModelForCausalLM.from_pretrained, path, **source)
    else:
        config = AutoConfig.from_pretrained(path, **source)
        if wanted["width"]:
            config = gpt_neox_config(int(wanted["width"]), int(wanted["depth"]), config)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            decoder = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            ).to(dtype)
    keep_special_tokens(decoder)
    return tokenizer, decoder.to(device)


def trained_config(folder: str | Path, **source) -> ProtoGenConfig:
    """
    A trained model's configuration; arguments as in [`networks_of`].

    Raises:
        FileNotFoundError: if there is no such folder, and the Hub has no such model or cannot be asked. Hub ids are
            `org/name`, where no folder `org` is here.
    """
    parts = str(folder).split("/")
    is_folder = Path(folder).is_dir()
    if not is_folder and (len(parts) != 2 or parts[0].startswith((".", "~")) or Path(parts[0]).is_dir()):
        raise FileNotFoundError(f"there is no model folder {folder}, and it is no Hub id either.")
    try:
        return ProtoGenConfig.from_pretrained(folder, **source)
    except OSError as error:
        if is_folder:
            raise
        raise FileNotFoundError(
            f"there is no folder {folder}, and the Hub gave no model of that name: {error}"
        ) from error


def networks_of(folder: str | Path, decoder: str | None = None, **source) -> dict[str, Path | str]:
    """
    Where a trained model's networks are that are not where its configuration says: options of `from_pretrained`.

    Args:
        folder (`str` or `Path`): or a Hub id.
        decoder (`str`, *optional*): a thin checkpoint's decoder, where it has moved; may have an `embedded:` name, as
            the checkpoint's own, and its encoder's, may.
        **source: `revision` and `trust_remote_code`, as in `from_pretrained`.
    """
    config = trained_config(folder, **source)
    moved = {}
    if decoder or (config.decoder_name_or_path or "").startswith(PREFIX):
        moved["decoder_name_or_path"] = resolve(decoder or config.decoder_name_or_path)
    if (config.encoder_name_or_path or "").startswith(PREFIX):
        moved["encoder_name_or_path"] = resolve(config.encoder_name_or_path)
    return moved


def load_protogen(
    folder: str | Path, dtype: str = "auto", decoder: str | None = None
) -> ProtoGenForConditionalGeneration:
    """
    A trained model.

    Args:
        folder (`str` or `Path`): or a Hub id.
        dtype (`str`, defaults to `"auto"`): of the weights; `auto` is the fastest one here.
        decoder (`str`, *optional*): as in [`networks_of`].
    """
    dtype = getattr(torch, fastest_dtype() if dtype == "auto" else dtype)
    networks = networks_of(folder, decoder)
    return ProtoGenForConditionalGeneration.from_pretrained(folder, dtype=dtype, **networks).eval()


def load_processor_of(folder: str | Path, decoder: str | None = None, **source) -> ProtoGenProcessor:
    """
    A trained model's processor; a packed one has the encoder's and the decoder's own tokenizers, which are not packed
    with it.

    Args:
        folder (`str` or `Path`): or a Hub id.
        decoder (`str`, *optional*), **source: as in [`networks_of`].
    """
    path = Path(folder) / PROCESSOR_NAME
    fields = read_json(path) if path.is_file() else {"for_encoder": True}
    tokenizers = [path.parent / "tokenizer_config.json", path.parent / "decoder_tokenizer"]
    config = trained_config(folder, **source)
    encoder = config.encoder_name_or_path
    if (fields["for_encoder"] and not encoder) or any(tokenizer.exists() for tokenizer in tokenizers):
        return ProtoGenProcessor.from_pretrained(folder, **source)
    options = {name: value for name, value in fields.items() if name in PROCESSOR_FIELDS}
    return ProtoGenProcessor.from_encoder_decoder_pretrained(
        encoder and resolve(encoder), resolve(decoder or config.decoder_name_or_path), **options
    )


def add_loading_options(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """Options of a command line whose values [`load_trained`] takes."""
    parser.add_argument("--dtype", default=dtype, choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--fuse-adapters", action="store_true", help=FUSE_HELP)
    parser.add_argument("--decoder", help="load a thin checkpoint's decoder from here")


def load_trained(
    name: str, dtype: str = "auto", decoder: str | None = None, fuses_adapters: bool = False
) -> tuple[ProtoGenForConditionalGeneration, ProtoGenProcessor]:
    """
    A trained model on the best device, and its processor.

    Args:
        name (`str`): folder or Hub id.
        dtype (`str`, defaults to `"auto"`): of the weights; `auto` is the fastest one here.
        decoder (`str`, *optional*): as in [`networks_of`].
        fuses_adapters (`bool`, defaults to False): see [`ProtoGenForConditionalGeneration.fuse_slot_adapters`].

    Raises:
        FileNotFoundError: as [`trained_config`].
        ValueError: if there are no adapters to fuse, or they cannot be fused.
    """
    processor = load_processor_of(name, decoder)
    model = load_protogen(name, dtype, decoder).to(best_device())
    if fuses_adapters:
        model.fuse_slot_adapters()
    return model, processor


def gpt_neox_config(width: int, layers: int, like) -> GPTNeoXConfig:
    """A GPTNeoX with heads of 64 as in the Pythia suite, for the tokens of another model."""
    return GPTNeoXConfig(
        vocab_size=like.vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        intermediate_size=4 * width,
        bos_token_id=like.bos_token_id,
        eos_token_id=like.eos_token_id,
        tie_word_embeddings=False,
    )


def load_frozen_decoder(name: str, dtype: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The decoder's tokenizer, and the decoder in memory of its own, so that using it first costs no reading."""
    path = resolve(name)
    device = best_device()
    decoder = load_weights(AutoModelForCausalLM.from_pretrained, path, dtype=getattr(torch, dtype)).to(device)
    keep_special_tokens(decoder)
    for parameter in decoder.parameters():
        parameter.data = parameter.data.clone()
    return load_tokenizer(path), decoder.requires_grad_(False).eval()
