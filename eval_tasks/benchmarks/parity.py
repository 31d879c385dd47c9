"""Whether `--model protogen` is the decoder that it verifies with: `protogen evaluate --config evaluation/parity`."""

import json
from pathlib import Path

import numpy as np

from eval_tasks import report


def add_commands(commands) -> None:
    command = commands.add_parser("parity")
    command.add_argument("--run", default="runs/evaluation/parity")
    command.add_argument("--result", default="runs/lm_eval_parity.json")
    command.set_defaults(run_command=parity)


def accuracy(cell: dict) -> float:
    """The mean of all metrics of a method's answers to a task."""
    return float(np.mean([list(sample["metrics"].values()) for sample in cell["samples"]]))


def parity(arguments) -> None:
    cells = Path(arguments.run) / "cells"
    metrics, compared, different = {}, 0, 0
    for path in sorted(cells.glob("hf--*.json")):
        task = path.stem.removeprefix("hf--")
        hf, protogen, one_step = (
            json.loads((cells / f"{method}--{task}.json").read_text()) for method in ("hf", "protogen", "one_step")
        )
        pairs = list(zip(hf["samples"], protogen["samples"], strict=True))
        for one, other in pairs:
            if [one[key] for key in ("task", "doc_id", "filter", "prompt")] != [
                other[key] for key in ("task", "doc_id", "filter", "prompt")
            ]:
                raise ValueError(f"{task}: the two runs do not have the same questions; remove {cells} and run again.")
        compared += len(pairs)
        different += sum(one["answer"] != other["answer"] for one, other in pairs)
        name = task.removeprefix("protogen_")
        metrics |= {
            f"{name}_difference": accuracy(protogen) - accuracy(hf),
            f"{name}_accuracy_hf": accuracy(hf),
            f"{name}_accuracy_one_step": accuracy(one_step),
            f"{name}_seconds_an_example": protogen["seconds_an_example"],
            f"{name}_seconds_an_example_one_step": one_step["seconds_an_example"],
        }
    if not metrics:
        raise FileNotFoundError(f"there is nothing in {cells}; run protogen evaluate --config evaluation/parity first.")
    evaluation = report.read_result(Path(arguments.run) / "evaluation.json")
    content = evaluation | {
        "metrics": metrics | {"answers_compared": compared, "answers_different": different},
    }
    report.write_result(arguments.result, content)
