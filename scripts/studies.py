"""The studies of `--stage anatomy`: what each fits. What it looks at then is in `eval_tasks/anatomy`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from embedded import resolve
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval_tasks.anatomy import attention, projection, roles, stability, tradeoff, words
from eval_tasks.anatomy.findings import Findings
from eval_tasks.anatomy.reading import FittedTexts, Reader
from eval_tasks.sentence_encoder import sentence_embeddings
from trainers.curves import bezier, fit_bezier_controls
from trainers.data import Example
from trainers.fit_bank import fit_bank
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.imposing import fit_with_meaning
from trainers.losses.anchor import AnchorLoss
from trainers.losses.relational_distillation import RelationalDistillationLoss
from trainers.proto_bank import BankEntry, BankInfo, ProtoTokenBank
from trainers.text_sources import source_texts


@dataclass
class StudyArguments:
    """What `--stage anatomy` looks at."""

    study: str = field(
        default="errors",
        metadata={
            "help": "What is studied.",
            "choices": ["errors", "roles", "stability", "attention", "imposing", "map"],
        },
    )
    study_sources: list[str] = field(
        default_factory=lambda: ["natural"], metadata={"help": "Texts, as capacity_sources; all but errors take one."}
    )
    study_texts: int = field(default=64, metadata={"help": "Texts of a source."})
    study_length: int = field(default=32, metadata={"help": "Tokens at which texts are cut."})
    study_min_length: int | None = field(
        default=None, metadata={"help": "Tokens that a text must have; study_length by default."}
    )
    study_seeds: int = field(default=3, metadata={"help": "stability: solutions of each text."})
    study_noise: list[float] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0],
        metadata={"help": "stability: length of the noise as a share of the vector's."},
    )
    study_curve_steps: int = field(default=300, metadata={"help": "stability: steps in which a curve is learned."})
    study_weights: list[float] = field(
        default_factory=lambda: [0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
        metadata={"help": "imposing: weights of the loss."},
    )
    teacher: str = field(
        default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "Sentence encoder for what texts mean."}
    )

    def __post_init__(self):
        if self.study_seeds < 2:
            raise ValueError(f"study_seeds must be at least 2, got {self.study_seeds}.")


@dataclass
class Setting:
    """What a study is made with; `folder` gets banks and pictures."""

    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sources: dict[str, list[Example]]
    info: BankInfo
    fit_args: FittingArguments
    args: StudyArguments
    accelerator: Accelerator
    folder: Path

    def __post_init__(self):
        if len(self.sources) > 1 and self.args.study != "errors":
            raise ValueError(f"the study {self.args.study} takes one source, not {', '.join(self.sources)}.")
        self.source = next(iter(self.sources))
        self.seed = self.fit_args.fit_seed
        self.title = f"{self.info.decoder}: {self.args.study_texts} texts of {self.args.study_length} tokens at most"
        self.reader = Reader(self.decoder, self.info.arrangement, self.info.sink)

    def texts(self, source: str) -> list[Text]:
        args = self.args
        chosen = (args.study_texts, args.study_length, self.seed, args.study_min_length)
        return source_texts(self.tokenizer, source, self.sources[source], *chosen)

    def fit(self, source: str, seed: int) -> list[BankEntry]:
        """The texts of a source, fitted; what is in the bank already is not fitted again."""
        bank = ProtoTokenBank(self.folder / "banks" / f"{source}-seed{seed}", self.info)
        fitter = ProtoTokenFitter(self.decoder, self.info, replace(self.fit_args, fit_seed=seed))
        texts = self.texts(source)
        fit_bank(fitter, bank, texts, self.accelerator)
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


def errors(s: Setting) -> Findings:
    corpora = {
        source: Counter(id for e in examples for id in s.tokenizer(e.answer, add_special_tokens=False).input_ids)
        for source, examples in s.sources.items()
    }
    fitted = {source: s.fitted(source) for source in s.sources}
    return words.study(s.reader, s.tokenizer, fitted, corpora, s.title, s.folder)


def who_holds_what(s: Setting) -> Findings:
    fitted = s.fitted(s.source)
    meaning = sentence_embeddings(resolve(s.args.teacher), fitted.texts)
    return roles.study(s.reader, fitted, meaning, s.title, s.folder, s.seed)


def seeds_noise_and_paths(s: Setting) -> Findings:
    solutions = [s.fit(s.source, s.seed + number) for number in range(s.args.study_seeds)]
    fitter = ProtoTokenFitter(s.decoder, s.info, s.fit_args)
    controls = fit_bezier_controls(fitter, solutions[0], solutions[1], s.args.study_curve_steps, s.seed)
    control_e, control_m = (torch.cat(part) for part in zip(*controls, strict=True))
    fitted = [s.fitted(s.source, entries) for entries in solutions]
    start, end = fitted[:2]

    def curve(t: float) -> tuple[torch.Tensor, torch.Tensor]:
        return bezier(start.e, control_e, end.e, t), bezier(start.m, control_m, end.m, t)

    return stability.study(s.reader, fitted, curve, s.args.study_noise, s.title, s.folder)


def attention_to_e(s: Setting) -> Findings:
    return attention.study(s.reader, s.fitted(s.source), s.title, s.folder)


def imposed_meaning(s: Setting) -> Findings:
    texts = s.texts(s.source)
    meaning = sentence_embeddings(resolve(s.args.teacher), [s.tokenizer.decode(text.token_ids) for text in texts])
    teacher, steps = torch.from_numpy(meaning), s.fit_args.fit_max_steps
    losses = {"anchor": AnchorLoss(), "relational": RelationalDistillationLoss()}
    fitter, fits = ProtoTokenFitter(s.decoder, s.info, s.fit_args), {}
    for name, loss in losses.items():
        fits[name] = {}
        for weight in s.args.study_weights:
            bank = ProtoTokenBank(s.folder / "banks" / f"{name}-{weight:g}", s.info)
            if not len(bank):
                with bank.writing():
                    bank.append(fit_with_meaning(fitter, texts, loss, teacher, weight, steps))
            entries = [bank[text.id] for text in texts]
            e = torch.cat([entry.e for entry in entries]).flatten(1).numpy()
            fits[name][weight] = (e, [entry.accuracy for entry in entries])
    return tradeoff.study(fits, meaning, s.title, s.folder)


def two_dimensions(s: Setting) -> Findings:
    return projection.study(s.fitted(s.source), s.title, s.folder, s.seed)


STUDIES: dict[str, Callable[[Setting], Findings]] = {
    "errors": errors,
    "roles": who_holds_what,
    "stability": seeds_noise_and_paths,
    "attention": attention_to_e,
    "imposing": imposed_meaning,
    "map": two_dimensions,
}
