"""The controlled world: one right answer to each instruction, and the whole way from nothing to a figure."""

import random

import pytest
from test_scripts import call  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_tasks.report import read_result
from eval_tasks.studies.controlled_world import (
    KINDS,
    MAX_PROMPT,
    NUMBERS,
    THINGS,
    question,
    world_rows,
    world_tokenizer,
)


def answered(instruction: str) -> str:
    """The answer, from the words of the instruction alone."""
    words = instruction.split()
    things = [word for word in words if word in THINGS]
    numbers = [NUMBERS.index(word) for word in words if word in NUMBERS]
    if words[0] == "without":
        return " ".join(things[1:-1]) if things[0] == things[-1] else "wrong"
    if "plus" in words:
        return NUMBERS[sum(numbers)]
    if "after" in words:
        return " ".join(NUMBERS[numbers[1] + 1 :][: numbers[0]])
    by_verb = {
        "say": things,
        "reverse": things[::-1],
        "first": things[:1],
        "last": things[-1:],
        "count": [NUMBERS[len(things)]],
        "twice": sorted(things[:3] * 2, key=things.index),
    }
    return " ".join(by_verb[words[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_has_its_right_answer(kind):
    rng, tokenizer = random.Random(0), world_tokenizer(["<unknown>"])
    for _ in range(200):
        instruction, answer = question(kind, rng)
        assert answer == answered(instruction)
        ids = tokenizer(f"{instruction} {answer}").input_ids
        assert 0 not in ids, "a word that the tokenizer does not know"
        assert len(instruction.split()) < MAX_PROMPT - 4
        assert 1 <= len(answer.split()) <= 6


def test_rows_are_different_instructions_and_repeatable():
    rows = world_rows(500, seed=1)
    assert len({row["instruction"] for row in rows}) == 500
    assert rows == world_rows(500, seed=1) != world_rows(500, seed=2)
    assert {row["category"] for row in rows} == set(KINDS)


def test_from_nothing_to_a_figure(call, tmp_path):  # noqa: F811
    arguments = ["--config", "controlled_world", "--output_dir", tmp_path, "--data", tmp_path / "data.jsonl"]
    arguments += ["--max_steps", 2, "--use_cpu", "true"]
    world = [*arguments, "--world_rows", 120, "--world_width", 32, "--world_layers", 1, "--world_steps", 2]
    assert "more held out" in call("world", *world)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").state_dict()
    assert "more held out" in call("world", *world), "a second time finds what is there"
    models = ["--encoder", tmp_path / "encoder", "--decoder", tmp_path / "decoder"]
    assert "model in" in call("train", *arguments, *models)
    result = tmp_path / "result.json"
    assert "written to" in call("bench", "controlled-world", "--run", tmp_path, "--result", result)
    metrics = read_result(result)["metrics"]
    assert {"one_step_exact_match", "autoregressive_exact_match"} <= set(metrics)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder").state_dict()
    assert all(weight.equal(after[name]) for name, weight in before.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "decoder")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say apple bell"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt.split() == ["<start>", "<user>", "say", "apple", "bell", "<answer>"]
