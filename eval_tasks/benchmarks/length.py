"""How well a trained model predicts lengths."""

from pathlib import Path

import pandas as pd

from eval_tasks import report
from trainers.embedded import decoder_revision
from trainers.text_files import read_json


def add_commands(commands) -> None:
    command = commands.add_parser("length")
    command.add_argument("--run", default="runs/length")
    command.add_argument("--result", default="runs/length_calibration.json")
    command.set_defaults(run_command=length)


def length(arguments) -> None:
    run = Path(arguments.run)
    path = run / "calibration.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train first.")
    made_with = read_json(run / "metrics.json")["run"]
    count = len(pd.read_csv(run / "answers.csv"))
    content = report.result(
        command=arguments.command_line,
        model=f"encoder {made_with['encoder']}; lengths in tokens of {made_with['decoder']}",
        revision=decoder_revision(made_with["decoder"]),
        data=f"{count // 2} held-out instructions of {made_with['data']}; calibrated on {count - count // 2} others",
        seed=made_with["seed"],
        metrics=read_json(path)["metrics"],
    )
    report.write_result(arguments.result, content)
