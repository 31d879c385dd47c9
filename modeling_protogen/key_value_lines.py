"""
Structured answers as short texts: a flat JSON object of strings is written as `key: value` lines, in which a value's
words are the very tokens that they are in a question, where JSON's quotes would cut them otherwise:

    {"intent": "PlayMusic", "artist": "Kent James"}        intent: PlayMusic
                                                           artist: Kent James

A key that comes again is numbered in JSON, whose keys are unique, and not in the lines:

    {"city": "Rome", "city_2": "Oslo"}                     city: Rome
                                                           city: Oslo

A value neither begins nor ends with spaces: a question's two spaces may be one token, which a value would take.
"""

import json
import re
from collections import Counter

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
    lines, seen = [], Counter()
    for key, value in fields.items():
        numbered = re.fullmatch(r"(.+)_(\d+)", key, re.DOTALL)
        if numbered and seen[numbered[1]] == int(numbered[2]) - 1 > 0:
            key = numbered[1]
        seen[key] += 1
        lines.append(f"{key}{SEPARATOR}{value}")
    lines = "\n".join(lines)
    if from_lines(lines) != json.dumps(fields, ensure_ascii=False):
        raise ValueError(
            f"a key with {SEPARATOR!r}, a line break, or spaces around a value cannot be written as lines: "
            f"{answer[:60]!r}"
        )
    return lines


def from_lines(text: str) -> str:
    """Lines as JSON; a text that has other lines, or keys that numbering makes equal, stays as it is."""
    fields, seen = {}, Counter()
    for line in text.split("\n"):
        key, separator, value = line.partition(SEPARATOR)
        seen[key] += 1
        key = key if seen[key] == 1 else f"{key}_{seen[key]}"
        if not separator or key in fields:
            return text
        fields[key] = value.strip(" ")
    return json.dumps(fields, ensure_ascii=False)
