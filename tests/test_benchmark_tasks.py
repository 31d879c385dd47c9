"""The tasks for lm-eval: the harness's own, with data from a folder."""

import json
from pathlib import Path

import lm_eval
import pytest
import yaml

from eval_tasks import benchmark_data
from eval_tasks.baselines.writing import Written
from eval_tasks.evaluation import WriterLM, evaluate_cell, task_manager
from eval_tasks.slot_filling import INTENT, parse_reference
from trainers.data import Example, split_by_instruction

TASKS = Path(benchmark_data.__file__).parent
MMLU = {"question": "q", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 1}
PRO = {"question": "q", "options": ["x", "y"], "answer": "B", "category": "law", "cot_content": "A: Let's think."}
SNIPS = [
    {"instruction": "play a song ", "response": '{"intent": "PlayMusic", "item": "song", "artist": "é", "year": "2"}'},
    {"instruction": "how warm", "response": '{"intent": "GetWeather", "condition": "warm"}'},
    {"instruction": "rate it", "response": '{"intent": "RateBook", "rating": "3"}'},
]

CATEGORIES = """biology, business, chemistry, computer science, economics, engineering, health, history, law, math,
    other, philosophy, physics, psychology"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def write(name, *rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    write("mmlu_test", MMLU | {"question": "one\u2028line"}, MMLU | {"subject": "astronomy"})
    write("mmlu_dev", *[MMLU] * 5)
    pro = [PRO | {"category": " ".join(category.split())} for category in CATEGORIES.split(",")]
    write("mmlu_pro_test", *pro)
    write("mmlu_pro_validation", *pro * 5)
    write("gsm8k_test", {"question": "q", "answer": "so #### 4"})
    write("gsm8k_train", *[{"question": "p", "answer": "so #### 5"}] * 6)
    write("dolly", *[{"instruction": f"say {n}", "context": "", "response": "x", "category": "c"} for n in range(300)])
    german = {"context": "", "response": "x", "category": "c"}
    write(
        "dolly_german",
        *[german | {"instruction": f"sag {n}", "instruction_original_en": f"say {n}"} for n in range(300)],
    )
    trivia = {"question": "q", "answer": {"value": "x", "aliases": ["x", "X y"]}}
    write("triviaqa_validation", trivia)
    write("triviaqa_train", trivia)
    write("snips_test", *[{"context": "", "category": "c"} | row for row in SNIPS])
    return str(folder)


@pytest.fixture(scope="module")
def manager(data_dir):
    return task_manager([], data_dir)


@pytest.fixture(scope="module")
def load(manager):
    return lambda name: manager.load([name])["tasks"]


def test_every_subject_of_the_harness_is_there():
    def tasks(name):
        text = (TASKS / name).read_text().replace("!function ", "")
        return [entry["task"] for entry in yaml.safe_load(text)["task"]]

    folder = Path(lm_eval.__file__).parent / "tasks"
    assert tasks("mmlu/protogen_mmlu.yaml") == sorted(path.stem for path in (folder / "mmlu/default").glob("mmlu_*"))
    assert tasks("mmlu_pro/protogen_mmlu_pro.yaml") == sorted(
        path.stem for path in (folder / "mmlu_pro").glob("mmlu_*")
    )


def test_subjects_get_their_own_questions(data_dir):
    splits = benchmark_data.mmlu("anatomy", data_dir)
    assert [row["question"] for row in splits["test"]] == ["one\u2028line"]
    assert len(splits["dev"]) == 5


def test_tasks_ask_as_the_harness_does(load):
    (gsm8k,) = load("protogen_gsm8k").values()
    assert gsm8k.doc_to_text(gsm8k.test_docs()[0]) == "Question: q\nAnswer:"
    assert gsm8k.config.num_fewshot == 5
    (cot,) = load("protogen_gsm8k_cot").values()
    assert cot.config.num_fewshot == 8
    (trivia,) = load("protogen_triviaqa").values()
    assert trivia.doc_to_text(trivia.validation_docs()[0]) == "Question: q?\nAnswer:"
    pro = load("protogen_mmlu_pro")
    assert len(pro) == 14
    law = pro["mmlu_pro_law"]
    assert len(law.test_docs()) == 1
    assert law.doc_to_text(law.test_docs()[0]).endswith("A. x\nB. y\nAnswer: Let's think step by step.")


def test_dolly_asks_what_training_holds_out(load, data_dir):
    (dolly,) = load("protogen_dolly").values()
    found = [doc["instruction"] for doc in dolly.test_docs()]
    examples = [Example(str(n), f"say {n}", "", "x") for n in range(300)]
    _, held_out = split_by_instruction(examples, benchmark_data.DOLLY_HELD_OUT)
    assert found == [example.instruction for example in held_out]
    (german,) = load("protogen_dolly_german").values()
    assert [doc["instruction"] for doc in german.test_docs()] == [text.replace("say", "sag") for text in found]
    assert german.doc_to_text(german.test_docs()[0]) == found[0].replace("say", "sag")
    assert dolly.doc_to_text({"instruction": "say", "context": " it "}) == "say\n\nit"
    metrics = dolly.process_results({"response": "a cat sat"}, [" a cat sat"])
    assert metrics["rouge_l"] == metrics["token_f1"] == 1
    assert metrics["degenerate"] == 0


def test_snips_answers_are_measured_as_json(load, manager):
    (snips,) = load("protogen_snips").values()
    assert [snips.doc_to_text(doc) for doc in snips.test_docs()] == ["play a song", "how warm", "rate it"]
    assert snips.config.num_fewshot == 0
    answers = {
        "play a song": '{"artist": "é", "year": "2", "intent": "PlayMusic", "item": "song"}',
        "how warm": '{"intent": "GetWeather", "condition": "cold", "city": "x"}',
        "rate it": "rating: 3",
    }
    calls = []

    def write(prompts, contexts, max_new_tokens):
        calls.append(max_new_tokens)
        return Written([answers[prompt] for prompt in prompts], [])

    found = lm_eval.simple_evaluate(
        WriterLM(write, 2), tasks=["protogen_snips"], task_manager=manager, bootstrap_iters=0
    )
    metrics = {name.removesuffix(",none"): value for name, value in found["results"]["protogen_snips"].items()}
    assert metrics["exact_match"] == pytest.approx(1 / 3)
    assert metrics["intent_accuracy"] == metrics["valid_json"] == pytest.approx(2 / 3)
    # Of all answers together: three slots of five are right, and of five wanted.
    assert metrics["slot_f1"] == pytest.approx(2 * 3 / (5 + 5))
    assert set(calls) == {128}

    cell = evaluate_cell(WriterLM(write), "protogen_snips", manager)
    assert [sample["answer"] for sample in cell["samples"]] == list(answers.values())
    assert cell["samples"][1]["metrics"] == {"exact_match": 0, "intent_accuracy": 1, "valid_json": 1}
    assert cell["samples"][1]["target"] == SNIPS[1]["response"]


def test_snips_is_read_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="give its folder as data_dir, in the repository scripts/data"):
        benchmark_data.snips()
    with pytest.raises(FileNotFoundError, match=r"there is no .*snips_test.jsonl"):
        benchmark_data.snips(str(tmp_path))
    (rows,) = benchmark_data.snips(str(TASKS.parent / "scripts" / "data")).values()
    assert len(rows) == 700
    assert all(INTENT in parse_reference(row["response"]) for row in rows)


def test_a_byte_order_mark_is_read_over(tmp_path):
    row = {"instruction": "größe", "response": '{"intent": "a"}'}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    (tmp_path / "snips_test.jsonl").write_text(text, encoding="utf-8-sig")
    assert benchmark_data.snips(str(tmp_path))["test"].to_list() == [row]


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "snips_test.jsonl").write_text('{"instruction": "a"}\n\n{"instruction"\n')
    with pytest.raises(ValueError, match=r"snips_test.jsonl, line 3: this is no JSON"):
        benchmark_data.snips(str(tmp_path))


def test_a_folder_without_the_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*gsm8k_test.jsonl"):
        benchmark_data.gsm8k(str(tmp_path))
