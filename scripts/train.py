"""
Fits proto-tokens (`--stage fit`), lets the decoder answer instructions (`--stage teacher`), trains the encoder that
predicts proto-tokens (`--stage train`), fine-tunes the decoder itself as a rival (`--stage finetune`), measures how
long a text proto-tokens hold (`--stage capacity`), or studies what they carry (`--stage anatomy`).

    accelerate launch scripts/train.py --config scripts/recipes/embedded.yaml --stage fit
    accelerate launch scripts/train.py --config scripts/recipes/embedded.yaml --stage train --max_steps 1000

Run the same command again after an interruption: it goes on where it was.
"""

from pathlib import Path

import cli
from arguments import ARGUMENTS, SMOKE
from stages.anatomy import anatomy
from stages.capacity import capacity
from stages.finetune import finetune
from stages.fit import fit
from stages.teacher import teacher
from stages.train import train
from stages.world import world


def main(arguments: list[str]) -> None:
    parser = cli.RecipeParser(*ARGUMENTS)
    if parser.parse(arguments)[0].smoke:
        arguments = arguments + SMOKE
    parsed = parser.parse(arguments)
    run, model_args, target_args, data_args, fit_args, capacity_args, study_args, world_args, args = parsed
    target_args.teacher_answers = target_args.teacher_answers or str(Path(args.output_dir) / "teacher")
    run.bank = run.bank or str(Path(args.output_dir) / "bank")
    if run.stage == "fit":
        fit(run, model_args, data_args, fit_args, args)
    elif run.stage == "capacity":
        capacity(run, model_args, data_args, fit_args, capacity_args, args)
    elif run.stage == "anatomy":
        anatomy(run, model_args, data_args, fit_args, study_args, args)
    elif run.stage == "world":
        world(data_args, world_args, args)
    elif run.stage == "teacher":
        teacher(model_args, target_args, data_args, args)
    elif run.stage == "finetune":
        finetune(model_args, target_args, data_args, args)
    else:
        train(run, model_args, target_args, data_args, study_args, args)


if __name__ == "__main__":
    cli.run(main)
