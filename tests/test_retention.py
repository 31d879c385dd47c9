"""Retention and abstention against the golden numbers, slow definitions and Shifts' own assertions."""

from itertools import pairwise
from pathlib import Path

import evaluate
import numpy as np
import pytest

from eval_tasks.abstention import (
    abstention_metrics,
    coverage_curve,
    expected_calibration_error,
    ranking_metrics,
    threshold_for_accuracy,
)
from eval_tasks.retention import by_growing_uncertainty, error_retention, f1_at_95, f1_retention, retention_metrics

ERRORS = [0.2, 1.5, 0.9, 3, 0.1, 1, 2, 0.4, 0.8, 5]
UNCERTAINTIES = [0.1, 0.8, 0.3, 0.6, 0.2, 0.7, 0.9, 0.4, 0.5, 1]


@pytest.mark.parametrize(
    ("uncertainties", "area", "at_95"), [(UNCERTAINTIES, 0.63182045, 0.75), ([0.5] * 10, 0.42526388, 0.75)]
)
def test_golden_numbers(uncertainties, area, at_95):
    curve = f1_retention(ERRORS, uncertainties, 1)
    assert curve.area == pytest.approx(area, abs=1e-8)
    assert f1_at_95(curve) == pytest.approx(at_95, abs=1e-8)


def slow_f1(errors, uncertainties, threshold):
    """By counting, one set of kept answers after another."""
    numbered = sorted(range(len(errors)), key=lambda i: (-uncertainties[i], i))[::-1]
    values = []
    for k in range(len(errors) + 1):
        kept = numbered[:k]
        hits = sum(errors[i] <= threshold for i in kept)
        acceptable = sum(error <= threshold for error in errors)
        precision, recall = hits / max(k, 1), hits / acceptable
        values.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    width = 1 / (len(errors) + 1)
    return values, sum(width * (a + b) / 2 for a, b in pairwise(values))


def test_curves_are_the_slow_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        number = rng.integers(1, 30)
        errors = rng.exponential(size=number)
        errors[0] = 0
        uncertainties = rng.integers(0, 6, number) / 5
        curve = f1_retention(errors, uncertainties, 0.7)
        values, area = slow_f1(errors.tolist(), uncertainties.tolist(), 0.7)
        np.testing.assert_allclose(curve.value, values)
        assert curve.area == pytest.approx(area)


def test_error_retention_is_that_of_shifts():
    # The assertions of weather/assessment.py there.
    assert error_retention([2, 1], [1, 0]).area == pytest.approx(2 / 3)
    assert error_retention(np.arange(5), [0, 0, 2, 1, 1]).area == pytest.approx(0.8)
    errors = np.random.default_rng(0).random(10)
    assert error_retention(errors, np.zeros(10)).area == pytest.approx(errors.mean() / 2)


def test_the_best_order_is_above_and_a_random_one_below():
    rng = np.random.default_rng(1)
    errors = rng.random(200)
    metrics = retention_metrics(errors, errors + 0.5 * rng.random(200), 0.5)
    assert metrics["f1_auc_random"] < metrics["f1_auc"] < metrics["f1_auc_optimal"]
    assert metrics["error_auc_optimal"] < metrics["error_auc"] < metrics["error_auc_random"]


def test_nothing_acceptable_is_not_a_number():
    with pytest.warns(UserWarning, match="no answer has an error of at most 0.5"):
        curve = f1_retention([1, 2], [0, 1], 0.5)
    assert np.isnan(curve.area)
    assert np.isnan(f1_at_95(curve))


@pytest.mark.parametrize(("errors", "uncertainties"), [([1, 2], [1]), ([], []), ([1, np.nan], [1, 2])])
def test_bad_numbers_are_refused(errors, uncertainties):
    with pytest.raises(ValueError, match="must be"):
        f1_retention(errors, uncertainties, 1)


def test_ties_are_reversed():
    assert by_growing_uncertainty(np.array([1, 0, 1, 0])).tolist() == [3, 1, 2, 0]


def test_abstention():
    correct, uncertainties = np.array([1, 1, 0, 1, 0]), np.array([0.1, 0.2, 0.3, 0.3, 0.9])
    coverage, accuracy = coverage_curve(correct, uncertainties)
    assert coverage.tolist() == [0.2, 0.4, 0.6, 0.8, 1]
    assert accuracy[[0, 1, 3, 4]].tolist() == [1, 1, 0.75, 0.6]
    metrics = abstention_metrics(correct, uncertainties <= 0.3)
    assert metrics["accuracy"] == pytest.approx(0.6)
    assert metrics["accuracy_given_attempted"] == pytest.approx(0.75)
    assert metrics["f_score"] == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert abstention_metrics(correct, np.zeros(5))["f_score"] == 0
    assert threshold_for_accuracy(correct, uncertainties, 0.75) == 0.3
    assert threshold_for_accuracy(correct, uncertainties, 0.9) == 0.2
    assert threshold_for_accuracy(1 - correct, uncertainties, 0.9) is None


def test_ranking_and_calibration():
    quality, uncertainties = np.array([1, 0.8, 0.2, 0.1]), np.array([0.1, 0.3, 0.2, 0.9])
    metrics = ranking_metrics(quality, uncertainties)
    assert metrics["auroc_wrong"] == pytest.approx(3 / 4)
    assert metrics["spearman_quality"] == pytest.approx(-0.8)
    assert np.isnan(ranking_metrics(quality, uncertainties, threshold=2)["auroc_wrong"])
    expected = np.repeat([0.1, 0.4, 0.8], 100)
    errors = (np.tile(np.arange(100), 3) < 100 * expected).astype(float)
    assert expected_calibration_error(errors, expected, bins=3) == pytest.approx(0)
    assert expected_calibration_error(errors, expected - 0.1, bins=3) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["f1_retention", "abstention", "calibration"])
def test_metrics_load_from_their_folder(name):
    metric = evaluate.load(str(Path(__file__).parent.parent / "eval_tasks" / "metrics" / name))
    right = [float(error <= 1) for error in ERRORS]
    if name == "f1_retention":
        assert metric.compute(predictions=UNCERTAINTIES, references=ERRORS, threshold=1)["f1_auc"] == pytest.approx(
            0.63182045, abs=1e-8
        )
    elif name == "abstention":
        metrics = metric.compute(predictions=UNCERTAINTIES, references=right, abstain_above=0.5)
        assert metrics["coverage"] == 0.5
        assert metrics["accuracy_given_attempted"] == 1
        assert metrics["auroc_wrong"] == ranking_metrics(right, UNCERTAINTIES)["auroc_wrong"]
    else:
        metrics = metric.compute(predictions=UNCERTAINTIES, references=right, bins=2)
        assert metrics["expected_calibration_error"] == expected_calibration_error(right, UNCERTAINTIES, 2)
