"""
Quality of structured answers: flat JSON objects of strings, an intent and its slots, such as
`{"intent": "PlayMusic", "artist": "Kent James"}`.
"""

import numpy as np

from trainers.flat_json import parse

INTENT = "intent"


def parse_reference(reference: str) -> dict[str, str]:
    """
    A reference's fields.

    Raises:
        ValueError: if it is not one flat JSON object of strings, or has a key twice.
    """
    fields = parse(reference)
    if fields is None:
        raise ValueError(f"a reference must be one flat JSON object of strings, each key once: {reference[:60]!r}")
    return fields


def parse_pairs(answers: list[str], references: list[str]) -> list[tuple[dict[str, str] | None, dict[str, str]]]:
    """The fields of each answer and of its reference."""
    return [(parse(a), parse_reference(r)) for a, r in zip(answers, references, strict=True)]


def valid_json(answers: list[str]) -> np.ndarray:
    """Whether `parse` can read an answer, 0 or 1, `(texts,)`."""
    return np.array([float(parse(answer) is not None) for answer in answers])


def exact_match(answers: list[str], references: list[str]) -> np.ndarray:
    """Whether an answer has exactly its reference's fields, in any order, 0 or 1, `(texts,)`."""
    return np.array([float(answer == reference) for answer, reference in parse_pairs(answers, references)])


def intent_accuracy(answers: list[str], references: list[str]) -> np.ndarray:
    """Whether an answer can be read and has its reference's intent, 0 or 1, `(texts,)`."""
    return np.array(
        [
            float(answer is not None and answer.get(INTENT) == reference.get(INTENT))
            for answer, reference in parse_pairs(answers, references)
        ]
    )


def slot_counts(answers: list[str], references: list[str]) -> np.ndarray:
    """
    How many slots with their values are right, how many the answer has, and how many its reference, `(texts, 3)`; the
    intent is not a slot. An answer that cannot be read has none.
    """

    def slots(fields):
        return {pair for pair in (fields or {}).items() if pair[0] != INTENT}

    said_and_wanted = [(slots(answer), slots(reference)) for answer, reference in parse_pairs(answers, references)]
    counts = [(len(said & wanted), len(said), len(wanted)) for said, wanted in said_and_wanted]
    return np.array(counts, dtype=int).reshape(-1, 3)


def micro_f1(counts: np.ndarray | list[tuple[int, int, int]]) -> float:
    """F1 of the sums of `slot_counts`, `(texts, 3)`; not a number where no text has a slot."""
    right, said, wanted = np.asarray(counts, dtype=int).reshape(-1, 3).sum(0).tolist()
    return 2 * right / (said + wanted) if said + wanted else float("nan")


def slot_f1(answers: list[str], references: list[str]) -> float:
    """F1 of slots with their values over all answers together, as slot taggers report it (CoNLL-2000's evaluation)."""
    return micro_f1(slot_counts(answers, references))


def slot_filling_metrics(answers: list[str], references: list[str]) -> dict[str, float]:
    """
    Args:
        answers (`list[str]`): JSON, as it was written.
        references (`list[str]`): flat JSON objects of strings.

    Returns:
        `exact_match`, `intent_accuracy` and `valid_json`, shares of answers, and `slot_f1`; all in 0..1.

    Raises:
        ValueError: if there are no answers, another number of references, or one that cannot be read.
    """
    if not answers:
        raise ValueError("there are no answers to measure.")
    return {
        "exact_match": float(exact_match(answers, references).mean()),
        "intent_accuracy": float(intent_accuracy(answers, references).mean()),
        "slot_f1": slot_f1(answers, references),
        "valid_json": float(valid_json(answers).mean()),
    }
