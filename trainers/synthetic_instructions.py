"""
Instructions that an instruction-tuned decoder writes itself: sampled after the bare user prefix of its chat template
(Magpie; Xu et al., 2024, arXiv:2406.08464).
"""

import re
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Example, stable_hash
from .files import append_lines, locked, read_lines

INSTRUCTIONS_NAME = "instructions.jsonl"
MARK = "\u2042"  # stands for the user's words in the template


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """
    Token ids of the chat template before and after the user's words; the first of the latter ends them.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "synthetic instructions need an instruction-tuned decoder: this tokenizer has no chat template."
        )
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    before, after = text.split(MARK)
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in (before, after.strip()))


def normalized(instruction: str) -> str:
    """What two instructions that count as one have in common."""
    return " ".join(re.findall(r"\w+", instruction.casefold()))


def is_wanted(instruction: str, min_words: int, max_words: int) -> bool:
    """Whether it has as many words as wanted, and letters."""
    return min_words <= len(instruction.split()) <= max_words and any(map(str.isalpha, instruction))


def write_instructions(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    count: int,
    seed: int = 0,
    batch_size: int = 128,
    max_tokens: int = 48,
    temperature: float = 1.0,
    min_p: float = 0.02,
    min_words: int = 3,
    max_words: int = 60,
) -> list[str]:
    """
    Samples until the file holds `count` instructions, different from one another and ended by the decoder itself. A
    batch depends on the seed and its number alone: an interrupted run goes on to the same instructions. Tokens less
    likely than `min_p` times the most likely are never drawn (Nguyen et al., 2024, arXiv:2407.01082): the tail of a
    small decoder's distribution makes instructions that mean nothing.

    Returns:
        `list[str]`: the first `count`.

    Raises:
        ValueError: if a hundred batches in a row add nothing.
    """
    path = Path(path)
    before, after = user_turn(tokenizer)
    inputs = torch.tensor([before] * batch_size, device=decoder.device)
    with locked(path.with_name(f".{path.name}.lock")):
        rows = read_lines(path)
        seen = {normalized(row["instruction"]) for row in rows}
        number, last = (rows[-1]["batch"] + 1, rows[-1]["batch"]) if rows else (0, -1)
        bar = tqdm(total=count, initial=min(len(rows), count), desc="synthetic instructions")
        while len(rows) < count:
            if number - last > 100:
                raise ValueError("a hundred batches brought no new instruction; raise the temperature or the lengths.")
            torch.manual_seed(int(stable_hash(f"{seed} {number}")[:15], 16))
            with torch.no_grad():
                written = decoder.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=True,
                    temperature=temperature,
                    min_p=min_p,
                    top_p=1.0,
                    top_k=0,
                    max_new_tokens=max_tokens,
                    eos_token_id=after[0],
                    pad_token_id=after[0],
                )[:, len(before) :]
            found = []
            for ids in written.tolist():
                if after[0] not in ids:
                    continue
                text = tokenizer.decode(ids[: ids.index(after[0])], skip_special_tokens=True).strip()
                if is_wanted(text, min_words, max_words) and normalized(text) not in seen:
                    seen.add(normalized(text))
                    found.append({"instruction": text, "batch": number})
            if found:
                append_lines(path, found)
                rows, last = rows + found, number
                bar.update(min(len(found), count - bar.n))
            number += 1
        bar.close()
    return [row["instruction"] for row in rows[:count]]


def synthetic_examples(folder: str | Path, count: int) -> list[Example]:
    """
    The first `count` instructions of a folder, as examples without an answer.

    Raises:
        FileNotFoundError: if there are fewer.
    """
    rows = read_lines(Path(folder) / INSTRUCTIONS_NAME)[:count]
    if len(rows) < count:
        raise FileNotFoundError(
            f"{folder} holds {len(rows)} synthetic instructions, {count} are wanted: write them (protogen teacher)."
        )
    return [Example(stable_hash(row["instruction"])[:16], row["instruction"], "", "") for row in rows]
