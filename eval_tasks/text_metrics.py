"""Quality of answers: pure functions on token ids and texts."""

from collections.abc import Callable

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from transformers import EvalPrediction

from modeling_protogen.modeling_protogen import IGNORE_INDEX
from modeling_protogen.processing_protogen import ProtoGenProcessor


def token_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal tokens where `labels` is not -100; both `(examples, length)`."""
    is_token = labels != IGNORE_INDEX
    return float((predictions == labels)[is_token].mean())


def exact_match(answers: list[str], references: list[str]) -> float:
    """Share of answers equal to their reference, outer white space aside."""
    return float(np.mean([a.strip() == r.strip() for a, r in zip(answers, references, strict=True)]))


def rouge_l(answers: list[str], references: list[str]) -> float:
    """Mean ROUGE-L F-measure in 0..1 (Lin, 2004), by the `rouge-score` package, without stemming."""
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    return float(np.mean(scores))


def one_step_metrics(processor: ProtoGenProcessor) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    `compute_metrics` for `ProtoGenTrainer`: `token_accuracy` at the label's length, and `exact_match`, `rouge_l` and
    `length_tokens` (mean length in tokens) of the one-step answers at their predicted length.
    """

    def texts(ids: np.ndarray) -> list[str]:
        return processor.batch_decode([row[row != IGNORE_INDEX] for row in ids])

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        tokens, answers = prediction.predictions
        labels = prediction.label_ids
        references = texts(labels)
        return {
            "token_accuracy": token_accuracy(tokens, labels),
            "exact_match": exact_match(texts(answers), references),
            "rouge_l": rouge_l(texts(answers), references),
            "length_tokens": float((answers != IGNORE_INDEX).sum(-1).mean()),
        }

    return compute
