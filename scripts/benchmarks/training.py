"""Trained encoders beside each other: sources and targets, losses, and how well lengths are foreseen."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from embedded import decoder_revision
from tqdm import tqdm

from eval_tasks import report
from eval_tasks.one_step import one_step_records
from eval_tasks.pictures import curves, exact_points
from eval_tasks.retrieval import nearest_rows, retrieval_ranks
from eval_tasks.statistics import mean_with_interval
from eval_tasks.text_metrics import rouge_l, share_of_equal
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.proto_tokens import flatten_proto_tokens
from trainers.data import DataArguments, load_examples, split_by_instruction
from trainers.proto_bank import ProtoTokenBank, stack_entries


def add_commands(commands) -> None:
    command = commands.add_parser("encoder", help="gather the runs of scripts/encoder_dolly.sh")
    command.add_argument("--runs", default="runs/encoder_dolly")
    command.add_argument("--made-by", default="bash scripts/encoder_dolly.sh", help="the command, for the result")
    command.add_argument("--result", default="runs/encoder_dolly.json")
    command.set_defaults(run_command=encoder)
    command = commands.add_parser("ablations", help="gather the runs of scripts/ablations.sh")
    command.add_argument("--runs", default="runs/ablations")
    command.add_argument("--made-by", default="bash scripts/ablations.sh", help="the command, for the result")
    command.add_argument("--result", default="runs/ablations.json")
    command.set_defaults(run_command=ablations)
    command = commands.add_parser("length", help="how well a trained model foresees lengths")
    command.add_argument("--run", default="runs/length")
    command.add_argument("--result", default="runs/length_calibration.json")
    command.set_defaults(run_command=length)
    command = commands.add_parser("losses", help="compare the models of scripts/loss_comparison.sh")
    command.add_argument("--runs", default="runs/loss_comparison")
    command.add_argument("--data", default="scripts/data/dolly_sample.jsonl")
    command.add_argument("--validation-share", type=float, default=0.1)
    command.add_argument("--result", default="runs/loss_comparison.json")
    command.set_defaults(run_command=losses)


def finished_runs(folder: str | Path, name: str) -> list[Path]:
    runs = sorted(path.parent for path in Path(folder).glob(f"*/{name}"))
    if not runs:
        raise FileNotFoundError(f"no */{name} in {folder}: train first.")
    return runs


def encoder(arguments) -> None:
    """Runs are called by a letter and what it stands for; figures by the letter. Each run is held against the last."""
    runs = finished_runs(arguments.runs, "answers.csv")
    references = dict(zip(runs[1:], runs, strict=False))
    gather(arguments, runs, references, lambda run, figure: f"{figure}_{run.split('-')[0]}")


def ablations(arguments) -> None:
    """NAME-CHANGE is held against NAME, any other run against the base."""
    runs = finished_runs(arguments.runs, "answers.csv")
    references = {run: run.with_name(run.name.rpartition("-")[0] or "base") for run in runs if run.name != "base"}
    references = {run: reference for run, reference in references.items() if reference in runs}
    gather(arguments, runs, references, lambda run, figure: f"{run}_{figure}")


def gather(arguments, runs: list[Path], references: dict[Path, Path], called: Callable[[str, str], str]) -> None:
    """
    Writes the figures of all runs, and what each gains on its reference, instruction by instruction; those of what goes
    on from the middle of an answer are called `..._later`. `called` makes a figure's name of the run's and its own.
    Draws the learning curves.
    """
    figures, learning, made_with, encoders = {}, {}, set(), set()
    tables = {run: pd.read_csv(run / "answers.csv", index_col="id") for run in runs}
    # An encoder's window may leave out instructions that other runs have.
    common = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    starts = tables[runs[0]].loc[common, "answer_start"]
    beginnings, later = list(starts.index[starts == 0]), list(starts.index[starts > 0])
    for run in runs:
        metrics = json.loads((run / "metrics.json").read_text())
        config = ProtoGenForConditionalGeneration.config_class.from_pretrained(run / "model")
        measured = {}
        for part, ids in {"": beginnings, "_later": later}.items():
            for name in ("agreement", "accepted_length", "exact_match") if ids else ():
                values = tables[run].loc[ids, name]
                measured[f"{name}{part}"] = mean_with_interval(values)
                if run in references:
                    gained = values - tables[references[run]].loc[ids, name]
                    measured[f"{name}_gain{part}"] = mean_with_interval(gained)
        # Which agree without any learning.
        measured["own_tokens"] = config.num_own_tokens
        measured["steps"] = metrics["log"][-1]["step"]
        measured["instructions"] = metrics["run"]["train_examples"]
        made_with.add(tuple(metrics["run"][name] for name in ["decoder", "decoder_dtype", "data", "seed"]))
        # A run may do without one.
        encoders |= {metrics["run"]["encoder"]} - {None}
        # Over the last steps, and over held-out texts: as large on both is too little learned, not too few texts.
        for name in ("loss_reconstruction", "eval_loss_reconstruction"):
            logged = [entry[name] for entry in metrics["log"] if name in entry]
            if logged:
                measured[name] = logged[-1]
        log = {entry["step"]: entry["eval_token_accuracy"] for entry in metrics["log"] if "eval_loss" in entry}
        learning[run.name] = exact_points(log, log.values())
        measured |= {f"agreement_at_{step}": agreement for step, agreement in log.items()}
        figures |= {called(run.name, name): value for name, value in measured.items()}
    if len(made_with) > 1 or len(encoders) > 1:
        differ = ", ".join(map(str, sorted(made_with) + sorted(encoders)))
        raise ValueError(f"runs of {arguments.runs} differ in what they were made with: {differ}.")
    [(decoder, dtype, data, seed)] = made_with
    content = report.result(
        command=arguments.made_by,
        model=f"{decoder}, {dtype}; encoder {', '.join(encoders) or 'none'}",
        revision=decoder_revision(decoder),
        data=f"{len(beginnings)} held-out instructions of {data}",
        seed=seed,
        figures=figures,
    )
    picture = Path(arguments.result).with_suffix(".png")
    curves(learning, ("step", "agreement"), "Held-out instructions", picture)
    report.write_result(arguments.result, content, beside=f", learning curves in {picture.name} beside it")


def length(arguments) -> None:
    run = Path(arguments.run)
    path = run / "calibration.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train first.")
    made_with = json.loads((run / "metrics.json").read_text())["run"]
    count = (pd.read_csv(run / "answers.csv")["answer_start"] == 0).sum()
    content = report.result(
        command=f"train.py --config {run.name}; python scripts/benchmark.py length --run {arguments.run}",
        model=f"encoder {made_with['encoder']}; lengths in tokens of {made_with['decoder']}",
        revision=decoder_revision(made_with["decoder"]),
        data=f"{count // 2} held-out instructions of {made_with['data']}; calibrated on {count - count // 2} others",
        seed=made_with["seed"],
        figures=json.loads(path.read_text())["figures"],
    )
    report.write_result(arguments.result, content)


def losses(arguments) -> None:
    runs = finished_runs(arguments.runs, "metrics.json")
    bank = ProtoTokenBank(Path(arguments.runs) / "bank")
    examples = load_examples(DataArguments(data=arguments.data))
    known, held_out = split_by_instruction(examples, arguments.validation_share)
    known, held_out = ([example for example in part if example.id in bank] for part in (known, held_out))
    figures = {}
    for run in tqdm(runs, desc="losses", unit="model"):
        model = ProtoGenForConditionalGeneration.from_pretrained(run / "model").eval()
        processor = ProtoGenProcessor.from_pretrained(run / "model")
        measured = compare_with_bank(model, processor, bank, known, held_out, metric_of(run.name))
        figures |= {f"{run.name}_{name}": value for name, value in measured.items()}
    figures["held_out"] = len(held_out)
    figures["chance_reciprocal_rank"] = float((1 / np.arange(1, len(held_out) + 1)).mean())
    content = report.result(
        command="bash scripts/loss_comparison.sh",
        model=f"MiniLM encoder, {bank.info.decoder}",
        revision=decoder_revision(bank.info.decoder),
        data=f"{len(known)} banked answers to learn from and {len(held_out)} held out, of {arguments.data}",
        seed=0,
        figures=figures,
    )
    report.write_result(arguments.result, content, list(measured))


def metric_of(loss: str) -> str:
    """In what a loss brings a prediction near its text: regression alone keeps the vectors' lengths."""
    return "euclidean" if loss == "mean_squared_error" else "cosine"


def compare_with_bank(model, processor, bank, known, held_out, metric) -> dict[str, list[float]]:
    """
    Over held-out instructions, with intervals: how often the banked vectors of the own answer are the nearest among
    those of all of them (`top_1`), the mean reciprocal rank, and agreement and ROUGE-L with the own answer of what the
    decoder writes from the predicted vectors, and from the nearest of the training texts (`retrieved_...`).
    """

    def banked(examples):
        return flatten_proto_tokens(*stack_entries([bank[example.id] for example in examples])).numpy()

    predicted = []
    with torch.no_grad():
        for first in range(0, len(held_out), 32):
            part = held_out[first : first + 32]
            inputs = processor([e.instruction for e in part], [e.context for e in part])
            prediction = model.predict(**inputs)
            predicted.append(flatten_proto_tokens(prediction.e, prediction.m))
    predicted = torch.cat(predicted).numpy()
    ranks = retrieval_ranks(predicted, banked(held_out), metric)
    nearest = nearest_rows(predicted, banked(known), 1, metric)[0][:, 0]
    targets = [bank.row(example.id)["token_ids"] for example in held_out]
    # A training text's banked vectors write that text.
    retrieved = [bank.row(known[row].id)["token_ids"] for row in nearest]
    agree = [share_of_equal(found, target) for found, target in zip(retrieved, targets, strict=True)]
    records = one_step_records(
        model, processor, [e.instruction for e in held_out], [e.context for e in held_out], targets
    )
    references = processor.batch_decode(targets)
    return {
        "top_1": mean_with_interval(ranks == 1),
        "reciprocal_rank": mean_with_interval(1 / ranks),
        "agreement": mean_with_interval(records["agreement"]),
        "rouge_l": mean_with_interval(rouge_l(records["answer"], references)),
        "retrieved_agreement": mean_with_interval(agree),
        "retrieved_rouge_l": mean_with_interval(rouge_l(processor.batch_decode(retrieved), references)),
    }
