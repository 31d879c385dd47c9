"""Sweeps: which runs are made, with which options, in which order. What they leave is gathered in test_scripts.py."""

import importlib
import sys
import threading
from pathlib import Path

import pytest
import yaml

from eval_tasks import command_line, sweeps
from eval_tasks.recipes import RECIPES, SHARED, RecipeParser, options_of
from eval_tasks.sweeps import Sweep, read_sweep, run_sweep

NAMES = sorted(path.stem for path in (RECIPES / "sweeps").glob("*.yaml"))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Commands that would have been run, by the name of their output folder."""
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(sweeps, "_protogen", lambda command, arguments, log=None: calls.append((command, arguments)))
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_every_sweep_is_understood(name, made):
    sweep = read_sweep(name)
    assert not run_sweep(sweep, [], 1, ["--max_steps", "2"])
    assert len(made) == len(sweep.before) + len(sweep.runs)
    for command, arguments in made:
        module = importlib.import_module(f"eval_tasks.commands.{command}")
        RecipeParser(*module.ARGUMENTS, passed_over=SHARED).parse([*arguments, "--use_cpu", "true"])


def tiny(**fields) -> Sweep:
    runs = {"base": {}, "short": {"chunk_size": 4}, "shorter": {"chunk_size": 2}}
    return Sweep(**{"name": "tiny", "recipe": "embedded", "runs": runs, "gather": "answers"} | fields)


def test_a_run_has_the_sweeps_options_then_its_own_then_those_of_the_command_line(made):
    sweep = tiny(fixed={"max_steps": 5, "chunk_size": 8}, before={"teacher": {"latent_source": "none"}})
    run_sweep(sweep, ["short"], 1, ["--max_steps", "7", "--losses", "{}", "--fit_slots=3"])
    # What comes before gets those of the options that it knows.
    before, run = made
    options = ["--max_steps", "7", "--losses", "{}"]
    assert before == ("teacher", ["--config", "embedded", "--latent_source=none", *options])
    own = ["--output_dir", str(Path("runs/tiny/short")), "--max_steps=5", "--chunk_size=4", *options, "--fit_slots=3"]
    assert run == ("train", ["--config", "embedded", *own])
    assert options_of({"a": [1, 2], "b": None, "c": {"d": 1}, "e": False}) == [
        "--a",
        "1",
        "2",
        "--b=null",
        '--c={"d": 1}',
        "--e=False",
    ]


def test_what_a_run_is_compared_with():
    sweep = tiny(compared_with={"shorter": "short"})
    assert [sweep.reference(run) for run in sweep.runs] == [None, "base", "short"]
    assert tiny(runs={"a": {}, "b": {}}).reference("a") is None


def test_a_run_waits_for_the_one_that_it_starts_from(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ended, first_may_end = [], threading.Event()

    def protogen(command, arguments, log):
        name = Path(arguments[3]).name
        if name == "first":
            assert first_may_end.wait(60)
        if name == "other":
            first_may_end.set()
        ended.append(name)

    monkeypatch.setattr(sweeps, "_protogen", protogen)
    runs = {"first": {}, "second": {"start_from": "runs/tiny/first/model"}, "other": {}}
    run_sweep(tiny(runs=runs), [], 3, [])
    assert ended == ["other", "first", "second"]


def test_what_failed_is_named_and_the_rest_is_made(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeps, "_protogen", lambda command, arguments, log: int("short" in arguments[3]))
    assert run_sweep(tiny(), [], 1, []) == ["short", "shorter"]
    assert [line for line in capsys.readouterr().out.splitlines()] == ["== base", "== short", "== shorter"]
    monkeypatch.setattr(sweeps, "_protogen", lambda command, arguments, log=None: 1)
    with pytest.raises(RuntimeError, match="`protogen world` failed"):
        run_sweep(tiny(before={"world": {}}), [], 1, [])
    with pytest.raises(ValueError, match="has no run fly; it has base, short, shorter"):
        run_sweep(tiny(), ["fly"], 1, [])


def test_a_run_is_a_process_with_a_log_of_its_own(monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"recipe": "none", "runs": {"a": {}}, "gather": "answers"}))
    for options in ([], ["--parallel", "2"]):
        monkeypatch.setattr(sys, "argv", ["protogen"])
        with pytest.raises(SystemExit) as exit:
            command_line.main(["sweep", str(tmp_path / "tiny.yaml"), *options])
        assert "no */answers.csv in" in str(exit.value)
    assert "recipe " in capfd.readouterr().err
    assert "none.yaml does not exist" in (tmp_path / "runs" / "tiny" / "a.log").read_text()


def test_runs_of_other_instructions_are_not_compared(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for number, run in enumerate(("base", "short")):
        folder = tmp_path / "runs" / "tiny" / run
        folder.mkdir(parents=True)
        (folder / "answers.csv").write_text(f"id,agreement\ntext-{number},1.0\n")
    with pytest.raises(ValueError, match="no held-out instruction in common"):
        sweeps.gather(tiny(), "protogen sweep tiny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: [a]", "runs must be a mapping of mappings"),
        ("runs: {a: }", "runs must be a mapping of mappings"),
        ("runs: {a: {}}\nfixed: [a]", "fixed must be a mapping, not"),
        ("runs: {a: {}}\ncompared_with: [a]", "compared_with must be a mapping, not"),
        ("runs: {a: {}}\nbefore: {fly: {}}", "fly is no command; there are generate"),
        ("runs: {1: {}}", "line 3: the key 1 is no text"),
    ],
)
def test_what_is_no_sweep_is_named(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(f"recipe: embedded\ngather: answers\n{text}\n")
    with pytest.raises(ValueError, match=message):
        read_sweep(str(tmp_path / "bad.yaml"))
