"""More training examples of extraction: the words of a question that its answer repeats, exchanged for others."""

import json
import random
import re
from collections import defaultdict
from dataclasses import replace

from .data import Example, stable_hash


def with_exchanged_values(examples: list[Example], copies: int, seed: int = 0) -> list[Example]:
    """
    Adds copies of the examples, in which every value of the answer that occurs once in the instruction, as whole words,
    is replaced in both by a value that some example has under the same key. Frequent values are drawn as often as they
    occur. Numbered keys, such as `city_2`, share their values. An answer that is no flat JSON object of strings, or has
    none of its values in the instruction, is not copied.

    Args:
        copies (`int`): of each example.
        seed (`int`, defaults to 0): of the draws.
    """
    if not copies:
        return examples
    fields = {example.id: _fields(example.answer) for example in examples}
    values = defaultdict(list)
    for example in examples:
        for key, value in fields[example.id].items():
            if _occurs_once(value, example.instruction):
                values[_kind(key)].append(value)
    rng = random.Random(seed)
    more = []
    for copy in range(copies):
        for example in examples:
            answer = fields[example.id]
            found = {value: key for key, value in answer.items() if _occurs_once(value, example.instruction)}
            if not found:
                continue
            new = {value: rng.choice(values[_kind(key)]) for value, key in found.items()}
            longest_first = sorted(new, key=len, reverse=True)
            pattern = re.compile("|".join(rf"(?<!\w){re.escape(value)}(?!\w)" for value in longest_first))
            instruction = pattern.sub(lambda match, new=new: new[match[0]], example.instruction)
            answer = json.dumps({key: new.get(value, value) for key, value in answer.items()}, ensure_ascii=False)
            id = stable_hash(f"{example.id} {copy} {seed}")[:16]
            more.append(replace(example, id=id, instruction=instruction, answer=answer))
    return examples + more


def _fields(answer: str) -> dict[str, str]:
    try:
        fields = json.loads(answer)
    except ValueError:
        return {}
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        return {}
    return fields


def _kind(key: str) -> str:
    return re.sub(r"_\d+$", "", key)


def _occurs_once(value: str, instruction: str) -> bool:
    return len(re.findall(rf"(?<!\w){re.escape(value)}(?!\w)", instruction)) == 1
