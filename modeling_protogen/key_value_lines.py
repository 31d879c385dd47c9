"""
Structured answers as short texts: a flat JSON object of strings is written as `key: value` lines, in which a value's
words are the very tokens that they are in a question, where JSON's quotes would cut them otherwise:

    {"intent": "PlayMusic", "artist": "Kent James"}        intent: PlayMusic
                                                           artist: Kent James
"""

import json

SEPARATOR = ": "


def to_lines(answer: str) -> str:
    """
    JSON as lines.

    Raises:
        ValueError: if the answer is not a flat JSON object of strings, or a key or value would not be read back.
    """
    try:
        fields = json.loads(answer)
    except json.JSONDecodeError as error:
        raise ValueError(f"an answer is not JSON ({error}): {answer[:60]!r}") from error
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"an answer must be one JSON object whose values are strings: {answer[:60]!r}")
    if not fields:
        raise ValueError("an answer must not be an empty JSON object.")
    lines = "\n".join(f"{key}{SEPARATOR}{value}" for key, value in fields.items())
    if from_lines(lines) != json.dumps(fields, ensure_ascii=False):
        raise ValueError(f"a key with {SEPARATOR!r}, or a line break, cannot be written as lines: {answer[:60]!r}")
    return lines


def from_lines(text: str) -> str:
    """Lines as JSON; a text that has other lines, or a key twice, stays as it is."""
    pairs = [line.partition(SEPARATOR) for line in text.split("\n")]
    fields = {key: value for key, _, value in pairs}
    if not all(separator for _, separator, _ in pairs) or len(fields) < len(pairs):
        return text
    return json.dumps(fields, ensure_ascii=False)
