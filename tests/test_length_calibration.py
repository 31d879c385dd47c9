"""Length predictions on lengths whose distribution is known."""

import numpy as np
import pytest

from eval_tasks.length_calibration import (
    constant_baseline,
    is_covered,
    length_metrics,
    linear_baseline,
    negative_log_likelihood,
)


@pytest.fixture
def texts():
    """Instructions and answers whose log length is 1 + 0.8 log(instruction) with a standard deviation of 0.4."""
    rng = np.random.default_rng(0)
    instructions = rng.integers(20, 400, size=6000).astype(float)
    mean = 1 + 0.8 * np.log(instructions)
    return instructions, mean, np.round(np.exp(rng.normal(mean, 0.4)))


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_the_right_distribution_is_covered_as_often_as_it_says(texts, level):
    _, mean, lengths = texts
    assert is_covered(mean, np.full(6000, 0.16), lengths, level).mean() == pytest.approx(level, abs=0.02)
    assert is_covered(mean, np.full(6000, 0.04), lengths, level).mean() < level - 0.1


def test_intervals_end_at_whole_tokens():
    covered = is_covered(np.log([4.4, 4.4]), np.full(2, 1e-12), np.array([4, 6]), 0.8)
    assert covered.tolist() == [True, False]


def test_the_likelihood_is_that_of_the_log_length():
    value = negative_log_likelihood(np.array([1.0]), np.array([4.0]), np.array([np.e**3]))
    assert value == pytest.approx(0.5 * np.log(2 * np.pi * 4) + 0.5)


def test_baselines(texts):
    instructions, mean, lengths = texts
    train, test = slice(0, 5000), slice(5000, None)
    constant = constant_baseline(lengths[train], 1000)
    assert constant[0][0] == pytest.approx(np.log(lengths[train]).mean())
    linear = linear_baseline(instructions[train], lengths[train], instructions[test])
    np.testing.assert_allclose(linear[0], mean[test], atol=0.05)
    assert linear[1][0] == pytest.approx(0.16, rel=0.1)
    predictions = {"": (mean[test], np.full(1000, 0.16)), "constant": constant, "linear": linear}
    metrics = length_metrics(predictions, lengths[test])
    assert metrics["mae_tokens"][0] == pytest.approx(np.abs(np.exp(mean[test]) - lengths[test]).mean())
    assert metrics["mae_tokens_linear"][0] < metrics["mae_tokens_constant"][0]
    assert metrics["nll"][0] < metrics["nll_constant"][0]
    assert (
        metrics["coverage_80_constant"][1] <= metrics["coverage_80_constant"][0] <= metrics["coverage_80_constant"][2]
    )
