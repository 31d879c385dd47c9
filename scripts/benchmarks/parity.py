"""A finished `evaluate.py --config evaluation/parity`: is `--model protogen` the decoder that it verifies with?"""

import json
from pathlib import Path

import numpy as np

from eval_tasks import report


def add_commands(commands) -> None:
    command = commands.add_parser("parity", help="lm-eval's own model of the decoder against verified ProtoGen")
    command.add_argument("--run", default="runs/evaluation/parity")
    command.add_argument("--result", default="runs/lm_eval_parity.json")
    command.set_defaults(run_command=parity)


def parity(arguments) -> None:
    cells = Path(arguments.run) / "cells"
    figures, compared, different = {}, 0, 0
    for path in sorted(cells.glob("hf--*.json")):
        task = path.stem.removeprefix("hf--")
        hf, protogen = (json.loads((cells / f"{method}--{task}.json").read_text()) for method in ("hf", "protogen"))
        pairs = list(zip(hf["samples"], protogen["samples"], strict=True))
        for one, other in pairs:
            if [one[key] for key in ("task", "doc_id", "filter", "prompt")] != [
                other[key] for key in ("task", "doc_id", "filter", "prompt")
            ]:
                raise ValueError(f"{task}: the two runs do not have the same questions; remove {cells} and run again.")
        compared += len(pairs)
        different += sum(one["answer"] != other["answer"] for one, other in pairs)
        means = [
            np.mean([list(sample["metrics"].values()) for sample in column]) for column in zip(*pairs, strict=True)
        ]
        name = task.removeprefix("protogen_")
        figures |= {f"{name}_difference": float(means[1] - means[0]), f"{name}_accuracy_hf": float(means[0])}
        figures |= {f"{name}_seconds_an_example": protogen["seconds_an_example"]}
    if not figures:
        raise FileNotFoundError(
            f"there is nothing in {cells}; run scripts/evaluate.py --config evaluation/parity first."
        )
    evaluation = report.read_result(Path(arguments.run) / "evaluation.json")
    content = evaluation | {
        "figures": figures | {"answers_compared": compared, "answers_different": different},
    }
    report.write_result(arguments.result, content)
