"""Plots of rows and metrics, with intervals over texts."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .statistics import mean_with_interval


def lines(
    rows: pd.DataFrame,
    x: str,
    y: str,
    title: str,
    path: str | Path,
    line: str | None = None,
    panel: str | None = None,
    dotted: str | None = None,
    threshold: float | None = None,
    log2: bool = False,
    log_y: bool = False,
    labels: tuple[str, str] | None = None,
) -> None:
    """
    The mean of `y` over texts against `x`, with its interval.

    Args:
        rows (`pd.DataFrame`): one for each text and point.
        x, y (`str`): columns.
        line, panel (`str`, *optional*): columns whose values get a colour and a panel of their own.
        dotted (`str`, *optional*): column of booleans; true lines are dotted, in the colour of the line they belong to.
        threshold (`float`, *optional*): drawn as a line.
        log2, log_y (`bool`): scales of `x` and `y`.
        labels (`tuple[str, str]`, *optional*): of the axes; the columns' names by default.
    """
    panels = list(rows.groupby(panel, sort=False)) if panel else [(None, rows)]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (name, part) in zip(axes[0], panels, strict=True):
        keys = [key for key in (line, dotted) if key]
        colours = {}
        for key, one in part.groupby(keys, sort=False) if keys else [((None,), part)]:
            colour = colours.setdefault(key[0], f"C{len(colours)}")
            points = [(at, *mean_with_interval(texts[y])) for at, texts in one.groupby(x)]
            at, mean, low, high = np.array(points).T
            is_dotted = dotted is not None and key[-1]
            label = None if line is None else f"{key[0]}, {dotted}" if is_dotted else str(key[0])
            style = {"linestyle": ":", "markerfacecolor": "white"} if is_dotted else {}
            axis.plot(at, mean, color=colour, marker="o", ms=4, label=label, **style)
            axis.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        if threshold is not None:
            axis.axhline(threshold, color="grey", linewidth=0.8)
        if log2:
            axis.set_xscale("log", base=2)
            ticks = sorted(rows[x].unique())
            axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
            axis.minorticks_off()
        if log_y:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.set_title(name)
        axis.set_xlabel(labels[0] if labels else x.replace("_", " "))
        if line:
            beside = {}
            if len(axis.get_legend_handles_labels()[0]) > 4:
                figure.set_figwidth(figure.get_figwidth() + 4)
                beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
            axis.legend(fontsize="small", **beside)
    axes[0][0].set_ylabel(labels[1] if labels else y.replace("_", " "))
    save(figure, title, path)


def bars(panels: dict[str, dict[str, list[float]]], title: str, path: str | Path) -> None:
    """Bars with intervals: for each panel from a name to `[value, low, high]`; four panels a row."""
    columns, rows = min(len(panels), 4), -(-len(panels) // 4)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, metrics) in zip(axes.flat, panels.items(), strict=False):
        value, low, high = np.array(list(metrics.values())).T
        axis.bar(range(len(value)), value, color=[f"C{number % 10}" for number in range(len(value))], alpha=0.8)
        errors = arms(value, low, high)
        axis.errorbar(range(len(value)), value, errors, fmt="none", color="black", capsize=3)
        axis.set_xticks(range(len(value)), list(metrics), rotation=30, ha="right")
        axis.grid(alpha=0.3, axis="y")
        axis.set_title(name)
    save(figure, title, path)


def heatmaps(maps: dict[str, np.ndarray], labels: tuple[str, str], title: str, path: str | Path) -> None:
    """Two-dimensional arrays side by side, each with a scale; the labels are those of rows and columns."""
    figure, axes = plt.subplots(1, len(maps), figsize=(5.5 * len(maps), 5), squeeze=False)
    for axis, (name, values) in zip(axes[0], maps.items(), strict=True):
        image = axis.imshow(values, aspect="auto", cmap="magma", vmin=0)
        figure.colorbar(image, ax=axis)
        axis.set(title=name, ylabel=labels[0], xlabel=labels[1])
    save(figure, title, path)


def scatter(maps: dict[str, np.ndarray], groups: list[str], title: str, path: str | Path) -> None:
    """Points `(texts, 2)`, a panel for each name, a colour for each group."""
    figure, axes = plt.subplots(1, len(maps), figsize=(5.5 * len(maps), 5), squeeze=False)
    groups = np.asarray(groups)
    for axis, (name, points) in zip(axes[0], maps.items(), strict=True):
        for number, group in enumerate(sorted(set(groups))):
            axis.scatter(*points[groups == group].T, s=14, color=f"C{number % 10}", label=group.replace("_", " "))
        axis.set(title=name, xticks=[], yticks=[])
    axes[0][-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, title, path)


def curves(
    named: dict[str, list[tuple[list[float], list[float]]]],
    labels: tuple[str, str],
    title: str,
    path: str | Path,
    log_x: bool = False,
) -> None:
    """A line for each name through its points in order; both coordinates are `[value, low, high]`."""
    figure, axis = plt.subplots(figsize=(6, 4.5))
    for name, points in named.items():
        (x, x_low, x_high), (y, y_low, y_high) = np.array(points).transpose(1, 2, 0)
        errors = {"xerr": arms(x, x_low, x_high), "yerr": arms(y, y_low, y_high)}
        axis.errorbar(x, y, **errors, fmt="-o", ms=4, elinewidth=0.8, label=name)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    if log_x:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, title, path)


def exact_points(x: Iterable[float], y: Iterable[float]) -> list[tuple[list[float], list[float]]]:
    """Points for `curves` whose coordinates have no intervals."""
    return [([at] * 3, [value] * 3) for at, value in zip(x, y, strict=True)]


def arms(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths `(2, points)` of error bars; a value outside of its bootstrap interval has one arm."""
    return np.maximum([value - low, high - value], 0)


def save(figure: Figure, title: str, path: str | Path) -> None:
    """Writes a figure and frees its memory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
