"""Answers that are flat JSON objects of strings, such as `{"artist": "Kent James"}`."""

import json


def parse(answer: str) -> dict[str, str] | None:
    """An answer's fields; None where it is not one flat JSON object of strings, or has a key twice."""
    try:
        # Objects become tuples of pairs, which tells them from arrays and keeps keys that come twice.
        pairs = json.loads(answer, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if not isinstance(pairs, tuple) or not all(isinstance(value, str) for _, value in pairs):
        return None
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else None
