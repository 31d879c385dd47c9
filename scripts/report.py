"""
Fills the README's tables from the result files.

    python scripts/report.py
"""

import argparse
from pathlib import Path

import cli

from eval_tasks.report import fill_tables, read_result

ROOT = Path(__file__).parent.parent


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "scripts" / "results")
    arguments = parser.parse_args(argv)
    results = {path.stem: read_result(path) for path in sorted(arguments.results.glob("*.json"))}
    arguments.readme.write_text(fill_tables(arguments.readme.read_text(), results))
    print(f"tables of {', '.join(results) or 'no result'} in {arguments.readme}")


if __name__ == "__main__":
    cli.run(main)
