"""Intervals over texts."""

import numpy as np
from scipy.stats import bootstrap


def mean_with_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """
    The mean of `values` `(texts,)` and its 95 % percentile bootstrap interval over texts, `[mean, low, high]`.

    Raises:
        ValueError: if there are fewer than two values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"an interval needs at least two texts, got {len(values)}.")
    if values.min() == values.max():
        return [float(values[0])] * 3
    interval = bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=seed).confidence_interval
    return [float(values.mean()), float(interval.low), float(interval.high)]
