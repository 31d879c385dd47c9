"""Pictures made from result rows."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window
import matplotlib.pyplot as plt


def capacity_picture(rows: list[dict], threshold: float, title: str, path: str | Path) -> None:
    """
    Accuracy against length, a panel for each source of texts and a line for each scope of `m` and sink.

    Args:
        rows (`list[dict]`): with `source`, `m_scope`, `sink`, `length` and `accuracy`.
        threshold (`float`): drawn as a line.
        title (`str`), path (`str` or `Path`)
    """
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure, panels = plt.subplots(1, len(sources), figsize=(5.5 * len(sources), 4), sharey=True, squeeze=False)
    names = {"per_example": "own m", "shared": "shared m", "bos": "sink", "none": "no sink"}
    colours = {"per_example": "tab:blue", "shared": "tab:orange"}
    for panel, source in zip(panels[0], sources, strict=True):
        lines = dict.fromkeys((row["m_scope"], row["sink"]) for row in rows if row["source"] == source)
        for m_scope, sink in lines:
            points = [
                (row["length"], row["accuracy"])
                for row in rows
                if (row["source"], row["m_scope"], row["sink"]) == (source, m_scope, sink)
            ]
            style = {"color": colours.get(m_scope), "linestyle": "-" if sink == "bos" else ":", "marker": "o", "ms": 4}
            panel.plot(*zip(*sorted(points), strict=True), label=f"{names[m_scope]}, {names[sink]}", **style)
        panel.axhline(threshold, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        ticks = sorted({row["length"] for row in rows})
        panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
        panel.minorticks_off()
        panel.set_xlabel("tokens")
        panel.set_title(source.replace("_", " "))
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0][0].set_ylabel("reconstruction accuracy")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
