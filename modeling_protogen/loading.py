"""Loading what is pretrained: transformers does not say which file it cannot read, and this does."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError  # For its name: nothing is unpickled here.

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase


class DamagedTokenizer(OSError):
    """A tokenizer's file that is cut off or overwritten."""


def load_tokenizer(name_or_path: str | Path, subfolder: str = "", **options) -> PreTrainedTokenizerBase:
    """
    As `AutoTokenizer` does, which says nothing of the file that it cannot read.

    Raises:
        DamagedTokenizer: if there is such a file; the message names it.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, subfolder=subfolder, **options)
    except Exception as error:
        folder = Path(name_or_path, subfolder)
        damaged = [path.name for path in sorted(folder.glob("*token*.json")) if not is_tokenizers(path)]
        # The tokenizers library has no error of its own.
        if not damaged and not isinstance(error, json.JSONDecodeError) and type(error) is not Exception:
            raise
        names = " and ".join(damaged) or "a file of the tokenizer"
        raise DamagedTokenizer(f"{names} in {folder} is damaged ({error}): get the tokenizer again.") from error


def is_tokenizers(path: Path) -> bool:
    """Whether a file is the JSON object that its name promises."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and (path.name != "tokenizer.json" or "model" in content)


def load_weights(load: Callable, name_or_path: str | Path, *args, **options):
    """
    What `load(name_or_path, *args, **options)` gives, a `from_pretrained` or what reads a file.

    Raises:
        ValueError: if a file of weights is damaged; the message has the name.
    """
    try:
        return load(name_or_path, *args, **options)
    except Exception as error:
        if not is_damage(error):
            raise
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise ValueError(f"the weights of {name_or_path} are damaged ({reason}): get them again.") from error


def is_damage(error: Exception) -> bool:
    """Whether weights are no weights, or cut off: safetensors, a pickle or a zip archive of PyTorch."""
    if isinstance(error, OSError):
        return error.errno == errno.EINVAL
    if isinstance(error, RuntimeError):
        return "unexpected EOF" in str(error) or "PytorchStreamReader" in str(error)
    return isinstance(error, (SafetensorError, UnpicklingError, EOFError))
