"""How well answer lengths are predicted, and how well the predicted uncertainty is kept."""

import numpy as np
from scipy.stats import norm
from sklearn.linear_model import LinearRegression

from .statistics import mean_with_interval

LEVELS = (0.5, 0.8, 0.95)
# Where all training answers have one length, a baseline is this sure of it, in squared nats.
MIN_VARIANCE = 1e-4


def is_covered(mean: np.ndarray, variance: np.ndarray, lengths: np.ndarray, level: float) -> np.ndarray:
    """
    Whether each length lies in the central interval of that level of its predicted log-normal, rounded outwards to
    whole tokens.

    Args:
        mean, variance (`np.ndarray` of shape `(texts,)`): of the natural log of the length.
        lengths (`np.ndarray` of shape `(texts,)`): in tokens.
    """
    half = norm.ppf((1 + level) / 2) * np.sqrt(variance)
    return (np.floor(np.exp(mean - half)) <= lengths) & (lengths <= np.ceil(np.exp(mean + half)))


def negative_log_likelihood(mean: np.ndarray, variance: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Gaussian negative log-likelihood of the log lengths, in nats, with its constant; `(texts,)`."""
    return -norm.logpdf(np.log(lengths), mean, np.sqrt(variance))


def constant_baseline(train_lengths: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the training answers' log lengths, for each of `count` texts."""
    logs = np.log(train_lengths)
    return np.full(count, logs.mean()), np.full(count, max(logs.var(), MIN_VARIANCE))


def linear_baseline(
    train_instructions: np.ndarray, train_lengths: np.ndarray, instructions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Log length of the answer by linear regression on the log length of the instruction, and the variance of its
    residuals.

    Args:
        train_instructions, instructions (`np.ndarray` of shape `(texts,)`): lengths of instructions in tokens.
    """
    x, y = np.log(train_instructions)[:, None], np.log(train_lengths)
    model = LinearRegression().fit(x, y)
    variance = max((y - model.predict(x)).var(), MIN_VARIANCE)
    return model.predict(np.log(instructions)[:, None]), np.full(len(instructions), variance)


def length_metrics(
    predictions: dict[str, tuple[np.ndarray, np.ndarray]], lengths: np.ndarray
) -> dict[str, list[float]]:
    """
    For each way to predict, `coverage_50`, `coverage_80`, `coverage_95`, `nll` in nats and `mae_tokens` of the median,
    with intervals over texts; a name that is not empty is appended with an underscore.

    Args:
        predictions (`dict`): from a name to mean and variance of the log lengths, each `(texts,)`.
        lengths (`np.ndarray` of shape `(texts,)`): the true ones, in tokens.
    """
    metrics = {}
    for name, (mean, variance) in predictions.items():
        end = f"_{name}" if name else ""
        for level in LEVELS:
            covered = is_covered(mean, variance, lengths, level)
            metrics[f"coverage_{100 * level:.0f}{end}"] = mean_with_interval(covered)
        metrics[f"nll{end}"] = mean_with_interval(negative_log_likelihood(mean, variance, lengths))
        metrics[f"mae_tokens{end}"] = mean_with_interval(np.abs(np.exp(mean) - lengths))
    return metrics
