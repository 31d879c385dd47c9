"""Imports run one way: scripts -> eval_tasks -> trainers -> modeling_protogen."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"modeling_protogen", "trainers", "eval_tasks", "scripts"}
# The last two are how transformers itself loads a model.
NEEDED = {"modeling_protogen", "torch", "transformers", "huggingface_hub", "safetensors"}
ALLOWED = {
    "modeling_protogen": {"modeling_protogen"},
    "trainers": {"modeling_protogen", "trainers"},
    "eval_tasks": {"modeling_protogen", "trainers", "eval_tasks"},
    "scripts": OURS,
}


def imports(path: Path, package: str):
    """Top-level module names that a file imports anywhere; a relative import is its own package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else node.module.split(".")[0]


@pytest.mark.parametrize("package", sorted(OURS))
def test_imports_run_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        foreign = set(imports(path, package)) & (OURS | {"tests"}) - ALLOWED[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_the_model_needs_torch_and_transformers_only():
    for path in (ROOT / "modeling_protogen").glob("*.py"):
        foreign = set(imports(path, "modeling_protogen")) - NEEDED
        assert foreign <= set(sys.stdlib_module_names), f"{path.name} imports {foreign}"


def test_the_model_is_flat_and_uses_imports_that_the_hub_follows():
    """The Hub's code copier follows `from .module import name` only."""
    assert not [path for path in (ROOT / "modeling_protogen").iterdir() if path.is_dir() and path.name != "__pycache__"]
    for path in (ROOT / "modeling_protogen").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert node.module, f"{path.name}: `from . import x` is not followed"
