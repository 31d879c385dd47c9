"""What meaning costs when it is imposed on `e`."""

from pathlib import Path

import numpy as np
import pandas as pd

from ..pictures import curves
from ..statistics import mean_with_interval
from .findings import Findings
from .roles import similarity_of_structure


def study(
    fits: dict[str, dict[float, tuple[np.ndarray, list[float]]]], meaning: np.ndarray, title: str, folder: Path
) -> Findings:
    """
    Reconstruction accuracy against similarity of structure to what the texts mean.

    Args:
        fits (`dict`): from a loss to its weight to `e` `(texts, dim)` and the accuracies `(texts,)` under it.
        meaning (`np.ndarray` of shape `(texts, dim)`): embeddings of a sentence encoder.
    """
    figures, rows, points = {}, [], {}
    for loss, by_weight in fits.items():
        points[loss] = []
        for weight, (e, accuracies) in by_weight.items():
            accuracy, similarity = mean_with_interval(accuracies), similarity_of_structure(e, meaning)
            figures[f"{loss}_{weight:g}_accuracy"] = accuracy
            figures[f"{loss}_{weight:g}_similarity_to_meaning"] = similarity
            points[loss].append((similarity, accuracy))
            rows += [{"loss": loss, "weight": weight, "text": n, "accuracy": a} for n, a in enumerate(accuracies)]
    labels = ("similarity of e to meaning", "reconstruction accuracy")
    curves(points, labels, title, folder / "imposing.png")
    return Findings(figures, pd.DataFrame(rows))
