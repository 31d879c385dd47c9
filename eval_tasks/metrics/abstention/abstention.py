"""Answering only when sure as an `evaluate` metric."""

import evaluate
import numpy as np

from eval_tasks.abstention import abstention_metrics, ranking_metrics
from eval_tasks.metric_info import metric_info

DESCRIPTION = """Coverage, accuracy over all questions and over those attempted, their harmonic mean (the F score of
SimpleQA), and how well uncertainty tells right from wrong: AUROC and rank correlation."""
CITATION = "Wei et al., 2024, Measuring short-form factuality in large language models"
INPUTS = """
Args:
    predictions (list of float): uncertainty of each answer.
    references (list of float): 1 where the answer is right, else 0.
    abstain_above (float): answers that are more uncertain are not given; all are by default.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class Abstention(evaluate.Metric):
    def _info(self):
        return metric_info(DESCRIPTION, CITATION, INPUTS)

    def _compute(self, predictions, references, abstain_above=float("inf")):
        is_given = np.asarray(predictions) <= abstain_above
        return abstention_metrics(references, is_given) | ranking_metrics(references, predictions)
