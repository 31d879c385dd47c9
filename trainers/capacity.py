"""Capacity: how long a text one pair of proto-tokens can hold."""

import math
import random
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .fit_bank import fit_bank
from .fitting import FittingArguments, ProtoTokenFitter, Text
from .proto_bank import BankInfo, ProtoTokenBank

# Powers of the square root of two (Mezentsev & Oseledets, arXiv:2505.21189, section 4).
LENGTHS = (4, 5, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256, 362, 512, 724, 1024)
SOURCES = ("prose", "random_words")


@dataclass
class CapacityArguments:
    """What capacity is measured on."""

    capacity_texts: int = field(default=8, metadata={"help": "Texts of each length."})
    capacity_max_length: int = field(default=128, metadata={"help": "Longest length tried, in tokens."})
    capacity_threshold: float = field(default=0.99, metadata={"help": "Mean accuracy that a length must reach."})
    capacity_sources: list[str] = field(
        default_factory=lambda: list(SOURCES),
        metadata={"help": "Texts: prose (the answers), random_words (of theirs)."},
    )
    capacity_m_scopes: list[str] = field(
        default_factory=lambda: ["per_example", "shared"], metadata={"help": "Scopes of m."}
    )
    capacity_sinks: list[str] = field(default_factory=lambda: ["bos", "none"], metadata={"help": "Sinks."})


def capacity_texts(
    tokenizer: PreTrainedTokenizerBase, source: str, answers: list[str], count: int, length: int, seed: int
) -> list[list[int]]:
    """
    Token ids of texts with at least `length` tokens: the beginnings of the first answers that are long enough, or words
    drawn from all of the answers' distinct words.

    Returns:
        `count` lists of `length` ids.

    Raises:
        ValueError: if the source is unknown, or too few answers are long enough.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source of texts {source!r}; there are {', '.join(SOURCES)}.")
    if source == "random_words":
        words = sorted({word for answer in answers for word in answer.split()})
        rng = random.Random(seed)
        # A word has at least one token.
        answers = [" ".join(rng.choices(words, k=length)) for _ in range(count)]
    texts = []
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        if len(ids) >= length:
            texts.append(ids[:length])
        if len(texts) == count:
            return texts
    raise ValueError(
        f"only {len(texts)} of the texts have {length} tokens, {count} are needed: give longer ones (--data), or lower "
        "--capacity_max_length or --capacity_texts."
    )


def information_bits(decoder: PreTrainedModel, token_ids: list[int]) -> float:
    """
    The text's information under the decoder, `-sum log2 p(token | BOS, tokens before)` (`H_LM`); without a BOS the
    first token, which nothing predicts, is not counted.
    """
    bos = decoder.config.get_text_config().bos_token_id
    ids = torch.tensor([token_ids if bos is None else [bos, *token_ids]], device=decoder.device)
    with torch.no_grad():
        log_p = decoder(ids).logits[0, :-1].float().log_softmax(-1)
    return -log_p.gather(1, ids[0, 1:, None]).sum().item() / math.log(2)


def measure_capacity(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: list[str],
    info: BankInfo,
    fit_args: FittingArguments,
    args: CapacityArguments,
    accelerator: Accelerator,
    folder: str | Path,
) -> list[dict]:
    """
    Fits texts of growing lengths, one chunk each, for every source of texts, scope of m and sink, until two lengths
    in a row are not held.

    Args:
        decoder, tokenizer, answers: what is fitted, and the texts it is taken from.
        info (`BankInfo`): arrangement and number of e-tokens; the rest is set for each cell.
        fit_args (`FittingArguments`), args (`CapacityArguments`), accelerator (`Accelerator`)
        folder (`str` or `Path`): gets a bank for each cell; what is there is not fitted again.

    Returns:
        A row for each cell: `source`, `m_scope`, `sink`, `length` in tokens, mean `accuracy`, `perfect_texts`,
        `mean_steps` to the best vectors, and `bits`, the mean information of the texts.
    """
    lengths = [length for length in LENGTHS if length <= args.capacity_max_length]
    count, rows = args.capacity_texts, []
    for source, m_scope, sink in product(args.capacity_sources, args.capacity_m_scopes, args.capacity_sinks):
        ids = capacity_texts(tokenizer, source, answers, count, lengths[-1], fit_args.fit_seed)
        missed = 0
        for length in lengths:
            name = f"{source}-{m_scope}-{sink}-{length}"
            accelerator.print(name)
            cell = replace(info, m_scope=m_scope, sink=sink, chunk_size=length)
            bank = ProtoTokenBank(Path(folder) / name, cell)
            texts = [Text(f"text-{number}", text[:length]) for number, text in enumerate(ids)]
            fit_bank(ProtoTokenFitter(decoder, cell, fit_args), bank, texts, accelerator)
            found = [bank.row(text.id) for text in texts]
            row = {"source": source, "m_scope": m_scope, "sink": sink, "length": length}
            row["accuracy"] = sum(entry["accuracy"] for entry in found) / count
            row["perfect_texts"] = sum(entry["accuracy"] == 1 for entry in found)
            row["mean_steps"] = sum(entry["steps"] for entry in found) / count
            row["bits"] = sum(information_bits(decoder, text.token_ids) for text in texts) / count
            rows.append(row)
            missed = missed + 1 if row["accuracy"] < args.capacity_threshold else 0
            if missed == 2:
                break
    return rows


def capacity_figures(rows: list[dict], threshold: float) -> dict[str, float]:
    """`C_tokens` and `H_LM` of each source, scope of m and sink: length and bits of the longest texts that are held."""
    figures = {}
    for source, m_scope, sink in dict.fromkeys((row["source"], row["m_scope"], row["sink"]) for row in rows):
        cells = [row for row in rows if (row["source"], row["m_scope"], row["sink"]) == (source, m_scope, sink)]
        held = [row for row in cells if row["accuracy"] >= threshold]
        name = f"{source}_{'own' if m_scope == 'per_example' else m_scope}_m_{sink}"
        longest = max(held, key=lambda row: row["length"], default={"length": 0, "bits": 0.0})
        figures[f"{name}_C_tokens"] = longest["length"]
        figures[f"{name}_H_LM_bits"] = longest["bits"]
    return figures
