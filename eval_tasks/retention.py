"""
Retention curves: quality of what is kept while the most uncertain answers are dropped, as the Shifts benchmark defines
them (Malinin et al., 2021, https://arxiv.org/abs/2107.07455, section 2 and its published code).
"""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass
class Retention:
    """
    Args:
        retained (`np.ndarray` of shape `(answers + 1,)`): share of answers that are kept.
        value (`np.ndarray` of shape `(answers + 1,)`): quality at that share.
        area (`float`): under the curve.
    """

    retained: np.ndarray
    value: np.ndarray
    area: float


def by_growing_uncertainty(uncertainties: np.ndarray) -> np.ndarray:
    """The order of the answers, surest first; ties as a stable sort of -uncertainty leaves them, reversed."""
    return np.argsort(-uncertainties, kind="stable")[::-1]


def f1_retention(errors: np.ndarray, uncertainties: np.ndarray, threshold: float) -> Retention:
    """
    F1 of "kept" as a prediction of "acceptable": with the k surest answers kept, `TP_k` of them acceptable and M
    acceptable in all, `F1_k = 2 TP_k / (k + M)`, at `k / (N + 1)`; the area by the trapezoid rule.

    Args:
        errors (`np.ndarray` of shape `(answers,)`), uncertainties (`np.ndarray` of shape `(answers,)`)
        threshold (`float`): an answer is acceptable where its error is at most this.
    """
    errors, uncertainties = np.asarray(errors, float), np.asarray(uncertainties, float)
    check(errors, uncertainties)
    acceptable = errors[by_growing_uncertainty(uncertainties)] <= threshold
    kept = np.arange(len(errors) + 1)
    retained = kept / (len(errors) + 1)
    if not acceptable.any():
        warnings.warn(f"no answer has an error of at most {threshold}: F1-retention is not defined.", stacklevel=2)
        return Retention(retained, np.full(len(kept), np.nan), float("nan"))
    value = 2 * np.concatenate([[0], acceptable.cumsum()]) / (kept + acceptable.sum())
    return Retention(retained, value, float(np.trapezoid(value, retained)))


def f1_at_95(curve: Retention) -> float:
    """F1 with 95 % of the answers kept: the value at `k = int(0.95 (N + 1))`."""
    return float(curve.value[int(0.95 * len(curve.value))])


def error_retention(errors: np.ndarray, uncertainties: np.ndarray) -> Retention:
    """
    Mean error of all answers with the dropped ones set right, `sum of the k surest errors / N`; equally uncertain
    answers share their mean error. The area is the mean of the curve's points.
    """
    errors, uncertainties = np.asarray(errors, float), np.asarray(uncertainties, float)
    check(errors, uncertainties)
    shared = pd.Series(errors).groupby(uncertainties).transform("mean").to_numpy()
    value = np.concatenate([[0], shared[np.argsort(uncertainties, kind="stable")].cumsum()]) / len(errors)
    return Retention(np.arange(len(value)) / len(errors), value, float(value.mean()))


def retention_metrics(
    errors: np.ndarray, uncertainties: np.ndarray, threshold: float, seed: int = 0
) -> dict[str, float]:
    """Areas and F1@95 % of the answers' own order, of a random one (mean of 100) and of the best one, by error."""
    errors, rng = np.asarray(errors, float), np.random.default_rng(seed)
    orders = [rng.permutation(len(errors)) for _ in range(100)]
    own = f1_retention(errors, uncertainties, threshold)
    best = f1_retention(errors, errors, threshold)
    random = [f1_retention(errors, order, threshold) for order in orders]
    return {
        "f1_auc": own.area,
        "f1_auc_random": float(np.mean([curve.area for curve in random])),
        "f1_auc_optimal": best.area,
        "f1_at_95": f1_at_95(own),
        "error_auc": error_retention(errors, uncertainties).area,
        "error_auc_random": float(errors.mean()) / 2,
        "error_auc_optimal": error_retention(errors, errors).area,
    }


def check(errors: np.ndarray, uncertainties: np.ndarray) -> None:
    if errors.shape != uncertainties.shape or errors.ndim != 1 or not len(errors):
        raise ValueError(f"errors {errors.shape} and uncertainties {uncertainties.shape} must be one number an answer.")
    if not (np.isfinite(errors).all() and np.isfinite(uncertainties).all()):
        raise ValueError("errors and uncertainties must be finite numbers.")
