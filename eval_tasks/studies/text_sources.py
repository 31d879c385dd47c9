"""Where the texts of a study come from: the data's own, or texts that lack their meaning or their syntax."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modeling_protogen.processing_protogen import text_ids
from trainers.data import DataArguments, Example, load_examples, stable_hash
from trainers.fitting import Text

from . import pseudo_language

# natural: the data's answers; shuffled_words: each with its words in another order; random_words: drawn from the
# distinct words of all; the others are levels of the pseudo-language. Any other source is FILE#FIELD.
SOURCES = ("natural", "shuffled_words", "random_words", *(f"pseudo_{level}" for level in pseudo_language.LEVELS))


def load_sources(sources: list[str], data_args: DataArguments) -> dict[str, list[Example]]:
    """
    The examples that each source makes its texts of: those of the data, or for `FILE#FIELD` that file's.

    Raises:
        ValueError: if a source is unknown.
    """
    own = load_examples(data_args) if set(sources) & set(SOURCES) else []
    loaded = {}
    for source in sources:
        if source in SOURCES:
            loaded[source] = own
        elif "#" in source:
            path, field = source.split("#")
            columns = {"instruction_field": field, "context_field": None, "answer_field": field}
            loaded[Path(path).stem] = load_examples(replace(data_args, data=path, **columns))
        else:
            raise ValueError(f"unknown source of texts {source!r}; there are {', '.join(SOURCES)}, or FILE#FIELD.")
    return loaded


def source_texts(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    examples: list[Example],
    num_texts: int,
    length: int,
    seed: int,
    min_length: int | None = None,
) -> list[Text]:
    """
    The first `num_texts` texts of a source that have `min_length` tokens (`length` by default), cut at `length`. Their
    group is their category, where they have one.

    Args:
        source (`str`): a key of what `load_sources` returns, and `examples` (`list[Example]`) its value.

    Raises:
        ValueError: if too few texts are long enough.
    """
    texts, shortest = [], min_length or length
    for id, words, group in _candidates(source, examples, length, random.Random(f"{source} {seed}"), seed):
        ids = text_ids(tokenizer, words)[:length]
        if len(ids) >= shortest:
            texts.append(Text(id, ids, group))
        if len(texts) == num_texts:
            return texts
    raise ValueError(
        f"only {len(texts)} of the texts have {shortest} tokens, {num_texts} are needed: give longer ones (--data), or "
        "ask for shorter or fewer ones."
    )


def _candidates(
    source: str, examples: list[Example], length: int, rng: random.Random, seed: int
) -> Iterator[tuple[str, str, str]]:
    """Id, words and group of texts; the made ones have no end, and a word has at least one token."""
    if source not in SOURCES or source == "natural":
        yield from ((example.id, example.answer, example.category or "") for example in examples)
        return
    if source == "shuffled_words":
        made = ((_shuffled(example.answer.split(), rng), example.category or "") for example in examples)
    elif source == "random_words":
        words = sorted({word for example in examples for word in example.answer.split()})
        made = ((" ".join(rng.choices(words, k=length)), "") for _ in count())
    else:
        made = ((text, "") for text in pseudo_language.texts(source.removeprefix("pseudo_"), length, seed))
    for text, group in made:
        # As of any example: the same text has the same id, another one has another.
        yield stable_hash(text)[:16], text, group


def _shuffled(words: list[str], rng: random.Random) -> str:
    return " ".join(rng.sample(words, len(words)))
