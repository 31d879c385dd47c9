"""The pages: short, and without a dead link."""

import re
from pathlib import Path

import pytest
from conftest import ANSWERS, INSTRUCTIONS
from datasets import Dataset
from transformers import AutoModel, AutoProcessor

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(page for folder in ("docs", "scripts") for page in (ROOT / folder).rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{link} in {page.name}"


def test_the_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 200


def test_the_readme_trains_in_a_few_lines(encoder_dir, llama_dir, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "ProtoGenTrainer(" in block]
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
