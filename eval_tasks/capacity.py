"""Capacity from the rows of its fits: figures and a picture."""

from pathlib import Path

import pandas as pd

from .pictures import lines
from .statistics import mean_with_interval

AXES = ["decoder", "source", "arrangement", "m_scope", "sink"]
NAMES = {"per_example": "own_m", "shared": "shared_m", "per_category": "category_m", "bos": "sink", "none": "no_sink"}
NAMES |= {"fixed_zero": "zero_m", "fixed_mean": "mean_embedding_m", "fixed_random": "random_m"}


def varying_axes(rows: pd.DataFrame) -> list[str]:
    """The axes in which the rows differ."""
    return [axis for axis in AXES if axis in rows and rows[axis].nunique() > 1]


def named_cells(rows: pd.DataFrame, axes: list[str]) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each setting of these axes, named by it; `all` if there are no axes."""
    if not axes:
        return [("all", rows)]
    return [("_".join(NAMES.get(v, v) for v in key), cell) for key, cell in rows.groupby(axes, sort=False)]


def capacity_figures(rows: list[dict], threshold: float) -> dict[str, float | list[float]]:
    """
    For each setting: `C_tokens`, the longest length whose mean accuracy reaches the threshold; `H_LM_bits`, the
    information of those texts with its interval; accuracy and exact match at each length, and accuracy in each category
    where texts have one, with intervals.
    """
    rows, figures = pd.DataFrame(rows), {}
    for name, cell in named_cells(rows, varying_axes(rows)):
        accuracy = cell.groupby("length")["accuracy"].mean()
        held = accuracy[accuracy >= threshold]
        figures[f"{name}_C_tokens"] = int(held.index.max()) if len(held) else 0
        longest = cell[cell["length"] == figures[f"{name}_C_tokens"]]
        figures[f"{name}_H_LM_bits"] = mean_with_interval(longest["bits"]) if len(held) else 0.0
        for length, part in cell.groupby("length"):
            figures[f"{name}_{length}_tokens_accuracy"] = mean_with_interval(part["accuracy"])
            figures[f"{name}_{length}_tokens_exact_match"] = mean_with_interval(part["accuracy"] == 1)
        if cell["category"].nunique() > 1:
            for category, part in cell.groupby("category"):
                # A text's accuracies at several lengths are no more than one observation.
                by_text = part.groupby("id")["accuracy"].mean()
                if len(by_text) > 1:
                    figures[f"{name}_{category}_accuracy"] = mean_with_interval(by_text)
    return figures


def capacity_picture(rows: list[dict], threshold: float, title: str, path: str | Path) -> None:
    """
    Accuracy against length: a panel for each value of the first axis that varies if others do too, a colour for each
    setting of these, dots without a sink.

    Args:
        rows (`list[dict]`): as in [`capacity_figures`].
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
