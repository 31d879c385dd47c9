"""Which of a prompt's tokens an answer repeats in their order, and what each of them accounts for."""

from difflib import SequenceMatcher

from modeling_protogen.proto_predictor import MAX_DURATION


def durations(prompt: list[int], answer: list[int]) -> list[int] | None:
    """
    How many of the answer's tokens each of the prompt's accounts for: a repeated token for itself and for those before
    it that are not repeated, the prompt's last one for what is left at the end. They add up to the answer's length.
    None where one would be longer than `MAX_DURATION`.

    Repeated tokens are found as the longest run of equal ones first, then those to its left and right (Ratcliff and
    Metzener's gestalt pattern matching, `difflib`).
    """
    found, done = [0] * len(prompt), 0
    for block in SequenceMatcher(None, prompt, answer, autojunk=False).get_matching_blocks():
        for step in range(block.size):
            end = block.b + step + 1
            found[block.a + step], done = end - done, end
    found[-1] += len(answer) - done
    return found if max(found) <= MAX_DURATION else None
