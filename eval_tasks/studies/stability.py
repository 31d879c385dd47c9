"""How firm a solution is: other seeds, noise, and the paths between two solutions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import cdist
from torch import nn
from tqdm import tqdm

from eval_tasks.plots import lines
from eval_tasks.statistics import mean_with_interval
from trainers.fitting import ProtoTokenFitter, Text, TextFit
from trainers.proto_bank import BankEntry

from .reading import FittedTexts, Reconstructor
from .study import StudyContext, StudyResult


def seed_distances(solutions: list[np.ndarray]) -> pd.DataFrame:
    """
    Cosine distances between the solutions of several seeds.

    Args:
        solutions (list of `np.ndarray` of shape `(texts, dim)`): the same texts, a seed each.

    Returns:
        `pd.DataFrame`: a row for each text and pair of seeds: `within` (this text under both seeds) and `between` (the
        mean over this text under the one and any other text under the other).
    """
    rows, count = [], len(solutions[0])
    others = ~np.eye(count, dtype=bool)
    for first in range(len(solutions)):
        for second in range(first + 1, len(solutions)):
            distances = cdist(solutions[first], solutions[second], "cosine")
            for text in range(count):
                between = distances[text, others[text]].mean()
                rows.append({"text": text, "within": distances[text, text], "between": between})
    return pd.DataFrame(rows)


def noise_rows(
    reader: Reconstructor, fitted: FittedTexts, relative_sizes: list[float], which: tuple[str, ...], seed: int = 0
) -> pd.DataFrame:
    """
    Accuracy under Gaussian noise whose expected length is a share of the vector's own.

    Args:
        relative_sizes (`list[float]`): those shares.
        which (`tuple[str, ...]`): vectors that get noise: `("e",)`, `("m",)` or both.

    Returns:
        `pd.DataFrame`: `text`, `vectors`, `relative_size`, `accuracy`.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for size in relative_sizes:
        e = with_noise(fitted.e, size, generator) if "e" in which else fitted.e
        m = with_noise(fitted.m, size, generator) if "m" in which else fitted.m
        for text, accuracy in enumerate(reader.accuracies(e, m, fitted.token_ids)):
            rows.append({"text": text, "vectors": " and ".join(which), "relative_size": size, "accuracy": accuracy})
    return pd.DataFrame(rows)


def with_noise(vectors: torch.Tensor, relative_size: float, generator: torch.Generator) -> torch.Tensor:
    """`(..., dim)` plus Gaussian noise of standard deviation `relative_size * |v| / sqrt(dim)`."""
    scale = relative_size * vectors.norm(dim=-1, keepdim=True) / vectors.shape[-1] ** 0.5
    return vectors + scale * torch.randn(vectors.shape, generator=generator)


def path_rows(
    reader: Reconstructor,
    fitted: FittedTexts,
    path: Callable[[float], tuple[torch.Tensor, torch.Tensor]],
    name: str,
    points: int = 11,
) -> pd.DataFrame:
    """
    Accuracy along a path between two solutions.

    Args:
        path (`Callable`): from `t` in 0..1 to `e` `(texts, num_e_tokens, dim)` and `m` `(texts, dim)`.
        name (`str`): linear or bezier.

    Returns:
        `pd.DataFrame`: `text`, `path`, `t`, `accuracy`.
    """
    rows = []
    for t in np.linspace(0, 1, points):
        for text, accuracy in enumerate(reader.accuracies(*path(float(t)), fitted.token_ids)):
            rows.append({"text": text, "path": name, "t": float(t), "accuracy": accuracy})
    return pd.DataFrame(rows)


def bezier(start: torch.Tensor, control: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """The quadratic Bézier curve `(1-t)^2 start + 2 t (1-t) control + t^2 end`."""
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end


def fit_bezier_controls(
    fitter: ProtoTokenFitter, starts: list[BankEntry], ends: list[BankEntry], steps: int, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Learns the control points of curves along which texts stay reconstructed: they minimise the texts' cross-entropy at
    a point of the curve that is drawn again in each step (Mezentsev & Oseledets, arXiv:2505.21189, equation 4; Garipov
    et al., 2018, arXiv:1802.10026).

    Args:
        fitter (`ProtoTokenFitter`): gives the decoder and the optimiser's settings.
        starts, ends (`list[BankEntry]`): two solutions of each text.
        steps (`int`): optimisation steps.

    Returns:
        The control points of `e` `(chunks, num_e_tokens, dim)` and `m` `(chunks, dim)`, a pair for each text.
    """
    device, generator = fitter.decoder.device, torch.Generator().manual_seed(seed)
    ends_of = [
        [(a.e.to(device), b.e.to(device)), (a.m.to(device), b.m.to(device))] for a, b in zip(starts, ends, strict=True)
    ]
    controls = [[nn.Parameter((a + b) / 2) for a, b in pairs] for pairs in ends_of]
    texts = [Text(entry.id, entry.token_ids) for entry in starts]
    optimizers = [fitter.optimizer(pair) for pair in controls]
    for step in tqdm(range(steps), desc="curves", leave=False):
        where = torch.rand(len(texts), generator=generator).tolist()
        fits = []
        for text, pairs, control, t in zip(texts, ends_of, controls, where, strict=True):
            e, m = (bezier(a, c, b, t) for (a, b), c in zip(pairs, control, strict=True))
            fits.append(TextFit(text, e, m))
        fitter.backward(fits)
        for pair, optimizer in zip(controls, optimizers, strict=True):
            fitter.update(pair, optimizer, fitter.learning_rate(step, steps))
    return [tuple(c.detach().cpu() for c in pair) for pair in controls]


def measure(
    reader: Reconstructor,
    solutions: list[FittedTexts],
    curve: Callable[[float], tuple[torch.Tensor, torch.Tensor]],
    noise: list[float],
    title: str,
    folder: Path,
) -> StudyResult:
    """
    Distances between seeds, noise on the first solution, and the straight and the learned path from the first to the
    second.

    Args:
        solutions (`list[FittedTexts]`): the same texts, a seed each.
        curve (`Callable`): the learned path, from `t` to `e` and `m`.
        noise (`list[float]`): relative sizes.
    """
    first, second = solutions[:2]
    metrics = {}
    for number, fitted in enumerate(solutions):
        metrics[f"accuracy_seed_{number}"] = mean_with_interval(reader.accuracies(fitted.e, fitted.m, fitted.token_ids))
    for name in ("e", "m"):
        distances = seed_distances([getattr(fitted, name).flatten(1).numpy() for fitted in solutions])
        for kind in ("within", "between"):
            by_text = distances.groupby("text")[kind].mean()
            metrics[f"{name}_cosine_distance_{kind}_texts"] = mean_with_interval(by_text)
    noisy = pd.concat([noise_rows(reader, first, noise, which) for which in (("e",), ("m",), ("e", "m"))])
    for (vectors, size), part in noisy.groupby(["vectors", "relative_size"]):
        metrics[f"noise_{size:g}_on_{vectors.replace(' ', '_')}_accuracy"] = mean_with_interval(part["accuracy"])

    def straight(t: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.lerp(first.e, second.e, t), torch.lerp(first.m, second.m, t)

    paths = pd.concat([path_rows(reader, first, straight, "linear"), path_rows(reader, first, curve, "bezier")])
    for name, part in paths.groupby("path"):
        metrics[f"{name}_path_lowest_accuracy"] = mean_with_interval(part.groupby("text")["accuracy"].min())
    accuracy = "reconstruction accuracy"
    labels = ("noise, share of the vector's length", accuracy)
    lines(noisy, "relative_size", "accuracy", title, folder / "stability_noise.png", line="vectors", labels=labels)
    lines(paths, "t", "accuracy", title, folder / "stability_paths.png", line="path", labels=("t", accuracy))
    return StudyResult(metrics, pd.concat([noisy, paths]))


@dataclass
class Arguments:
    """Seeds, noise and curves."""

    study_seeds: int = field(default=3, metadata={"help": "Solutions of each text."})
    study_noise: list[float] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0],
        metadata={"help": "Length of the noise as a share of the vector's."},
    )
    study_curve_steps: int = field(default=300, metadata={"help": "Steps in which a curve is learned."})

    def __post_init__(self):
        if self.study_seeds < 2:
            raise ValueError(f"study_seeds must be at least 2, got {self.study_seeds}.")


def study(context: StudyContext, args: Arguments) -> StudyResult:
    """How firm the solutions of the texts of one source are."""
    source, seed = context.source, context.seed
    solutions = [context.fit(source, seed + number) for number in range(args.study_seeds)]
    controls = fit_bezier_controls(context.fitter(), solutions[0], solutions[1], args.study_curve_steps, seed)
    control_e, control_m = (torch.cat(part) for part in zip(*controls, strict=True))
    fitted = [context.fitted(source, entries) for entries in solutions]
    start, end = fitted[:2]

    def curve(t: float) -> tuple[torch.Tensor, torch.Tensor]:
        return bezier(start.e, control_e, end.e, t), bezier(start.m, control_m, end.m, t)

    return measure(context.reader, fitted, curve, args.study_noise, context.title, context.folder)
