"""What a study leaves."""

from dataclasses import dataclass

import pandas as pd


@dataclass
class Findings:
    """
    What a study found; its pictures are in its folder.

    Args:
        figures (`dict`): from a name to a number, or to `[value, low, high]`.
        rows (`pd.DataFrame`): what the figures are made of, for a CSV file.
        html (`str`): examples, for the page.
    """

    figures: dict[str, float | list[float]]
    rows: pd.DataFrame
    html: str = ""
