"""Quality of structured answers as an `evaluate` metric."""

import evaluate

from eval_tasks.metric_info import metric_info
from eval_tasks.slot_filling import slot_filling_metrics

DESCRIPTION = """Quality of answers that are flat JSON objects of strings, an intent and its slots: the share that has
exactly the reference's fields in any order, the share with its intent, micro F1 of slots with their values, and the
share that is such an object at all. An answer that is not counts as wrong."""
CITATION = """Coucke et al., 2018, Snips Voice Platform: an embedded Spoken Language Understanding system for
private-by-design voice interfaces"""
INPUTS = """
Args:
    predictions (list of str): the answers, JSON as it was written.
    references (list of str): flat JSON objects of strings.
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class SlotFilling(evaluate.Metric):
    def _info(self):
        return metric_info(DESCRIPTION, CITATION, INPUTS, dtype="string")

    def _compute(self, predictions, references):
        return slot_filling_metrics(predictions, references)
