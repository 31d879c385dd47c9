"""How time and memory are measured: rounds of all methods in turn, so that the machine's drift hits all alike."""

import threading
import time
from collections.abc import Callable

import numpy as np
import psutil
import torch
from tqdm import tqdm

from trainers.devices import synchronize


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


def ratio_with_interval(
    numerator: np.ndarray, denominator: np.ndarray, summary: Callable = np.median, seed: int = 0
) -> list[float]:
    """
    Ratio of the medians over rounds, or of another summary, and its 95 % bootstrap interval `[ratio, low, high]`; pairs
    of calls of one round are drawn together.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(numerator), size=(2000, len(numerator)))
    ratios = summary(numerator[rows], axis=1) / summary(denominator[rows], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return [float(summary(numerator) / summary(denominator)), float(low), float(high)]


def peak_gigabytes(call) -> float:
    """The most memory that a call takes on top of what there is: of the accelerator, or else of this process."""
    if torch.accelerator.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    process, stop = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        stop.set()
        watcher.join()
    return (peak - before) / 1e9
