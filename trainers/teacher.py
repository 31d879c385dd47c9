"""Teacher answers: what the frozen decoder says itself to an instruction, token by token."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_protogen import ProtoGenProcessor
from modeling_protogen.autoregressive import up_to_eos
from modeling_protogen.configuration_protogen import as_list

from .data import Example
from .files import append_lines, differences, locked, read_lines, read_run_json, write_json

INFO_NAME = "teacher.json"


@dataclass
class TeacherInfo:
    """What a folder's answers depend on."""

    # As in `BankInfo`.
    decoder: str
    decoder_revision: str | None
    decoder_fingerprint: str
    # The prompt of an instruction that says PROMPT.
    template: str
    # Tokens after which contexts are cut.
    max_prompt_length: int
    # Tokens after which an answer is cut, EOS included.
    max_length: int

    @property
    def wanted(self) -> dict:
        """What must agree. The fingerprint identifies the decoder; the same weights may have another name."""
        return {name: value for name, value in asdict(self).items() if name not in ("decoder", "decoder_revision")}


def prompt_template(processor: ProtoGenProcessor) -> str:
    """The text around an instruction in the decoder's prompt."""
    prompt = processor("PROMPT")["decoder_prompt_ids"][0]
    return processor.decode(prompt, skip_special_tokens=False)


def read_teacher_answers(folder: str | Path, info: TeacherInfo) -> dict[str, list[int]]:
    """
    Token ids of the answers in a folder, EOS included where the teacher ended, by example id.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they were written by another teacher, for another prompt or length.
    """
    folder = Path(folder)
    path = folder / INFO_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no teacher answers in {folder}; write them first (protogen teacher).")
    there = read_run_json(path, "Restore it, or use another folder.")
    if differing := differences(there, info.wanted):
        raise ValueError(f"the teacher answers in {folder} are of another kind: {differing}. Use another folder.")
    answers = {}
    for file in sorted(folder.glob("answers-*.jsonl")):
        for number, row in enumerate(read_lines(file), start=1):
            if {*row} != {"id", "token_ids"}:
                raise ValueError(f"{file}, line {number} has no id and token_ids: remove it and run protogen teacher.")
            answers[row["id"]] = row["token_ids"]
    return answers


def write_teacher_answers(
    decoder: PreTrainedModel,
    processor: ProtoGenProcessor,
    examples: list[Example],
    folder: str | Path,
    info: TeacherInfo,
    accelerator: Accelerator,
    batch_size: int,
) -> dict[str, list[int]]:
    """
    Writes the teacher's greedy answers to the examples that have none yet, a file for each process, a batch at a time:
    a kill costs one batch.

    Args:
        decoder (`PreTrainedModel`): the teacher.
        examples (`list[Example]`): with instructions that `processor` fits into a prompt.
        folder (`str` or `Path`): for the answers to one teacher, prompt and length, whatever the instructions.

    Returns:
        As [`read_teacher_answers`], of all that the folder holds now.
    """
    folder, rank = Path(folder), accelerator.process_index
    with locked(folder / f".lock-{rank}"):
        if accelerator.is_main_process and not (folder / INFO_NAME).is_file():
            if any(folder.glob("answers-*.jsonl")):
                raise ValueError(f"{folder} holds answers and no {INFO_NAME}. Restore it, or use another folder.")
            write_json(folder / INFO_NAME, asdict(info))
        accelerator.wait_for_everyone()
        done = read_teacher_answers(folder, info)
        # Nobody writes before all have read what there is.
        accelerator.wait_for_everyone()
        pending = [example for example in examples if example.id not in done]
        # Bucket prompts by length, the longest first, so that running out of memory shows at once.
        pending.sort(key=lambda example: -len(example.instruction + example.context))
        mine = pending[rank :: accelerator.num_processes]
        with tqdm(total=len(mine), desc="teacher answers", disable=not accelerator.is_main_process) as progress:
            for first in range(0, len(mine), batch_size):
                part = mine[first : first + batch_size]
                answers = greedy_answers(decoder, processor, part, info.max_length)
                rows = [{"id": e.id, "token_ids": ids} for e, ids in zip(part, answers, strict=True)]
                append_lines(folder / f"answers-{rank:03d}.jsonl", rows)
                progress.update(len(part))
    accelerator.wait_for_everyone()
    return read_teacher_answers(folder, info)


def greedy_answers(
    decoder: PreTrainedModel, processor: ProtoGenProcessor, examples: list[Example], max_length: int
) -> list[list[int]]:
    """The decoder's greedy answers of at most `max_length` tokens, up to and with the first of its EOS."""
    inputs = processor([example.instruction for example in examples], [example.context for example in examples])
    prompt = inputs["decoder_prompt_ids"].to(decoder.device)
    eos = as_list(decoder.generation_config.eos_token_id)
    with torch.no_grad():
        written = decoder.generate(
            input_ids=prompt,
            attention_mask=inputs["decoder_prompt_mask"].to(decoder.device),
            do_sample=False,
            max_new_tokens=max_length,
            pad_token_id=eos[0] if eos else 0,
        )
    return up_to_eos(written[:, prompt.shape[1] :], eos)
