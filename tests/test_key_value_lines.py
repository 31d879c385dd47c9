"""Flat JSON objects as lines, and back."""

import json

import pytest

from modeling_protogen.key_value_lines import from_lines, to_lines

PAIRS = [
    ('{"intent": "PlayMusic", "artist": "Kent James"}', "intent: PlayMusic\nartist: Kent James"),
    ('{"a": "b"}', "a: b"),
    # A value may hold what stands between it and its key, quotes, and nothing at all.
    ('{"time": "at: 10: 30"}', "time: at: 10: 30"),
    ('{"quote": "\\"so\\" it \\\\ is"}', 'quote: "so" it \\ is'),
    ('{"a": "", "b": "c"}', "a: \nb: c"),
    ('{"stadt": "Zürich ☃"}', "stadt: Zürich ☃"),
    ('{"a b": "c  d"}', "a b: c  d"),
    ('{"a": "1", "b": "2", "a_2": "3", "a_3": "4"}', "a: 1\nb: 2\na: 3\na: 4"),
    # Numbers that say something else are a key's own.
    ('{"a_2": "1", "a": "2", "a_4": "3", "b_1": "4"}', "a_2: 1\na: 2\na_4: 3\nb_1: 4"),
]


@pytest.mark.parametrize(("answer", "lines"), PAIRS)
def test_there_and_back(answer, lines):
    assert to_lines(answer) == lines
    assert from_lines(lines) == answer
    # How the JSON is set makes no difference.
    fields = json.loads(answer)
    assert to_lines(json.dumps(fields, indent=4, ensure_ascii=True)) == lines


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("PlayMusic", r"an answer is not JSON \(.*\): 'PlayMusic'"),
        ('{"a": "b"', "an answer is not JSON"),
        ('["a", "b"]', "one JSON object whose values are strings"),
        ('{"a": 1}', "one JSON object whose values are strings"),
        ('{"a": {"b": "c"}}', "one JSON object whose values are strings"),
        ('{"a": null}', "one JSON object whose values are strings"),
        ('"a"', "one JSON object whose values are strings"),
        ('{"a: b": "c"}', "cannot be written as lines"),
        ('{"a": "b\\nc: d"}', "cannot be written as lines"),
        ('{"a": "b\\nc"}', "cannot be written as lines"),
        ('{"a\\nb": "c"}', "cannot be written as lines"),
        ('{"a": "b "}', "cannot be written as lines"),
        ("{}", "must not be an empty JSON object"),
    ],
)
def test_what_would_not_come_back_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        to_lines(answer)


@pytest.mark.parametrize("text", ["", "no pair", "a: b\nno pair", "a: b\n", "\na: b", "a_2: b\na: c\na: d", "a:b"])
def test_other_texts_stay_as_they_are(text):
    assert from_lines(text) == text


def test_values_lose_the_spaces_around_them():
    """As tokens of two spaces bring them along."""
    assert from_lines("a:  b\nc: d e  ") == '{"a": "b", "c": "d e"}'


def test_long_answers_are_quoted_by_their_beginning():
    with pytest.raises(ValueError, match="'x{60}'$"):
        to_lines("x" * 200)
