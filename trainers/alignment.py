"""Which of a prompt's tokens an answer repeats in their order, and what each of them accounts for."""

from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache

from transformers import PreTrainedTokenizerBase

from modeling_protogen.proto_predictor import MAX_DURATION

Joins = Callable[[int, int], bool]


def joins_of(tokenizer: PreTrainedTokenizerBase) -> Joins:
    """Whether two tokens, one after the other, have letters or digits of one word at their joint."""

    @cache
    def joins(before: int, after: int) -> bool:
        left, both = tokenizer.decode([before]), tokenizer.decode([before, after])
        return left[-1:].isalnum() and both[len(left) :][:1].isalnum()

    return joins


def durations(prompt: list[int], answer: list[int], joins: Joins = lambda before, after: False) -> list[int] | None:
    """
    How many of the answer's tokens each of the prompt's accounts for: a repeated token for itself and for those before
    it that are not repeated, the prompt's last one for what is left at the end. They add up to the answer's length.
    None where one would be longer than `MAX_DURATION`.

    Repeated tokens are found as the longest run of equal ones first, then those to its left and right (Ratcliff and
    Metzener's gestalt pattern matching, `difflib`). Of a run only whole words count, in both texts: the `Add` of a
    command is no part of `AddToPlaylist`.

    Args:
        joins (`Callable`): whether two tokens belong to one word; each is a word of its own by default.
    """
    found, done = [0] * len(prompt), 0
    for block in SequenceMatcher(None, prompt, answer, autojunk=False).get_matching_blocks():

        def is_cut(step, block=block):
            """Whether a word goes on across the place before the block's token `step`, in either text."""
            places = (prompt, block.a + step), (answer, block.b + step)
            return any(0 < at < len(tokens) and joins(tokens[at - 1], tokens[at]) for tokens, at in places)

        start, end = 0, block.size
        while start < end and is_cut(start):
            start += 1
        while start < end and is_cut(end):
            end -= 1
        for step in range(start, end):
            reached = block.b + step + 1
            found[block.a + step], done = reached - done, reached
    found[-1] += len(answer) - done
    return found if max(found) <= MAX_DURATION else None
