"""Metrics, timing and reports."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import INSTRUCTIONS
from rouge_score.rouge_scorer import RougeScorer

from eval_tasks import report
from eval_tasks.commands.report import PAGES
from eval_tasks.latency import interleaved_seconds, ratio_with_interval
from eval_tasks.text_metrics import (
    bleu,
    chrf,
    exact_match,
    is_degenerate,
    repetition,
    rouge_l,
    token_accuracy,
    token_f1,
)

ROOT = Path(__file__).parent.parent


def test_token_accuracy_counts_real_tokens_only():
    labels = np.array([[1, 2, -100], [3, 4, 5]])
    assert token_accuracy(np.array([[1, 9, -100], [3, 4, 9]]), labels) == pytest.approx(3 / 5)


def test_exact_match_ignores_outer_space():
    assert exact_match(["a b ", "c"], ["a b", "d"]) == 0.5


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # LCS "the cat mat": precision 3/4, recall 3/6.
    assert rouge_l(["the cat the mat"], ["the cat sat on a mat"]).tolist() == pytest.approx([2 * 0.75 * 0.5 / 1.25])
    assert rouge_l(INSTRUCTIONS, INSTRUCTIONS).tolist() == [1.0] * len(INSTRUCTIONS)


@pytest.mark.parametrize(
    ("answer", "reference", "words"),
    [
        ("東京です", "東京です!", 4),  # each character, kanji as kana
        ("สวัสดี", "สวัสดี", 4),  # with its vowels and marks
        ("привет, мир", "Привет мир", 2),
        ("مرحبا بكم", "مرحبا بكم", 2),
        ("हिन्दी में", "हिन्दी में", 2),
        ("größte Städte", "Größte Städte", 2),
    ],
)
def test_words_of_all_scripts_count(answer, reference, words):
    for metric in (rouge_l, token_f1):
        assert metric([answer], [reference]).tolist() == [1.0]
        # Half of what is said is right: precision 1 / 2, recall 1.
        assert metric([f"{answer} {' '.join(['x'] * words)}"], [reference]).tolist() == [pytest.approx(2 / 3)]
    assert rouge_l(["größte"], ["gründe te"]).tolist() == [0.0]
    assert repetition([" ".join([answer] * 9)])[0] > 0.5


def test_an_answer_without_spaces_can_be_a_loop():
    assert is_degenerate(["很好" * 20, "สวัสดี" * 20, "东京是日本的首都也是最大的城市"]).tolist() == [True, True, False]


def test_english_is_measured_as_before(monkeypatch):
    """Against the tokenizer of `rouge-score`, and words between spaces."""
    rng = np.random.default_rng(0)
    words = 'the cat\'s "x_1" 3.14 (a) U.S. well-known\ttabs\n\nlines -- @b, The'.split(" ")
    texts = [" ".join(rng.choice(words, 12)) for _ in range(60)]
    answers, references = texts[:30], texts[30:]
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    assert rouge_l(answers, references).tolist() == expected
    found = token_f1(answers, references), bleu(answers, references), repetition(texts)
    monkeypatch.setattr("eval_tasks.text_metrics.spaced", str)
    for values, before in zip(
        found, (token_f1(answers, references), bleu(answers, references), repetition(texts)), strict=True
    ):
        assert values.tolist() == before.tolist()


def test_answers_that_share_words():
    assert token_f1(["The cat, a cat!"], ["cat sat"]).tolist() == [pytest.approx(0.5)]
    assert token_f1(["", "the"], ["x", ""]).tolist() == [0.0, 1.0]
    for metric in (bleu, chrf):
        same, near, far = metric(["a b c d e", "a b c d x", "v w x y z"], ["a b c d e"] * 3)
        assert same == pytest.approx(1)
        assert 0 <= far < near < 1


def test_answers_that_repeat_themselves():
    assert repetition(["a b c d a b c d", "a b c", "a b c d e"]).tolist() == [pytest.approx(0.2), 0, 0]
    assert is_degenerate(["no " * 20, "", " ", "one two three four five"]).tolist() == [True, True, True, False]


def test_methods_are_called_in_turn():
    calls = []
    methods = {"a": lambda number: calls.append(("a", number)), "b": lambda number: calls.append(("b", number))}
    seconds = interleaved_seconds(methods, rounds=3, warmup=1)
    assert calls == [(name, number) for number in range(4) for name in "ab"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_of_medians_lies_in_its_interval():
    rng = np.random.default_rng(0)
    drift = rng.uniform(1, 3, 50)
    value, low, high = ratio_with_interval(20 * drift, drift)
    assert low <= value <= high
    assert value == pytest.approx(20)
    assert ratio_with_interval(np.array([4.0]), np.array([2.0])) == [2.0, 2.0, 2.0]


@pytest.fixture
def content():
    return report.result("make it", "tiny", None, "three rows", 0, {"accuracy": 0.98765, "speedup": [20.0, 19.0, 21.0]})


def test_rows_are_written_whole_into_a_folder_that_is_made(tmp_path):
    path = tmp_path / "results" / "x.csv"
    report.write_csv(path, [{"text": "a,b", "length": 1}, {"text": "c", "length": 2}])
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        report.write_csv(path, [{"text": "a"}, {"other": "c"}])
    assert path.read_bytes() == b'text,length\r\n"a,b",1\r\nc,2\r\n'
    assert [file.name for file in path.parent.iterdir()] == ["x.csv"]


def test_results_are_written_whole_and_read_back(content, tmp_path):
    path = tmp_path / "results" / "x.json"
    report.write_json(path, content)
    assert report.read_result(path) == content
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]
    assert set(content) == {*report.RESULT_FIELDS, "seconds"}
    path.write_text(json.dumps({"metrics": {}}))
    with pytest.raises(ValueError, match="is not a result file: it lacks command"):
        report.read_result(path)


def test_tables_are_filled_between_their_markers(content):
    text = "before\n<!-- result x -->\nold\n<!-- end x -->\nafter"
    filled = report.fill_tables(text, {"x": content})
    assert "old" not in filled
    assert "| accuracy | 0.9877 |" in filled
    assert "| speedup | 20 (19 to 21) |" in filled
    assert "`make it`" in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter")
    assert report.fill_tables(filled, {"x": content}) == filled
    content["metrics"] = {"slow_accuracy": 0.5, "slow_steps": 7, "fast_accuracy": 1.0, "fast_steps": 3}
    by_setting = report.fill_tables("<!-- result x accuracy steps -->\n<!-- end x -->", {"x": content})
    assert "| setting | accuracy | steps |\n| --- | --- | --- |\n| slow | 0.5 | 7 |\n| fast | 1 | 3 |" in by_setting
    del content["metrics"]["slow_steps"]
    assert "| slow | 0.5 |  |\n| fast | 1 | 3 |" in report.markdown_table(content, ["accuracy", "steps"])
    with pytest.raises(ValueError, match="no metric of the result is called SETTING_step"):
        report.markdown_table(content, ["accuracy", "step"])
    with pytest.raises(ValueError, match=r"no result file y\.json"):
        report.fill_tables("<!-- result y -->", {"x": content})
    with pytest.raises(ValueError, match="has no '<!-- end x -->'"):
        report.fill_tables("<!-- result x -->", {"x": content})


def test_figures_are_filled_between_their_markers(content):
    text = "| <!-- metric x accuracy -->old<!-- end --> | <!-- metric x speedup --><!-- end --> |"
    filled = report.fill_metrics(text, {"x": content})
    assert "<!-- metric x accuracy -->0.9877<!-- end -->" in filled
    assert "-->20 (19 to 21)<!--" in filled
    assert "old" not in filled
    with pytest.raises(ValueError, match=r"no metric speed in a result file x\.json"):
        report.fill_metrics("<!-- metric x speed --><!-- end -->", {"x": content})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_readmes_figures_are_those_of_the_result_files(path):
    text = path.read_text()
    results = {path.stem: report.read_result(path) for path in (ROOT / "scripts" / "results").glob("*.json")}
    filled = report.fill_metrics(report.fill_tables(text, results), results)
    assert filled == text, "run protogen report"
