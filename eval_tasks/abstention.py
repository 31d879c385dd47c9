"""Answering only when sure: what that does to accuracy, and how well uncertainty tells right from wrong."""

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from .retention import by_growing_uncertainty


def coverage_curve(correct: np.ndarray, uncertainties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Coverage `(answers,)`, the share of answers given when the k surest are, and their accuracy `(answers,)`, from
    `correct` `(answers,)`, 0 or 1 each.
    """
    ordered = np.asarray(correct, float)[by_growing_uncertainty(np.asarray(uncertainties, float))]
    given = np.arange(1, len(ordered) + 1)
    return given / len(ordered), ordered.cumsum() / given


def abstention_metrics(correct: np.ndarray, is_given: np.ndarray) -> dict[str, float]:
    """
    Accuracy over all questions (an abstention is not correct), accuracy given an attempt, and their harmonic mean, the
    F score of SimpleQA (Wei et al., 2024, https://arxiv.org/abs/2411.04368); each `(answers,)` of 0 or 1.
    """
    correct, is_given = np.asarray(correct, bool), np.asarray(is_given, bool)
    right = (correct & is_given).sum()
    overall, attempted = right / len(correct), right / max(is_given.sum(), 1)
    return {
        "coverage": float(is_given.mean()),
        "accuracy": float(overall),
        "accuracy_given_attempted": float(attempted),
        "f_score": float(2 * overall * attempted / (overall + attempted)) if right else 0.0,
    }


def threshold_for_accuracy(correct: np.ndarray, uncertainties: np.ndarray, wanted: float) -> float | None:
    """
    The largest uncertainty up to which the answers, all together, have the wanted accuracy; None where no threshold
    has it. Equally uncertain answers are all given or none.
    """
    uncertainties = np.asarray(uncertainties, float)
    _, accuracy = coverage_curve(correct, uncertainties)
    ordered = np.sort(uncertainties)
    is_last = np.append(ordered[1:] != ordered[:-1], True)
    reached = np.flatnonzero(is_last & (accuracy >= wanted))
    return float(ordered[reached[-1]]) if len(reached) else None


def ranking_metrics(quality: np.ndarray, uncertainties: np.ndarray, threshold: float = 0.5) -> dict[str, float]:
    """
    AUROC of uncertainty as a detector of answers whose quality is below the threshold (NaN where all are, or none), and
    its rank correlation (Spearman) with quality (NaN where either is the same for all); both arguments are
    `(answers,)`.
    """
    quality, uncertainties = np.asarray(quality, float), np.asarray(uncertainties, float)
    wrong = quality < threshold
    both = 0 < wrong.sum() < len(wrong)
    vary = np.ptp(quality) > 0 and np.ptp(uncertainties) > 0
    return {
        "auroc_wrong": float(roc_auc_score(wrong, uncertainties)) if both else float("nan"),
        "spearman_quality": float(spearmanr(uncertainties, quality).statistic) if vary else float("nan"),
    }


def expected_calibration_error(errors: np.ndarray, expected: np.ndarray, bins: int = 10) -> float:
    """
    Mean distance between the error that was expected and the one there was, over bins of equal numbers of answers
    (Nguyen & O'Connor, 2015); both arguments are `(answers,)`.
    """
    errors, expected = np.asarray(errors, float), np.asarray(expected, float)
    gaps = [abs(errors[part].mean() - expected[part].mean()) * len(part) for part in equal_bins(expected, bins)]
    return float(sum(gaps) / len(errors))


def equal_bins(values: np.ndarray, bins: int) -> list[np.ndarray]:
    """Indices of like values, in bins of equal numbers."""
    return np.array_split(np.argsort(values, kind="stable"), min(bins, len(values)))
