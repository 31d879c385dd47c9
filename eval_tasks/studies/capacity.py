"""Capacity: how long a text one pair of proto-tokens can hold, and what that depends on."""

import re
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval_tasks.plots import lines
from eval_tasks.statistics import mean_with_interval
from eval_tasks.text_metrics import information_bits
from trainers.arguments import bank_info
from trainers.data import Example
from trainers.fit_bank import fit_bank
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.proto_bank import BankInfo, ProtoTokenBank

from .study import StudyContext, StudyResult
from .text_sources import load_sources, source_texts

AXES = ["decoder", "source", "arrangement", "m_scope", "sink"]
NAMES = {"per_example": "own_m", "shared": "shared_m", "per_category": "category_m", "bos": "sink", "none": "no_sink"}
NAMES |= {"fixed_zero": "zero_m", "fixed_mean": "mean_embedding_m", "fixed_random": "random_m"}
# Powers of the square root of two (Mezentsev & Oseledets, arXiv:2505.21189, section 4).
LENGTHS = (4, 5, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256, 362, 512, 724, 1024)
FIXED = ("fixed_zero", "fixed_mean", "fixed_random")


@dataclass
class Arguments:
    """What capacity is measured on: every source with every arrangement, scope of m and sink."""

    decoders: list[str] = field(
        default_factory=list,
        metadata={"help": "Decoders to compare, with variants (trainers/decoders.py); the decoder alone by default."},
    )
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
    args: Arguments,
    accelerator: Accelerator,
    folder: str | Path,
) -> list[dict]:
    """
    Fits texts of growing lengths, one chunk each, for every source of texts, arrangement, scope of m and sink.

    Args:
        decoder, tokenizer: against which texts are fitted.
        sources (`dict[str, list[Example]]`): from `load_sources`.
        info (`BankInfo`): the decoder and the number of e-tokens; the rest is set for each cell.
        fit_args (`FittingArguments`), args (`Arguments`), accelerator (`Accelerator`)
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


def varying_axes(rows: pd.DataFrame) -> list[str]:
    """The axes in which the rows differ."""
    return [axis for axis in AXES if axis in rows and rows[axis].nunique() > 1]


def named_cells(rows: pd.DataFrame, axes: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each setting of these axes, named by it; `all` if there are no axes."""
    if not axes:
        return [("all", rows)]
    return [("_".join(NAMES.get(v, v) for v in key), cell) for key, cell in rows.groupby(axes, sort=False)]


def capacity_metrics(rows: list[dict], threshold: float) -> dict[str, float | list[float]]:
    """
    For each setting: `C_tokens`, the longest length whose mean accuracy reaches the threshold; `H_LM_bits`, the
    information of those texts with its interval; accuracy and exact match at each length, and accuracy in each category
    where texts have one, with intervals.
    """
    rows, metrics = pd.DataFrame(rows), {}
    for name, cell in named_cells(rows, varying_axes(rows)):
        accuracy = cell.groupby("length")["accuracy"].mean()
        held = accuracy[accuracy >= threshold]
        metrics[f"{name}_C_tokens"] = int(held.index.max()) if len(held) else 0
        longest = cell[cell["length"] == metrics[f"{name}_C_tokens"]]
        metrics[f"{name}_H_LM_bits"] = mean_with_interval(longest["bits"]) if len(held) else 0.0
        for length, part in cell.groupby("length"):
            metrics[f"{name}_{length}_tokens_accuracy"] = mean_with_interval(part["accuracy"])
            metrics[f"{name}_{length}_tokens_exact_match"] = mean_with_interval(part["accuracy"] == 1)
        if cell["category"].nunique() > 1:
            for category, part in cell.groupby("category"):
                # A text's accuracies at several lengths are no more than one observation.
                by_text = part.groupby("id")["accuracy"].mean()
                if len(by_text) > 1:
                    metrics[f"{name}_{category}_accuracy"] = mean_with_interval(by_text)
    return metrics


def plot_capacity(rows: list[dict], threshold: float, title: str, path: str | Path) -> None:
    """
    Accuracy against length: a panel for each value of the first axis that varies if others do too, a colour for each
    setting of these, dots without a sink.

    Args:
        rows (`list[dict]`): as in [`capacity_metrics`].
        threshold (`float`): drawn as a line.
        title (`str`), path (`str` or `Path`)
    """
    rows = pd.DataFrame(rows)
    axes = varying_axes(rows)
    settings = [axis for axis in axes if axis != "sink"]
    panel = settings.pop(0) if len(settings) > 1 else None
    rows["setting"] = rows[settings].map(lambda value: NAMES.get(value, value)).agg(" ".join, axis=1)
    rows["no sink"] = rows["sink"] == "none"
    lines(
        rows,
        x="length",
        y="accuracy",
        title=title,
        path=path,
        line="setting" if axes else None,
        panel=panel,
        dotted="no sink" if "sink" in axes else None,
        threshold=threshold,
        log2=True,
        labels=("tokens", "reconstruction accuracy"),
    )


def study(context: StudyContext, args: Arguments) -> StudyResult:
    """Capacity of one decoder or of several, as `accuracy` against length; several processes may share the fits."""
    sources, rows = load_sources(args.capacity_sources, context.data_args), []
    names = args.decoders or [context.model_args.decoder]
    for name in names:
        tokenizer, decoder = context.load_decoder(name)
        info = bank_info(replace(context.model_args, decoder=name), decoder)
        banks = context.folder / "banks" / re.sub(r"\W+", "-", name)
        context.accelerator.print(f"decoder {name}")
        cells = measure_capacity(decoder, tokenizer, sources, info, context.fit_args, args, context.accelerator, banks)
        for row in cells:
            bits = information_bits(decoder, row.pop("token_ids"))
            rows.append({"decoder": name} | row | {"bits": bits})
    if context.accelerator.is_main_process:
        shown = names[0] if len(names) == 1 else f"{len(names)} decoders"
        title = f"{shown}, {context.model_args.decoder_dtype}: {args.capacity_texts} texts of each length"
        plot_capacity(rows, args.capacity_threshold, title, context.folder / "capacity.png")
    metrics = capacity_metrics(rows, args.capacity_threshold)
    texts, columns = f"{args.capacity_texts} texts of each length", ["C_tokens", "H_LM_bits"]
    return StudyResult(metrics, pd.DataFrame(rows), columns=columns, model=", ".join(names), texts=texts)
