"""Fitting: optimising proto-tokens for given texts against the frozen decoder."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from modeling_protogen.modeling_protogen import answer_logits, sink_ids
from modeling_protogen.proto_tokens import build_layout, fill_slots

from .proto_bank import BankEntry, BankInfo

SCHEDULES = ["cosine", "constant"]


@dataclass
class FittingArguments:
    """How proto-tokens are fitted."""

    fit_num_texts: int | None = field(default=None, metadata={"help": "Texts to fit; all by default."})
    fit_max_length: int = field(default=64, metadata={"help": "Tokens of each text to fit; the rest is cut."})
    fit_batch_size: int = field(default=32, metadata={"help": "Texts fitted side by side and saved together."})
    fit_max_steps: int = field(default=200, metadata={"help": "Optimisation steps of one attempt."})
    fit_attempts: int = field(default=5, metadata={"help": "Fresh starts for texts that are not perfect; 1 = none."})
    fit_min_probability: float = field(
        default=0.7,
        metadata={
            "help": "A text is done when it is perfect and each of its tokens has this probability, so that rounding "
            "(another batch size or dtype) does not undo it; 0 stops at perfect, as the paper does."
        },
    )
    fit_learning_rate: float = field(default=0.1, metadata={"help": "AdamW learning rate."})
    fit_schedule: str = field(
        default="cosine",
        metadata={"help": "Learning rate over an attempt: cosine (to zero) or constant.", "choices": SCHEDULES},
    )
    fit_weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    fit_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    fit_beta2: float = field(default=0.9, metadata={"help": "AdamW beta2."})
    fit_normalize_gradients: bool = field(
        default=True, metadata={"help": "Scale the gradient of each proto-token to length 1 before AdamW sees it."}
    )
    fit_init_std: float | None = field(
        default=None,
        metadata={"help": "Std of the initial proto-tokens; that of the embedding table by default (paper: 1)."},
    )
    fit_seed: int = field(default=0, metadata={"help": "Seed of the initial proto-tokens."})


@dataclass
class Text:
    """
    A text being fitted, and the best it has reached.

    Args:
        id (`str`), token_ids (`list[int]`): what to reconstruct.
        e (`nn.Parameter` of shape `(chunks, num_e_tokens, dim)`), m (`nn.Parameter` of shape `(chunks, dim)`):
            The proto-tokens of the current attempt.
        best (`BankEntry`, *optional*): copies of the vectors with the best accuracy measured, and that accuracy.
        min_probability (`float`): the least probability of a token under the best vectors.
    """

    id: str
    token_ids: list[int]
    e: nn.Parameter | None = None
    m: nn.Parameter | None = None
    best: BankEntry | None = None
    min_probability: float = 0.0

    @property
    def score(self) -> tuple[float, float]:
        """What the best vectors are chosen by."""
        return (self.best.accuracy if self.best else 0.0, self.min_probability)


class ProtoTokenFitter:
    """
    Fits `(e, m)` of many texts side by side. The texts do not influence each other, unless `m` is shared.

    With `m_scope="per_example"` a text leaves the batch the moment it is done (see `fit_min_probability`), and texts
    that are not done after `fit_max_steps` get a fresh start. With `m_scope="shared"` one `m` serves all texts of the
    call, all are optimised together for `fit_max_steps`, and the state with the best mean accuracy is kept.

    The vectors kept are always the ones that the accuracy was measured with, not those after the following step. The
    accuracy recorded in the end is measured once more, each text alone, so that anyone can measure it again.

    Args:
        decoder (`PreTrainedModel`): the frozen causal language model.
        info (`BankInfo`): arrangement, chunk size, number of e-tokens, scope of m and sink.
        args (`FittingArguments`)

    Raises:
        ValueError: if `info` asks for a scope of `m` other than `per_example` and `shared`, or a sink that the decoder
            does not have.
    """

    def __init__(self, decoder: PreTrainedModel, info: BankInfo, args: FittingArguments):
        if info.m_scope not in ("per_example", "shared"):
            raise ValueError(f"fitting knows m_scope per_example and shared, not {info.m_scope!r}.")
        if info.sink == "bos" and decoder.config.get_text_config().bos_token_id is None:
            raise ValueError("sink=bos needs a decoder with a bos_token_id; this one has none: fit with sink=none.")
        self.decoder = decoder.requires_grad_(False).eval()
        self.info = info
        self.args = args
        self.init_std = args.fit_init_std or decoder.get_input_embeddings().weight.float().std().item()
        self.generator = torch.Generator().manual_seed(args.fit_seed)

    def fit(
        self,
        texts: Iterable[tuple[str, list[int]]],
        on_step: Callable[[int, int, float], None] = lambda step, perfect, accuracy: None,
    ) -> list[BankEntry]:
        """
        Fits one batch of texts.

        Args:
            texts (iterable of `(id, token_ids)`)
            on_step (callable): called at each step with the step, the number of texts that are done and the mean
                best accuracy so far.

        Returns:
            `list[BankEntry]`, in the order of `texts`.
        """
        texts = [Text(id, token_ids) for id, token_ids in texts]
        shared = self.info.m_scope == "shared"
        for attempt in range(1 if shared else self.args.fit_attempts):
            unfinished = [text for text in texts if not self._is_done(text)]
            if unfinished:
                self._attempt(unfinished, texts, attempt, shared, on_step)
        return [replace(text.best, accuracy=self.measure([text.best])[0]) for text in texts]

    def _is_done(self, text: Text) -> bool:
        return text.score >= (1.0, self.args.fit_min_probability)

    def _attempt(self, active: list[Text], texts: list[Text], attempt: int, shared: bool, on_step) -> None:
        args = self.args
        shared_m = self._new_parameter(1, self.info.dim) if shared else None
        for text in active:
            chunks = -(-len(text.token_ids) // self.info.chunk_size)
            text.e = self._new_parameter(chunks, self.info.num_e_tokens, self.info.dim)
            text.m = shared_m if shared else self._new_parameter(chunks, self.info.dim)
        parameters = [text.e for text in active] + ([shared_m] if shared else [text.m for text in active])
        # AdamW skips parameters without a gradient: those of texts that have left the batch.
        optimizer = torch.optim.AdamW(
            parameters,
            lr=args.fit_learning_rate,
            betas=(args.fit_beta1, args.fit_beta2),
            weight_decay=args.fit_weight_decay,
        )
        best_mean = (-1.0, -1.0)
        for step in range(args.fit_max_steps):
            if args.fit_schedule == "cosine":
                decay = (1 + math.cos(math.pi * step / args.fit_max_steps)) / 2
                optimizer.param_groups[0]["lr"] = args.fit_learning_rate * decay
            loss, scores = self._loss(active)
            mean = tuple(sum(part) / len(scores) for part in zip(*scores, strict=True))
            for text, score in zip(active, scores, strict=True):
                if mean > best_mean if shared else text.best is None or score > text.score:
                    text.best = self._entry(text, score[0], steps=attempt * args.fit_max_steps + step)
                    text.min_probability = score[1]
            best_mean = max(best_mean, mean)
            on_step(
                attempt * args.fit_max_steps + step,
                sum(self._is_done(text) for text in texts),
                sum(text.score[0] for text in texts) / len(texts),
            )
            if all(self._is_done(text) for text in active):
                return
            optimizer.zero_grad()
            loss.backward()
            if not shared:
                for text in active:
                    if self._is_done(text):
                        text.e.grad = text.m.grad = None
                active = [text for text in active if not self._is_done(text)]
            if args.fit_normalize_gradients:
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad = F.normalize(parameter.grad, dim=-1)
            optimizer.step()

    def measure(self, entries: list[BankEntry]) -> list[float]:
        """Measures the reconstruction accuracy of stored proto-tokens again."""
        with torch.no_grad():
            scores = self._loss([Text(entry.id, entry.token_ids, entry.e, entry.m) for entry in entries])[1]
        return [accuracy for accuracy, _ in scores]

    def _loss(self, texts: list[Text]) -> tuple[torch.Tensor, list[tuple[float, float]]]:
        """Sum over texts of the mean cross-entropy of a text's tokens; accuracy and least probability of each text."""
        info, device = self.info, self.decoder.device
        lengths = torch.tensor([len(text.token_ids) for text in texts], device=device)
        num_chunks = max(len(text.e) for text in texts)

        def stack(vectors):
            return torch.stack([F.pad(v, (0, 0) * (v.dim() - 1) + (0, num_chunks - len(v))) for v in vectors])

        # A shared m has one row for all chunks.
        m = [text.m.expand(len(text.e), -1) for text in texts]
        layout = build_layout(lengths, info.arrangement, info.chunk_size, num_chunks, info.num_e_tokens)
        slots = fill_slots(layout, stack([text.e for text in texts]).to(device), stack(m).to(device))
        sink = sink_ids(self.decoder.config, info.sink, len(texts), device)
        logits = answer_logits(self.decoder, slots, layout, sink)
        targets = torch.tensor([token for text in texts for token in text.token_ids], device=device)

        token_loss = F.cross_entropy(logits.float(), targets, reduction="none").split(lengths.tolist())
        correct = (logits.max(-1).indices == targets).float().split(lengths.tolist())
        accuracies = torch.stack([part.mean() for part in correct]).tolist()
        least = torch.stack([part.detach().max() for part in token_loss]).neg().exp().tolist()
        loss = torch.stack([part.mean() for part in token_loss]).sum()
        return loss, list(zip(accuracies, least, strict=True))

    def _new_parameter(self, *shape: int) -> nn.Parameter:
        values = torch.randn(*shape, generator=self.generator) * self.init_std
        return nn.Parameter(values.to(self.decoder.device))

    def _entry(self, text: Text, accuracy: float, steps: int) -> BankEntry:
        e = text.e.detach().cpu().clone()
        m = text.m.detach().cpu().expand(len(e), -1).clone()
        return BankEntry(text.id, text.token_ids, e, m, accuracy, steps)
