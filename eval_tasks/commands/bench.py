"""
Measures speed and quality: both sides in one run, with a result file.

    protogen bench snips --run runs/snips --rounds 40
"""

import argparse
import importlib
import shlex

from eval_tasks.benchmarks import BENCHMARKS
from eval_tasks.command_line import table


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\n{table({name: help for name, (_, help) in BENCHMARKS.items()})}")
        return
    if argv[0] not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {argv[0]!r}; there are {', '.join(BENCHMARKS)}.")
    parser = argparse.ArgumentParser(prog="protogen bench")
    # Only its own module: the others register our classes with transformers, and the quickstart loads without.
    module = importlib.import_module(f"eval_tasks.benchmarks.{BENCHMARKS[argv[0]][0]}")
    module.add_commands(parser.add_subparsers(dest="command", required=True))
    arguments = parser.parse_args(argv)
    arguments.command_line = f"protogen bench {shlex.join(argv)}"
    arguments.run_command(arguments)
