"""
Fills tables and metrics of the pages from the result files, and makes a page of the studies and one of the
evaluations that have been run.

    protogen report
"""

import argparse
import re
from pathlib import Path

from eval_tasks.page import Section, html_page
from eval_tasks.report import fill_metrics, fill_tables, read_result

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def header(recipe: Path) -> str:
    """The comment at a recipe's head."""
    lines = recipe.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    text = " ".join(line.removeprefix("# ") for line in lines[:first])
    return re.sub(r" (Here|Measured): ", r"\n\1: ", text)


def studies(runs: Path) -> list[Section]:
    """The studies of `scripts/recipes/anatomy` whose results are in the folder."""
    sections = []
    for recipe in sorted((ROOT / "scripts" / "recipes" / "anatomy").glob("*.yaml")):
        path = runs / recipe.stem / "study.json"
        if path.is_file():
            examples = path.with_name("examples.html")
            html = examples.read_text() if examples.is_file() else ""
            plots = sorted(path.parent.glob("*.png"))
            sections.append(Section(recipe.stem, header(recipe), read_result(path), plots, html))
    return sections


def evaluations(runs: Path) -> list[Section]:
    """The runs of `protogen evaluate` in a folder."""
    sections = []
    for path in sorted(runs.glob("*/evaluation.json")):
        claim = "Methods on the same questions: quality, its difference from the baseline's, retention and speed."
        plots = sorted(path.parent.glob("*.png"))
        html = path.with_name("examples.html").read_text()
        sections.append(Section(path.parent.name, claim, read_result(path), plots, html))
    return sections


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readmes", type=Path, nargs="*", default=PAGES)
    parser.add_argument("--results", type=Path, default=ROOT / "scripts" / "results")
    parser.add_argument("--runs", type=Path, default=Path("runs/anatomy"), help="runs of scripts/recipes/anatomy")
    parser.add_argument("--evaluations", type=Path, default=Path("runs/evaluation"), help="runs of protogen evaluate")
    arguments = parser.parse_args(argv)
    results = {path.stem: read_result(path) for path in sorted(arguments.results.glob("*.json"))}
    for readme in arguments.readmes:
        readme.write_text(fill_metrics(fill_tables(readme.read_text(), results), results))
        print(f"filled from {len(results)} results: {readme}")
    pages = {
        arguments.runs: ("Anatomy of proto-tokens", studies(arguments.runs)),
        arguments.evaluations: ("Ways to write an answer", evaluations(arguments.evaluations)),
    }
    for folder, (title, sections) in pages.items():
        if sections:
            (folder / "index.html").write_text(html_page(title, sections))
            print(f"{title}: {folder / 'index.html'}")
