"""Going on with interrupted training: from its newest whole checkpoint, and only with what that was made with."""

import json
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_protogen import ProtoGenConfig, ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.frozen_decoder import decoder_fingerprint

from .data import Example
from .files import differences, file_sha256, json_sha256, read_run_json, sync, sync_folder, write_json

CHECKSUMS_NAME = "checksums.json"
RUN_NAME = "run.json"
# Where something was loaded from does not matter, what it was is compared by itself.
NOT_COMPARED = ("decoder_name_or_path", "decoder_revision", "decoder_config", "encoder_config", "thin")


def begin_checkpoint(folder: Path) -> None:
    """Marks a checkpoint as unfinished, also where one is written over another."""
    write_json(folder / CHECKSUMS_NAME, {})


def finish_checkpoint(folder: Path) -> None:
    """Forces a checkpoint to disk, then the checksums of its files."""
    sync_folder(folder)
    sync(folder.parent)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    checksums = {name: file_sha256(folder / name) for name in names if name != CHECKSUMS_NAME}
    write_json(folder / CHECKSUMS_NAME, checksums)


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint was written to its end; one from before there were checksums, if it has the last file."""
    checksums = folder / CHECKSUMS_NAME
    return checksums.read_text().strip() != "{}" if checksums.is_file() else (folder / TRAINER_STATE_NAME).is_file()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(output_dir: str | Path) -> list[Path]:
    """All checkpoints, by step."""
    return sorted(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-[0-9]*"), key=step_of)


def finished_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints that were written to their end, by step."""
    return list(filter(is_finished, checkpoints(output_dir)))


def damaged_files(folder: Path) -> list[str]:
    """The files of a finished checkpoint that are not what was written."""
    name = CHECKSUMS_NAME if (folder / CHECKSUMS_NAME).is_file() else TRAINER_STATE_NAME
    try:
        content = read_run_json(folder / name, "")
    except ValueError:
        return [name]
    checksums = content if name == CHECKSUMS_NAME else {}
    return [
        file
        for file, sha256 in checksums.items()
        if not (folder / file).is_file() or file_sha256(folder / file) != sha256
    ]


def last_complete_checkpoint(output_dir: str | Path, say: Callable[[str], object] = print) -> str | None:
    """
    The newest checkpoint that was written to its end and is still what was written, or None if none was finished.

    Args:
        output_dir (`str` or `Path`)
        say (`Callable`): is told of newer ones that are passed over.

    Raises:
        ValueError: if all that were finished are damaged.
    """
    unfinished, damaged, found = [], [], None
    for folder in reversed(checkpoints(output_dir)):
        if not is_finished(folder):
            unfinished.append(f"{folder} was not finished")
        elif files := damaged_files(folder):
            damaged.append(f"{folder} is damaged ({', '.join(files)})")
        else:
            found = str(folder)
            break
    if damaged and not found:
        raise ValueError(
            f"{damaged[0]}, and no checkpoint before it is whole: restore it, or remove it to train from the start."
        )
    if damaged or unfinished:
        say(f"{'; '.join(damaged + unfinished)}: going on from {found or 'the start'}.")
    return found


def checkpoint_to_resume(output_dir: Path, made_with: dict, accelerator: Accelerator) -> str | None:
    """
    The checkpoint that a run goes on from, or None for one that starts. That one notes what it is made with.

    Args:
        output_dir (`Path`): of the run.
        made_with (`dict`): as [`run_info`] says.
        accelerator (`Accelerator`): the processes; the main one writes.

    Raises:
        ValueError: if the checkpoint was made with something else.
    """
    path, checkpoint = output_dir / RUN_NAME, last_complete_checkpoint(output_dir, accelerator.print)
    if checkpoint is None:
        if accelerator.is_main_process:
            write_json(path, made_with)
    elif path.is_file():
        there = read_run_json(path, "Remove it to go on without comparing.")
        # An older version may not have noted all.
        differing = differences(there, {name: value for name, value in made_with.items() if name in there})
        if differing:
            raise ValueError(
                f"{checkpoint} was made with something else: {differing}. Go on with that, or use another output_dir."
            )
    return checkpoint


def run_info(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    train_examples: list[Example],
    validation_examples: list[Example],
) -> dict:
    """What a checkpoint depends on: the model's configuration, decoder, tokenizers and examples."""
    encoder = model.config.encoder_config.to_dict() if model.config.uses_encoder else {}
    configuration = model.config.to_dict()
    info = {name: configuration[name] for name in ProtoGenConfig.__annotations__ if name not in NOT_COMPARED}
    info |= {f"encoder {name}": value for name, value in encoder.items() if name not in ("_name_or_path", "dtype")}
    info |= {f"processor {name}": value for name, value in processor.to_dict().items() if name != "auto_map"}
    info |= {
        "decoder dtype": str(model.decoder.dtype),
        "decoder fingerprint": decoder_fingerprint(model.decoder),
        "decoder tokenizer": tokenizer_sha256(processor.decoder_tokenizer),
        "encoder tokenizer": tokenizer_sha256(processor.tokenizer),
        "training examples": examples_sha256(train_examples),
        "validation examples": examples_sha256(validation_examples),
    }
    return json.loads(json.dumps(info))  # As it comes back from a file.


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    # What the last call set is no rule.
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    return json_sha256([rules, tokenizer.special_tokens_map, tokenizer.chat_template])


def examples_sha256(examples: list[Example]) -> str:
    return f"{len(examples)}, {json_sha256([[e.id, e.category, e.target] for e in examples])}"
