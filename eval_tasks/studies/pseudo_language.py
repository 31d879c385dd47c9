"""
A pseudo-language: a fixed grammar over invented words, all syntax and no meaning.

In the spirit of Gorbacheva & Bondarenko (2023). Three levels, each with the rules of those before it:

    flat       determiner (adjective) noun, verb, (object), (preposition phrase)
    agreeing   determiner, adjective and noun agree in gender and number, verb and subject in number
    nested     relative clauses inside noun phrases, also centre-embedded ones
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

LEVELS = ("flat", "agreeing", "nested")
CONSONANTS = "b d f g k l m n p r s t v z sh br tr".split()
VOWELS = "a e i o u".split()
# Endings by gender and number; a flat language always has the first.
ENDINGS = {("masculine", "singular"): "o", ("masculine", "plural"): "onti"}
ENDINGS |= {("feminine", "singular"): "a", ("feminine", "plural"): "anti"}
VERB_ENDINGS = {"singular": "ek", "plural": "ekum"}
RELATIVE = "ke"
MAX_DEPTH = 2


@dataclass(frozen=True)
class Word:
    """
    A word of a sentence.

    Args:
        form (`str`): as it is written.
        kind (`str`): determiner, adjective, noun, verb, preposition or relative.
        phrase (`int`): number of the noun phrase it agrees with, counted through the sentence; for a verb that of its
            subject. -1 for words that agree with nothing.
        gender, number (`str`): of that phrase.
        depth (`int`): relative clauses around it.
    """

    form: str
    kind: str
    phrase: int = -1
    gender: str = "masculine"
    number: str = "singular"
    depth: int = 0


class PseudoLanguage:
    """
    A language: its words and its rules. The same level and seed give the same language.

    Args:
        level (`str`): one of `LEVELS`.
        seed (`int`): of its words.
        words_per_class (`int`): nouns of a gender, adjectives and verbs; drawn with Zipf frequencies.
    """

    def __init__(self, level: str, seed: int = 0, words_per_class: int = 60):
        if level not in LEVELS:
            raise ValueError(f"unknown level {level!r} of the pseudo-language; there are {', '.join(LEVELS)}.")
        self.level = level
        rng = random.Random(f"words {seed}")
        onsets = ["".join(syllable) for syllable in product(CONSONANTS, VOWELS)]
        stems = [a + b + c for a, b, c in product(onsets, onsets, CONSONANTS)]
        stems = rng.sample(stems, 4 * words_per_class)
        self.nouns = {"masculine": stems[:words_per_class], "feminine": stems[words_per_class : 2 * words_per_class]}
        self.adjectives = stems[2 * words_per_class : 3 * words_per_class]
        self.verbs = stems[3 * words_per_class :]
        self.determiners = rng.sample([a + b for a, b in product(onsets, CONSONANTS)], 2)
        self.prepositions = rng.sample(onsets, 4)
        self.weights = [1 / rank for rank in range(1, words_per_class + 1)]

    def sentence(self, rng: random.Random) -> list[Word]:
        """Draws a sentence."""
        words = []
        number = self._noun_phrase(rng, words, depth=0)
        self._verb_phrase(rng, words, number, words[0].phrase, depth=0)
        return words

    def text(self, num_words: int, rng: random.Random) -> str:
        """Draws whole sentences until there are enough words."""
        sentences, count = [], 0
        while count < num_words:
            words = self.sentence(rng)
            count += len(words)
            sentences.append(" ".join(word.form for word in words).capitalize() + ".")
        return " ".join(sentences)

    def _noun_phrase(self, rng: random.Random, words: list[Word], depth: int) -> str:
        agrees = self.level != "flat"
        gender = rng.choice(["masculine", "feminine"])
        number = rng.choice(["singular", "plural"])
        ending = ENDINGS[gender, number] if agrees else ENDINGS["masculine", "singular"]
        phrase = 1 + max((word.phrase for word in words), default=-1)
        stems = [("determiner", rng.choice(self.determiners))]
        if rng.random() < 0.4:
            stems.append(("adjective", self._draw(rng, self.adjectives)))
        stems.append(("noun", self._draw(rng, self.nouns[gender])))
        words += [Word(stem + ending, kind, phrase, gender, number, depth) for kind, stem in stems]
        if self.level == "nested" and depth < MAX_DEPTH and rng.random() < 0.35:
            words.append(Word(RELATIVE, "relative", depth=depth + 1))
            if rng.random() < 0.5:
                self._verb_phrase(rng, words, number, phrase, depth + 1)
            else:
                # Centre-embedded: the clause has a subject of its own, and its verb stands before the outer one.
                first = len(words)
                inner = self._noun_phrase(rng, words, depth + 1)
                self._verb(rng, words, inner, words[first].phrase, depth + 1)
        return number

    def _verb_phrase(self, rng: random.Random, words: list[Word], number: str, phrase: int, depth: int) -> None:
        self._verb(rng, words, number, phrase, depth)
        if rng.random() < 0.6:
            self._noun_phrase(rng, words, depth)
        if rng.random() < 0.25:
            words.append(Word(rng.choice(self.prepositions), "preposition", depth=depth))
            self._noun_phrase(rng, words, depth)

    def _verb(self, rng: random.Random, words: list[Word], number: str, phrase: int, depth: int) -> None:
        ending = VERB_ENDINGS[number if self.level != "flat" else "singular"]
        words.append(Word(self._draw(rng, self.verbs) + ending, "verb", phrase, number=number, depth=depth))

    def _draw(self, rng: random.Random, stems: list[str]) -> str:
        return rng.choices(stems, self.weights)[0]


def texts(level: str, num_words: int, seed: int) -> Iterator[str]:
    """Endless texts of at least `num_words` words in one language."""
    language, rng = PseudoLanguage(level, seed), random.Random(f"texts {seed}")
    while True:
        yield language.text(num_words, rng)
