"""What every study is given, and what it leaves."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainers.arguments import ModelArguments, bank_info
from trainers.data import DataArguments, Example
from trainers.decoders import load_decoder
from trainers.fit_bank import fit_bank
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.proto_bank import BankEntry, BankInfo, ProtoTokenBank

from . import STUDIES
from .reading import FittedTexts, Reconstructor
from .text_sources import load_sources, source_texts


@dataclass
class StudyArguments:
    """Which study, and its texts."""

    study: str = field(default="errors", metadata={"help": "What is studied.", "choices": list(STUDIES)})
    smoke: bool = field(
        default=False, metadata={"help": "The whole recipe in seconds: few tokens, texts and steps, no real numbers."}
    )
    study_sources: list[str] = field(
        default_factory=lambda: ["natural"], metadata={"help": "Texts, as capacity_sources; all but errors take one."}
    )
    study_texts: int = field(default=64, metadata={"help": "Texts of a source."})
    study_length: int = field(default=32, metadata={"help": "Tokens at which texts are cut."})
    study_min_length: int | None = field(
        default=None, metadata={"help": "Tokens that a text must have; study_length by default."}
    )


@dataclass
class NoArguments:
    """Of a study that needs no arguments but the shared ones."""


@dataclass
class StudyResult:
    """
    What a study found; its plots are in its folder.

    Args:
        metrics (`dict`): from a name to a number, or to `[value, low, high]`.
        rows (`pd.DataFrame`): what the metrics are made of, for a CSV file.
        html (`str`): examples, for the page.
        columns (`list[str]`): ends of the metrics' names that make a table's columns, where it has several.
        model, texts (`str`): what was studied, where the context's arguments do not say it.
    """

    metrics: dict[str, float | list[float]]
    rows: pd.DataFrame
    html: str = ""
    columns: list[str] = field(default_factory=list)
    model: str = ""
    texts: str = ""


@dataclass
class StudyContext:
    """What a study is made with; `folder` gets banks and plots."""

    model_args: ModelArguments
    data_args: DataArguments
    fit_args: FittingArguments
    args: StudyArguments
    accelerator: Accelerator
    folder: Path

    @property
    def seed(self) -> int:
        return self.fit_args.fit_seed

    @property
    def title(self) -> str:
        return f"{self.model_args.decoder}: {self.args.study_texts} texts of {self.args.study_length} tokens at most"

    def described_texts(self) -> str:
        args = self.args
        return f"{args.study_texts} texts of up to {args.study_length} tokens from {', '.join(self.sources)}"

    def load_decoder(self, name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """A decoder's tokenizer and the decoder; `name` as in `trainers.decoders`."""
        model = self.model_args
        return load_decoder(
            name, model.decoder_revision, model.decoder_dtype, self.accelerator.device, model.trust_remote_code
        )

    @cached_property
    def _loaded(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        if self.accelerator.num_processes > 1:
            raise ValueError("this study takes one process.")
        return self.load_decoder(self.model_args.decoder)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._loaded[0]

    @property
    def decoder(self) -> PreTrainedModel:
        return self._loaded[1]

    @cached_property
    def info(self) -> BankInfo:
        return replace(bank_info(self.model_args, self.decoder), chunk_size=self.args.study_length)

    @cached_property
    def reader(self) -> Reconstructor:
        return Reconstructor(self.decoder, self.info.arrangement, self.info.sink)

    @cached_property
    def sources(self) -> dict[str, list[Example]]:
        return load_sources(self.args.study_sources, self.data_args)

    @property
    def source(self) -> str:
        """The only source."""
        if len(self.sources) > 1:
            raise ValueError(f"this study takes one source, not {', '.join(self.sources)}.")
        return next(iter(self.sources))

    def texts(self, source: str) -> list[Text]:
        args = self.args
        chosen = (args.study_texts, args.study_length, self.seed, args.study_min_length)
        return source_texts(self.tokenizer, source, self.sources[source], *chosen)

    def fitter(self, seed: int | None = None) -> ProtoTokenFitter:
        fit_args = self.fit_args if seed is None else replace(self.fit_args, fit_seed=seed)
        return ProtoTokenFitter(self.decoder, self.info, fit_args)

    def fit(self, source: str, seed: int) -> list[BankEntry]:
        """The texts of a source, fitted; what is in the bank already is not fitted again."""
        bank = ProtoTokenBank(self.folder / "banks" / f"{source}-seed{seed}", self.info)
        texts = self.texts(source)
        fit_bank(self.fitter(seed), bank, texts, self.accelerator)
        return [bank[text.id] for text in texts]

    def fitted(self, source: str, entries: list[BankEntry] | None = None) -> FittedTexts:
        entries = entries or self.fit(source, self.seed)
        return FittedTexts(
            token_ids=[entry.token_ids for entry in entries],
            e=torch.cat([entry.e for entry in entries]),
            m=torch.cat([entry.m for entry in entries]),
            texts=[self.tokenizer.decode(entry.token_ids) for entry in entries],
            categories=[text.group for text in self.texts(source)],
        )
