"""How firm a solution is: other seeds, noise, and the paths between two solutions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import cdist

from ..pictures import lines
from ..statistics import mean_with_interval
from .findings import Findings
from .reading import FittedTexts, Reader


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
    reader: Reader, fitted: FittedTexts, relative_sizes: list[float], which: tuple[str, ...], seed: int = 0
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
    reader: Reader,
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


def study(
    reader: Reader,
    solutions: list[FittedTexts],
    curve: Callable[[float], tuple[torch.Tensor, torch.Tensor]],
    noise: list[float],
    title: str,
    folder: Path,
) -> Findings:
    """
    Distances between seeds, noise on the first solution, and the straight and the learned path from the first to the
    second.

    Args:
        solutions (`list[FittedTexts]`): the same texts, a seed each.
        curve (`Callable`): the learned path, from `t` to `e` and `m`.
        noise (`list[float]`): relative sizes.
    """
    first, second = solutions[:2]
    figures = {}
    for number, fitted in enumerate(solutions):
        figures[f"accuracy_seed_{number}"] = mean_with_interval(reader.accuracies(fitted.e, fitted.m, fitted.token_ids))
    for name in ("e", "m"):
        distances = seed_distances([getattr(fitted, name).flatten(1).numpy() for fitted in solutions])
        for kind in ("within", "between"):
            by_text = distances.groupby("text")[kind].mean()
            figures[f"{name}_cosine_distance_{kind}_texts"] = mean_with_interval(by_text)
    noisy = pd.concat([noise_rows(reader, first, noise, which) for which in (("e",), ("m",), ("e", "m"))])
    for (vectors, size), part in noisy.groupby(["vectors", "relative_size"]):
        figures[f"noise_{size:g}_on_{vectors.replace(' ', '_')}_accuracy"] = mean_with_interval(part["accuracy"])

    def straight(t: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.lerp(first.e, second.e, t), torch.lerp(first.m, second.m, t)

    paths = pd.concat([path_rows(reader, first, straight, "linear"), path_rows(reader, first, curve, "bezier")])
    for name, part in paths.groupby("path"):
        figures[f"{name}_path_lowest_accuracy"] = mean_with_interval(part.groupby("text")["accuracy"].min())
    accuracy = "reconstruction accuracy"
    labels = ("noise, share of the vector's length", accuracy)
    lines(noisy, "relative_size", "accuracy", title, folder / "stability_noise.png", line="vectors", labels=labels)
    lines(paths, "t", "accuracy", title, folder / "stability_paths.png", line="path", labels=("t", accuracy))
    return Findings(figures, pd.concat([noisy, paths]))
