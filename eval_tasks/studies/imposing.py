"""What meaning costs when it is imposed on `e`: texts are fitted under one more loss, which sees them all together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from eval_tasks.plots import curves
from eval_tasks.sentence_encoder import sentence_embeddings
from eval_tasks.statistics import mean_with_interval
from modeling_protogen.modeling_protogen import ProtoGenOutput
from trainers.arguments import MeaningArguments
from trainers.embedded import resolve
from trainers.fitting import ProtoTokenFitter, Text, TextFit
from trainers.losses.anchor import AnchorLoss
from trainers.losses.relational_distillation import RelationalDistillationLoss
from trainers.proto_bank import BankEntry, ProtoTokenBank

from .roles import similarity_of_structure
from .study import StudyContext, StudyResult


def fit_with_meaning(
    fitter: ProtoTokenFitter,
    texts: list[Text],
    loss: Callable[[ProtoGenOutput, dict[str, torch.Tensor]], torch.Tensor],
    teacher_embeddings: torch.Tensor,
    weight: float,
    steps: int,
) -> list[BankEntry]:
    """
    Fits the texts for `steps` steps, all in each step, on the sum over texts of cross-entropy and `weight` times each
    one's share of the loss.

    Args:
        fitter (`ProtoTokenFitter`): gives the decoder, the starts and the optimiser's settings.
        texts (`list[Text]`): of one number of chunks.
        loss (`Callable`): one of `trainers.losses`; it sees `outputs.e` and `batch["teacher_embeddings"]`.
        teacher_embeddings (`torch.Tensor` of shape `(texts, teacher_dim)`)

    Returns:
        `list[BankEntry]`: where the texts are after the last step, not the best on the way: that would ignore the loss.
    """
    fits = [TextFit(text) for text in texts]
    for fit in fits:
        fitter.start(fit)
    batch = {"teacher_embeddings": teacher_embeddings.to(fitter.decoder.device)}
    for step in tqdm(range(steps), desc=f"weight {weight:g}", leave=False):
        fitter.backward(fits)
        if weight:
            outputs = ProtoGenOutput(e=torch.stack([fit.e for fit in fits]))
            (weight * len(fits) * loss(outputs, batch)).backward()
        for fit in fits:
            fitter.update([fit.e, fit.m], fit.optimizer, fitter.learning_rate(step, steps))
    entries = []
    for fit in fits:
        entry = BankEntry(fit.text.id, fit.text.token_ids, fit.e.detach().cpu(), fit.m.detach().cpu(), 0.0, steps)
        entry.accuracy = fitter.measure(entry)
        entries.append(entry)
    return entries


def measure(
    fits: dict[str, dict[float, tuple[np.ndarray, list[float]]]], meaning: np.ndarray, title: str, folder: Path
) -> StudyResult:
    """
    Reconstruction accuracy against similarity of structure to what the texts mean.

    Args:
        fits (`dict`): from a loss to its weight to `e` `(texts, dim)` and the accuracies `(texts,)` under it.
        meaning (`np.ndarray` of shape `(texts, dim)`): embeddings of a sentence encoder.
    """
    metrics, rows, points = {}, [], {}
    for loss, by_weight in fits.items():
        points[loss] = []
        for weight, (e, accuracies) in by_weight.items():
            accuracy, similarity = mean_with_interval(accuracies), similarity_of_structure(e, meaning)
            metrics[f"{loss}_{weight:g}_accuracy"] = accuracy
            metrics[f"{loss}_{weight:g}_similarity_to_meaning"] = similarity
            points[loss].append((similarity, accuracy))
            rows += [{"loss": loss, "weight": weight, "text": n, "accuracy": a} for n, a in enumerate(accuracies)]
    labels = ("similarity of e to meaning", "reconstruction accuracy")
    curves(points, labels, title, folder / "imposing.png")
    return StudyResult(metrics, pd.DataFrame(rows))


@dataclass
class Arguments(MeaningArguments):
    """Which meaning, and how strongly it is imposed."""

    study_weights: list[float] = field(
        default_factory=lambda: [0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0], metadata={"help": "Weights of the loss."}
    )


def study(context: StudyContext, args: Arguments) -> StudyResult:
    """Fits the texts of one source under each loss and weight."""
    texts, steps = context.texts(context.source), context.fit_args.fit_max_steps
    meaning = sentence_embeddings(
        resolve(args.sentence_encoder), [context.tokenizer.decode(text.token_ids) for text in texts]
    )
    teacher, fitter, fits = torch.from_numpy(meaning), context.fitter(), {}
    for name, loss in {"anchor": AnchorLoss(), "relational": RelationalDistillationLoss()}.items():
        fits[name] = {}
        for weight in args.study_weights:
            bank = ProtoTokenBank(context.folder / "banks" / f"{name}-{weight:g}", context.info)
            if not len(bank):
                with bank.writing():
                    bank.append(fit_with_meaning(fitter, texts, loss, teacher, weight, steps))
            entries = [bank[text.id] for text in texts]
            e = torch.cat([entry.e for entry in entries]).flatten(1).numpy()
            fits[name][weight] = (e, [entry.accuracy for entry in entries])
    return measure(fits, meaning, context.title, context.folder)
