"""Texts for studies: the data's own, and those without meaning or without syntax."""

import json
import random
from itertools import islice

import pytest
from transformers import AutoTokenizer

from eval_tasks.studies import pseudo_language
from eval_tasks.studies.pseudo_language import ENDINGS, MAX_DEPTH, VERB_ENDINGS, PseudoLanguage
from eval_tasks.studies.text_sources import load_sources, source_texts
from trainers.data import DataArguments, Example

ANSWERS = ["the cat sat on the mat", "blue", "cat dog and bird ran under the tree", "who sat"]
EXAMPLES = [Example(f"id{n}", "question", "", answer, "open") for n, answer in enumerate(ANSWERS)]


@pytest.fixture
def tokenizer(llama_dir):
    return AutoTokenizer.from_pretrained(llama_dir)


def test_natural_texts_are_the_beginnings_of_long_enough_answers(tokenizer):
    texts = source_texts(tokenizer, "natural", EXAMPLES, 2, 5, seed=0)
    assert tokenizer.batch_decode([text.token_ids for text in texts]) == ["the cat sat on the", "cat dog and bird ran"]
    assert [(text.id, text.group) for text in texts] == [("id0", "open"), ("id2", "open")]
    shorter = source_texts(tokenizer, "natural", EXAMPLES, 3, 5, seed=0, min_length=2)
    assert [len(text.token_ids) for text in shorter] == [5, 5, 2]
    with pytest.raises(ValueError, match="only 2 of the texts have 5 tokens, 3 are needed"):
        source_texts(tokenizer, "natural", EXAMPLES, 3, 5, seed=0)


def test_random_words_are_words_of_the_answers(tokenizer):
    texts = source_texts(tokenizer, "random_words", EXAMPLES, 6, 9, seed=0)
    assert [len(text.token_ids) for text in texts] == [9] * 6
    assert len({text.id for text in texts}) == len({tuple(text.token_ids) for text in texts}) == 6
    assert set(tokenizer.decode([t for text in texts for t in text.token_ids]).split()) <= set(
        " ".join(ANSWERS).split()
    )
    assert texts == source_texts(tokenizer, "random_words", EXAMPLES, 6, 9, seed=0)
    assert not {t.id for t in texts} & {t.id for t in source_texts(tokenizer, "random_words", EXAMPLES, 6, 9, seed=1)}


def test_shuffled_words_are_the_same_words(tokenizer):
    (text,) = source_texts(tokenizer, "shuffled_words", EXAMPLES, 1, 6, seed=0)
    words = tokenizer.decode(text.token_ids).split()
    assert sorted(words) == sorted(ANSWERS[0].split())
    assert words != ANSWERS[0].split()


def test_other_files_are_sources(tmp_path):
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"text": "the sky is blue", "kind": "facts"}) + "\n")
    data = DataArguments(data=str(file), instruction_field="text", context_field=None, answer_field="text")
    sources = load_sources(["random_words", f"{file}#text"], data)
    assert list(sources) == ["random_words", "facts"]
    assert sources["facts"][0].answer == "the sky is blue"
    with pytest.raises(ValueError, match="unknown source of texts 'verse'"):
        load_sources(["verse"], data)


@pytest.mark.parametrize("level", pseudo_language.LEVELS)
def test_sentences_follow_the_grammar(level):
    language, rng = PseudoLanguage(level), random.Random(0)
    sentences = [language.sentence(rng) for _ in range(300)]
    embedded = 0
    for sentence in sentences:
        assert [word.kind for word in sentence[:2]] in (["determiner", "adjective"], ["determiner", "noun"])
        numbers = {word.phrase: word.number for word in sentence if word.kind == "noun"}
        for word in sentence:
            if word.kind in ("determiner", "adjective", "noun"):
                ending = ENDINGS[word.gender, word.number] if level != "flat" else "o"
                assert word.form.endswith(ending)
            elif word.kind == "verb":
                assert word.number == numbers[word.phrase]
                assert word.form.endswith(VERB_ENDINGS[word.number] if level != "flat" else "ek")
        # The sentence and each relative clause have one verb.
        kinds = [word.kind for word in sentence]
        assert kinds.count("verb") == 1 + kinds.count("relative")
        embedded += any(word.depth for word in sentence)
        assert max(word.depth for word in sentence) <= MAX_DEPTH
    assert (embedded > 0) == (level == "nested")


def test_a_language_is_its_seed():
    def first(seed):
        return list(islice(pseudo_language.texts("nested", 20, seed), 3))

    assert first(0) == first(0) != first(1)
    assert all(len(text.split()) >= 20 and text.endswith(".") for text in first(0))
    assert not set(first(0)[0].lower().split()) & {"the", "and", "of", "is", "to"}
    with pytest.raises(ValueError, match="unknown level 'deep'"):
        PseudoLanguage("deep")
