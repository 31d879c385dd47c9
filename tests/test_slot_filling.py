"""Structured answers: what counts as one, and micro F1 against a slow definition."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest

from eval_tasks.slot_filling import (
    exact_match,
    intent_accuracy,
    micro_f1,
    parse,
    slot_counts,
    slot_f1,
    slot_filling_metrics,
    valid_json,
)

REFERENCE = '{"intent": "PlayMusic", "artist": "Kent James", "year": "1990"}'
ANSWERS = {
    "equal": REFERENCE,
    "other order": '\n{"year": "1990", "artist": "Kent James", "intent": "PlayMusic"} ',
    "other intent": '{"intent": "RateBook", "artist": "Kent James", "year": "1990"}',
    "other value": '{"intent": "PlayMusic", "artist": "kent james", "year": "1990"}',
    "slot missing": '{"intent": "PlayMusic", "artist": "Kent James"}',
    "slot too many": '{"intent": "PlayMusic", "artist": "Kent James", "year": "1990", "album": "x"}',
    "cut": '{"intent": "PlayMusic", "artist": "Kent James"',
    "no intent": "{}",
}


def of_each(metric) -> dict[str, float]:
    values = metric(list(ANSWERS.values()), [REFERENCE] * len(ANSWERS))
    return dict(zip(ANSWERS, values.tolist(), strict=True))


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "intent: PlayMusic",
        '"PlayMusic"',
        "null",
        '[["intent", "PlayMusic"]]',
        '{"year": 1990}',
        '{"year": null}',
        '{"artist": ["Kent James"]}',
        '{"artist": {"name": "Kent James"}}',
        '{"artist": {}}',
        '{"artist": "Kent", "artist": "James"}',
        '{"artist": "Kent", "artist": "Kent"}',
        '{"artist": "Kent"} {"year": "1990"}',
        '{"artist": "Kent"}.',
        "9" * 5000,
        "[" * 200_000,
    ],
)
def test_what_is_no_flat_object_of_strings_is_not_read(answer):
    assert parse(answer) is None


def test_what_is_one_is_read():
    assert parse(' {"intent": "x", "título": "\\u00e9 \\"b\\""}\n') == {"intent": "x", "título": 'é "b"'}
    assert parse("{}") == {}


def test_each_answer_is_right_or_wrong():
    right = {name for name, value in of_each(exact_match).items() if value == 1}
    assert right == {"equal", "other order"}
    assert set(of_each(exact_match).values()) == {0, 1}
    wrong_intent = {name for name, value in of_each(intent_accuracy).items() if value == 0}
    assert wrong_intent == {"other intent", "cut", "no intent"}
    # Where the reference has no intent, right is to have none either, in what can be read.
    assert intent_accuracy(["{", "{}", REFERENCE], ["{}"] * 3).tolist() == [0, 1, 0]
    unread = {name for name, value in of_each(lambda answers, _: valid_json(answers)).items() if value == 0}
    assert unread == {"cut"}


def test_slots_are_counted_without_the_intent():
    counts = slot_counts(list(ANSWERS.values()), [REFERENCE] * len(ANSWERS)).tolist()
    assert dict(zip(ANSWERS, counts, strict=True)) == {
        "equal": [2, 2, 2],
        "other order": [2, 2, 2],
        "other intent": [2, 2, 2],
        "other value": [1, 2, 2],
        "slot missing": [1, 1, 2],
        "slot too many": [2, 3, 2],
        "cut": [0, 0, 2],
        "no intent": [0, 0, 2],
    }


def test_f1_is_of_all_answers_together():
    # One long answer that is right weighs more than one short answer that is wrong: a mean would be 0.5.
    answers = ['{"a": "1", "b": "2", "c": "3"}', '{"a": "9"}']
    references = ['{"a": "1", "b": "2", "c": "3"}', '{"a": "1"}']
    assert slot_f1(answers, references) == 0.75
    assert micro_f1([(3, 3, 3), (0, 1, 1)]) == 0.75
    assert micro_f1([(0, 0, 2)]) == 0
    assert np.isnan(micro_f1([(0, 0, 0)]))
    assert np.isnan(slot_f1(["{}"], ['{"intent": "x"}']))


def slow_f1(answers, references):
    """From precision and recall, one slot after another."""
    hits = misses = false_alarms = 0
    for answer, reference in zip(map(json.loads, answers), map(json.loads, references), strict=True):
        for slot in {*answer, *reference} - {"intent"}:
            hits += slot in answer and answer[slot] == reference.get(slot)
            misses += slot in reference and answer.get(slot) != reference[slot]
            false_alarms += slot in answer and answer[slot] != reference.get(slot)
    precision, recall = hits / (hits + false_alarms), hits / (hits + misses)
    return 2 * precision * recall / (precision + recall)


def test_f1_is_the_slow_definition():
    rng = np.random.default_rng(0)

    def texts():
        slots = ["intent", "a", "b", "c", "d"]
        return [json.dumps({slot: str(rng.integers(2)) for slot in slots if rng.random() < 0.7}) for _ in range(20)]

    for _ in range(20):
        answers, references = texts(), texts()
        assert slot_f1(answers, references) == pytest.approx(slow_f1(answers, references))


def test_bad_references_are_named():
    for metric in (exact_match, intent_accuracy, slot_f1, slot_filling_metrics):
        with pytest.raises(ValueError, match='a reference must be one flat JSON object of strings.*"year": 1990'):
            metric(["{}"], ['{"year": 1990}'])
        with pytest.raises(ValueError, match="shorter"):
            metric(["{}", "{}"], ["{}"])
    with pytest.raises(ValueError, match="no answers"):
        slot_filling_metrics([], [])


def test_the_metric_loads_from_its_folder():
    metric = evaluate.load(str(Path(__file__).parent.parent / "eval_tasks" / "metrics" / "slot_filling"))
    metrics = metric.compute(predictions=list(ANSWERS.values()), references=[REFERENCE] * len(ANSWERS))
    assert metrics == {
        "exact_match": 2 / 8,
        "intent_accuracy": 5 / 8,
        "slot_f1": 2 * 10 / (12 + 16),
        "valid_json": 7 / 8,
    }
