"""Calibration of expected errors as an `evaluate` metric."""

import evaluate

from eval_tasks.abstention import expected_calibration_error
from eval_tasks.metric_info import metric_info

DESCRIPTION = """Mean distance between the error that was expected and the one there was, over bins of equal numbers of
answers."""
CITATION = (
    "Nguyen and O'Connor, 2015, Posterior calibration and exploratory analysis for natural language processing models"
)
INPUTS = """
Args:
    predictions (list of float): error that was expected of each answer.
    references (list of float): error of each answer.
    bins (int): bins.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Calibration(evaluate.Metric):
    def _info(self):
        return metric_info(DESCRIPTION, CITATION, INPUTS)

    def _compute(self, predictions, references, bins=10):
        return {"expected_calibration_error": expected_calibration_error(references, predictions, bins)}
