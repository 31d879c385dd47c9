"""How time is measured: rounds of all methods in turn, so that the machine's drift hits all alike."""

import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm


def interleaved_seconds(
    methods: dict[str, Callable[[int], object]], rounds: int = 15, warmup: int = 2
) -> dict[str, np.ndarray]:
    """
    Calls every method once a round, with a progress bar.

    Args:
        methods (`dict[str, Callable]`): what to time, by name; each gets the number of the round, so that all have the
            same input in one round, and does the whole work, prompt in, text out.
        rounds (`int`): timed rounds.
        warmup (`int`): rounds before that.

    Returns:
        `dict[str, np.ndarray]`: seconds of each call, shape `(rounds,)`.
    """
    seconds = {name: [] for name in methods}
    for number in tqdm(range(warmup + rounds), desc="time", unit="round"):
        for name, call in methods.items():
            synchronize()
            start = time.perf_counter()
            call(number)
            synchronize()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def synchronize() -> None:
    """Waits for the accelerator, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def ratio_with_interval(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """
    Ratio of the medians, and its 95 % bootstrap interval over rounds (pairs of calls of one round are drawn together).
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(numerator), size=(2000, len(numerator)))
    ratios = np.median(numerator[rows], axis=1) / np.median(denominator[rows], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(numerator) / np.median(denominator)), float(low), float(high)
