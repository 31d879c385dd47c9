"""
Measures speed and quality: both sides in one run, with a result file.

    protogen bench snips --run runs/snips --rounds 40

quickstart      gather a finished quickstart, and time one step against greedy decoding
snips           commands to JSON: one step beside the same decoder fine-tuned or prompted, and other rivals
decode          one step against greedy decoding and bare passes, at many lengths and batch sizes
verified        verified answers against greedy ones, token by token and in time
fit             fitting against the paper's loop, one text at a time, and its memory
fit-kill        kill a fit again and again and look whether anything is lost
training-speed  what a training step costs
length          how well a trained model predicts lengths
controlled-world  one step against the decoder's own answers where each instruction has one right answer
parity          lm-eval's own model of the decoder against verified ProtoGen
"""

import argparse
import importlib
import shlex

from eval_tasks.benchmarks import BENCHMARKS


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    if argv[0] not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {argv[0]!r}; there are {', '.join(BENCHMARKS)}.")
    parser = argparse.ArgumentParser(prog="protogen bench")
    # Only its own module: the others register our classes with transformers, and the quickstart loads without.
    module = importlib.import_module(f"eval_tasks.benchmarks.{BENCHMARKS[argv[0]]}")
    module.add_commands(parser.add_subparsers(dest="command", required=True))
    arguments = parser.parse_args(argv)
    arguments.command_line = f"protogen bench {shlex.join(argv)}"
    arguments.run_command(arguments)
