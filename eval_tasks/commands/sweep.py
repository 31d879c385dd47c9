"""
Trains the runs of a sweep, which are in `runs/NAME`, and compares them in `runs/NAME.json`. Options that are not the
sweep's own go to every run; run the same command again to go on.

    protogen sweep ablations_snips --parallel 4 --max_steps 600
    protogen sweep ablations_snips --only base without_adapters
"""

import argparse
import shlex
import sys

from eval_tasks.report import write_result
from eval_tasks.sweeps import gather, read_sweep, run_sweep


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", help="a YAML file, or its name in scripts/recipes/sweeps")
    parser.add_argument("--only", nargs="*", default=[], help="runs to make; all by default")
    parser.add_argument("--parallel", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--gather", action="store_true", help="make no runs, compare those that there are")
    arguments, options = parser.parse_known_args(argv)
    sweep = read_sweep(arguments.sweep)
    failed = [] if arguments.gather else run_sweep(sweep, arguments.only, arguments.parallel, options)
    if not arguments.only:
        path = sweep.folder.with_suffix(".json")
        write_result(path, gather(sweep, f"protogen sweep {shlex.join(argv)}"), sweep.report)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, so there is nothing of it in the result")
