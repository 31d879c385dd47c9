"""F1- and error-retention as an `evaluate` metric."""

import evaluate

from eval_tasks.metric_info import metric_info
from eval_tasks.retention import retention_metrics

DESCRIPTION = """Quality of what is kept while the most uncertain answers are dropped, as the Shifts benchmark defines
it: areas under the F1-retention and error-retention curves, and F1 with 95 % of the answers kept, beside those of a
random and of the best order."""
CITATION = "Malinin et al., 2021, Shifts: A Dataset of Real Distributional Shift Across Multiple Large-Scale Tasks"
INPUTS = """
Args:
    predictions (list of float): uncertainty of each answer.
    references (list of float): error of each answer.
    threshold (float): an answer is acceptable where its error is at most this.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class F1Retention(evaluate.Metric):
    def _info(self):
        return metric_info(DESCRIPTION, CITATION, INPUTS)

    def _compute(self, predictions, references, threshold=0.5):
        return retention_metrics(references, predictions, threshold)
