"""Capacity: how long a text one pair of proto-tokens can hold, and what that depends on."""

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Example
from .fit_bank import fit_bank
from .fitting import FittingArguments, ProtoTokenFitter, Text
from .proto_bank import BankInfo, ProtoTokenBank
from .text_sources import source_texts

# Powers of the square root of two (Mezentsev & Oseledets, arXiv:2505.21189, section 4).
LENGTHS = (4, 5, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256, 362, 512, 724, 1024)
FIXED = ("fixed_zero", "fixed_mean", "fixed_random")


@dataclass
class CapacityArguments:
    """What capacity is measured on: every source with every arrangement, scope of m and sink."""

    capacity_texts: int = field(default=8, metadata={"help": "Texts of each length."})
    capacity_lengths: list[int] = field(
        default_factory=lambda: list(LENGTHS[:11]), metadata={"help": "Lengths in tokens."}
    )
    capacity_threshold: float = field(default=0.99, metadata={"help": "Mean accuracy that a length must reach."})
    capacity_stop_after: int = field(
        default=2,
        metadata={"help": "Lengths in a row below the threshold after which no longer one is tried; 0 tries all."},
    )
    capacity_sources: list[str] = field(
        default_factory=lambda: ["natural", "random_words"],
        metadata={
            "help": "Texts: natural, shuffled_words, random_words, pseudo_flat, pseudo_agreeing, pseudo_nested, or "
            "FILE#FIELD."
        },
    )
    capacity_arrangements: list[str] = field(default_factory=lambda: ["e_mN"], metadata={"help": "Arrangements."})
    capacity_m_scopes: list[str] = field(
        default_factory=lambda: ["per_example", "shared"],
        metadata={
            "help": "per_example, shared, per_category, or a vector that is not trained: fixed_zero, fixed_mean (of "
            "the embedding table), fixed_random."
        },
    )
    capacity_sinks: list[str] = field(default_factory=lambda: ["bos", "none"], metadata={"help": "Sinks."})

    def __post_init__(self):
        self.capacity_lengths = sorted(self.capacity_lengths)
        if self.capacity_texts < 2:
            raise ValueError(f"capacity_texts must be at least 2, for an interval; got {self.capacity_texts}.")


def fixed_m(name: str, decoder: PreTrainedModel, seed: int) -> torch.Tensor:
    """An `m` `(1, dim)` that nobody trained: zero, the mean of the embedding table, or random at its scale."""
    table = decoder.get_input_embeddings().weight.detach().float()
    if name == "fixed_random":
        return torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(seed)) * table.std().cpu()
    return table.mean(0, keepdim=True) if name == "fixed_mean" else torch.zeros(1, table.shape[1])


def measure_capacity(
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: dict[str, list[Example]],
    info: BankInfo,
    fit_args: FittingArguments,
    args: CapacityArguments,
    accelerator: Accelerator,
    folder: str | Path,
) -> list[dict]:
    """
    Fits texts of growing lengths, one chunk each, for every source of texts, arrangement, scope of m and sink.

    Args:
        decoder, tokenizer: against which texts are fitted.
        sources (`dict[str, list[Example]]`): from `load_sources`.
        info (`BankInfo`): the decoder and the number of e-tokens; the rest is set for each cell.
        fit_args (`FittingArguments`), args (`CapacityArguments`), accelerator (`Accelerator`)
        folder (`str` or `Path`): gets a bank for each cell; what is there is not fitted again.

    Returns:
        A row for each text of each cell: `source`, `arrangement`, `m_scope`, `sink`, `length` in tokens, `id`,
        `category`, `accuracy`, `steps` to the best vectors, and its `token_ids`.
    """
    rows, lengths = [], args.capacity_lengths
    axes = product(sources, args.capacity_arrangements, args.capacity_m_scopes, args.capacity_sinks)
    for cell in axes:
        source, arrangement, m_scope, sink = cell
        whole = source_texts(tokenizer, source, sources[source], args.capacity_texts, lengths[-1], fit_args.fit_seed)
        missed = 0
        for length in lengths:
            cell_name = "-".join((*cell, str(length)))
            accelerator.print(cell_name)
            texts = [Text(t.id, t.token_ids[:length], t.group if m_scope == "per_category" else "") for t in whole]
            scope = "fixed" if m_scope in FIXED else m_scope
            cell_info = replace(info, arrangement=arrangement, m_scope=scope, sink=sink, chunk_size=length)
            bank = ProtoTokenBank(Path(folder) / cell_name, cell_info)
            if m_scope in FIXED and bank.shared_m() is None:
                bank.write_shared_m({"": fixed_m(m_scope, decoder, fit_args.fit_seed)})
            fit_bank(ProtoTokenFitter(decoder, cell_info, fit_args), bank, texts, accelerator)
            settings = {"source": source, "arrangement": arrangement, "m_scope": m_scope, "sink": sink}
            for text in whole:
                found = bank.row(text.id)
                row = {"length": length, "id": text.id, "category": text.group}
                rows.append(settings | row | {name: found[name] for name in ("accuracy", "steps", "token_ids")})
            mean = sum(row["accuracy"] for row in rows[-len(whole) :]) / len(whole)
            missed = missed + 1 if mean < args.capacity_threshold else 0
            if missed and missed == args.capacity_stop_after:
                break
    return rows
