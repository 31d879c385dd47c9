"""Calibrates the length and the uncertainty that a model predicts on held-out answers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm, spearmanr
from sklearn.isotonic import IsotonicRegression

from modeling_protogen.configuration_protogen import UNCERTAINTY_SCORES, ProtoGenConfig

from .abstention import threshold_for_accuracy

# Shares of right tokens for which the uncertainty to abstain above is looked for.
WANTED_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
# The interval whose coverage the calibrated standard deviation fits exactly.
LEVEL = 0.8
# Where nearly all answers were cut at one length, what is seen has no spread at all; a variance needs some.
LEAST_SCALE = 0.01


def length_calibration(mean: np.ndarray, variance: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """
    What to add to the predicted mean of the log length, and what to multiply its standard deviation with, so that the
    median is right on average and the central 80 % interval covers 80 %. By quantiles, as log lengths have heavier
    tails than a normal distribution.

    Args:
        mean, variance (`np.ndarray` of shape `(texts,)`): predicted.
        lengths (`np.ndarray` of shape `(texts,)`): in tokens.
    """
    shift = float(np.median(np.log(lengths) - mean))
    distance = np.abs(np.log(lengths) - mean - shift) / np.sqrt(variance)
    scale = np.quantile(distance, LEVEL) / norm.ppf((1 + LEVEL) / 2)
    return shift, max(LEAST_SCALE, float(scale))


def rank_correlations(records: pd.DataFrame, names: Sequence[str] = UNCERTAINTY_SCORES) -> dict[str, float]:
    """Spearman's correlation of each of the scores with the share of wrong tokens; 0 for a constant."""
    wrong = records["wrong_share"]
    return {
        name: 0.0 if min(records[name].nunique(), wrong.nunique()) < 2 else float(spearmanr(records[name], wrong)[0])
        for name in names
    }


def uncertainty_calibration(score: np.ndarray, wrong: np.ndarray) -> list[list[float]]:
    """
    Expected share of wrong tokens at growing values of a score `(texts,)`, as `[[score, share], ...]`: isotonic
    regression (Zadrozny & Elkan, 2002).
    """
    fit = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(score, wrong)
    return np.stack([fit.X_thresholds_, fit.y_thresholds_], axis=1).tolist()


def calibrate_length(config: ProtoGenConfig, records: pd.DataFrame) -> None:
    """
    Sets the configuration's calibration of the length.

    Args:
        config (`ProtoGenConfig`): of the uncalibrated model that made the records.
        records (`pd.DataFrame`): from `one_step_records`, of instructions that the model has not learned from.
    """
    columns = "log_length_mean", "log_length_variance", "length"
    values = (records[name].to_numpy(dtype=float) for name in columns)
    config.log_length_shift, config.log_length_scale = length_calibration(*values)


def calibrate_uncertainty(config: ProtoGenConfig, records: pd.DataFrame) -> None:
    """
    Sets the configuration's uncertainty to the score that goes best with the share of wrong tokens, calibrated, and the
    uncertainties above which to abstain.
    Arguments as in [`calibrate_length`]; the records are made after it, as it changes the answers.
    """
    correlations = rank_correlations(records)
    name = max(correlations, key=correlations.get)
    config.uncertainty_score = name
    score, wrong = records[name].to_numpy(), records["wrong_share"].to_numpy()
    config.uncertainty_points = uncertainty_calibration(score, wrong)
    uncertainties = np.interp(score, *np.array(config.uncertainty_points).T)
    thresholds = {f"{share}": threshold_for_accuracy(1 - wrong, uncertainties, share) for share in WANTED_SHARES}
    config.abstention_thresholds = {share: value for share, value in thresholds.items() if value is not None}
