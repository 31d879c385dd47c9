"""More training examples of extraction: the words of a question that its answer repeats, exchanged for others."""

import json
import random
import re
from collections import defaultdict
from dataclasses import replace

from .data import Example, stable_hash
from .flat_json import parse


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
    fields = {example.id: parse(example.answer) or {} for example in examples}
    # The key of each value that can be exchanged.
    keys = {
        example.id: {
            value: _kind(key)
            for key, value in fields[example.id].items()
            if len(re.findall(_whole_words(value), example.instruction)) == 1
        }
        for example in examples
    }
    values = defaultdict(list)
    for example in examples:
        for value, kind in keys[example.id].items():
            values[kind].append(value)
    rng = random.Random(seed)
    more = []
    for copy in range(copies):
        for example in examples:
            if not keys[example.id]:
                continue
            new = {value: rng.choice(values[kind]) for value, kind in keys[example.id].items()}
            longest_first = sorted(new, key=len, reverse=True)
            pattern = re.compile("|".join(map(_whole_words, longest_first)))
            instruction = pattern.sub(lambda match, new=new: new[match[0]], example.instruction)
            answer = {key: new.get(value, value) for key, value in fields[example.id].items()}
            id = stable_hash(f"{example.id} {copy} {seed}")[:16]
            text = json.dumps(answer, ensure_ascii=False)
            more.append(replace(example, id=id, instruction=instruction, answer=text))
    return examples + more


def _kind(key: str) -> str:
    return re.sub(r"_\d+$", "", key)


def _whole_words(value: str) -> str:
    """A pattern for the value where no word goes on at its ends."""
    return rf"(?<!\w){re.escape(value)}(?!\w)"
