"""Durations by hand, and what must hold of any."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_protogen.proto_predictor import MAX_DURATION
from trainers.alignment import durations, joins_of


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        # Each repeated token accounts for itself.
        ([1, 2, 3], [1, 2, 3], [1, 1, 1]),
        # And for those before it that are not repeated.
        ([1, 2, 3], [8, 9, 2], [0, 3, 0]),
        ([1, 2, 3, 4], [8, 1, 9, 9, 3, 4], [2, 0, 3, 1]),
        # The last one, repeated or not, for what is left at the end.
        ([1, 2, 3], [1, 8, 9], [1, 0, 2]),
        ([1, 2, 3], [1, 2, 3, 8, 9], [1, 1, 3]),
        # Without a repeated token the last one accounts for all.
        ([1, 2, 3], [7, 8, 9, 7], [0, 0, 4]),
        ([5], [7], [1]),
        # In their order only: of two that change places the longer run stays.
        ([1, 2, 3, 4, 5], [4, 5, 1, 2, 3], [3, 1, 1, 0, 0]),
        # The longest run first: of a token that comes twice, the one that stands beside the same others.
        ([1, 9, 1, 2, 3], [1, 2, 3], [0, 0, 1, 1, 1]),
    ],
)
def test_by_hand(prompt, answer, expected):
    assert durations(prompt, answer) == expected


def test_whole_words_only():
    """Tokens of one ten are one word: 11 12 13 is one, 11 21 are two."""

    def joins(before, after):
        return before // 10 == after // 10

    # The answer's word goes on after the run, and before it.
    assert durations([11, 21], [11, 12, 21], joins) == [0, 3]
    assert durations([12, 21], [11, 12, 21], joins) == [0, 3]
    # As does the prompt's.
    assert durations([11, 12, 21], [11, 21], joins) == [0, 0, 2]
    # Of a longer run the whole words stay.
    assert durations([31, 11, 21, 22], [31, 11, 21], joins) == [1, 1, 0, 1]
    assert durations([11, 12, 21], [31, 11, 12, 21], joins) == [2, 1, 1]


def test_words_are_what_a_tokenizer_writes_together(decoder_dir):
    by_word = AutoTokenizer.from_pretrained(decoder_dir)
    joins = joins_of(by_word)
    cat, sat = by_word("cat sat")["input_ids"]
    assert not joins(cat, sat)
    by_letter = Tokenizer(models.BPE({letter: n for n, letter in enumerate("adt: o")}, []))
    by_letter.decoder = decoders.Fuse()
    joins = joins_of(PreTrainedTokenizerFast(tokenizer_object=by_letter))
    places = {letter: by_letter.token_to_id(letter) for letter in "adt: o"}
    for before, after, expected in (("a", "d", True), ("a", ":", False), (":", "a", False), (" ", "a", False)):
        assert joins(places[before], places[after]) == expected


def test_they_add_up_to_the_answer_and_repeat_it_in_order():
    rng = random.Random(0)
    repeats = 0
    for _ in range(500):
        prompt = [rng.randrange(12) for _ in range(rng.randint(1, 15))]
        answer = [rng.randrange(14) for _ in range(rng.randint(1, MAX_DURATION))]
        found = durations(prompt, answer)
        assert len(found) == len(prompt)
        assert min(found) >= 0
        assert sum(found) == len(answer)
        # All but the last one account for a stretch that ends with themselves.
        end = 0
        for token, duration in zip(prompt[:-1], found[:-1], strict=True):
            end += duration
            if duration:
                assert answer[end - 1] == token
                repeats += 1
    assert repeats > 500


def test_a_stretch_that_is_too_long_is_none():
    assert durations([1, 2], [9] * (MAX_DURATION - 1) + [1]) == [MAX_DURATION, 0]
    assert durations([1, 2], [9] * MAX_DURATION + [1]) is None
    assert durations([1, 2], [1] + [9] * MAX_DURATION) == [1, MAX_DURATION]
    assert durations([1, 2], [1] + [9] * (MAX_DURATION + 1)) is None


def test_frequent_tokens_count_as_any():
    """`difflib` passes over what is frequent in a long text, where it is not told otherwise."""
    answer = [1, 2] * 110
    assert durations([0, *answer], answer) == [0] + [1] * 220
