"""
Measurements, each one run with both sides in it, written to a result file.

    python scripts/benchmark.py quickstart --run runs/embedded

`quickstart` gathers a finished quickstart: accuracy of the fit, validation before and after training, and the time of
one-step answers against the same decoder's greedy `generate`, for the same number of tokens. `fit` times fitting
against the paper's loop, one text at a time, on the same texts, and measures the memory it takes. `fit-kill` kills a
fit again and again and looks whether anything is lost. `controlled-world` compares one-step answers with the
decoder's own where each instruction has one right answer. `fit-settings`, `encoder`, `ablations` and
`losses` gather the runs of scripts/fit_settings.sh, encoder_dolly.sh, ablations.sh and loss_comparison.sh, `length` the
calibration of a trained model; `training-speed` times its training. `decode` times one-step answers of many lengths
and batch sizes against greedy ones and bare passes, and with `--trained` draws quality against speed; `verified`
compares verified answers with greedy ones, token by token and in time. `snips` holds one-step JSON answers to commands
against the same decoder fine-tuned or prompted. `parity` gathers the run of evaluate.py that
compares lm-eval's own model with verified ProtoGen.
"""

import argparse

import cli
from benchmarks import quickstart


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    quickstart.add_commands(commands)
    # The others register our classes with transformers, and the quickstart is to load its model without.
    if argv[:1] != ["quickstart"]:
        from benchmarks import controlled_world, decoding, fitting, parity, snips, training, training_speed, verified

        for module in (controlled_world, decoding, fitting, parity, snips, training, training_speed, verified):
            module.add_commands(commands)
    arguments = parser.parse_args(argv)
    arguments.run_command(arguments)


if __name__ == "__main__":
    cli.run(main)
