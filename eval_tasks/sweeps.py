"""
Sweeps: runs of one recipe that each change something, and what comes of it. A sweep is a YAML file in
`scripts/recipes/sweeps`:

    recipe: encoder_dolly                     # of all runs
    command: train                            # what a run is; `train` by default
    before: {teacher: {latent_source: none}}  # commands that come first, with their options
    fixed: {max_steps: 1000}                  # options of all runs
    runs: {base: {}, shorter: {chunk_size: 8}}
    compared_with: {shorter: base}            # `base`, where nothing is said
    gather: answers                           # what is read off the runs, one of GATHER
    report: [agreement, accepted_length]      # columns of the table that is printed
"""

import importlib
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from modeling_protogen import ProtoGenConfig, ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.proto_tokens import flatten_proto_tokens
from trainers.data import DataArguments, Example, load_examples, split_by_instruction
from trainers.embedded import decoder_revision
from trainers.proto_bank import ProtoTokenBank, stack_entries
from trainers.text_files import read_json

from . import report
from .baselines.token_head import token_head
from .baselines.writing import written
from .command_line import COMMANDS
from .one_step import one_step_records
from .plots import curves, exact_points
from .recipes import RECIPES, keys_of, options_of, read_recipe
from .retrieval import nearest_rows, retrieval_ranks
from .slot_filling import exact_match
from .statistics import mean_with_interval
from .text_metrics import rouge_l, share_of_equal

BASE = "base"


@dataclass
class Sweep:
    """A sweep as its file describes it; `name` is the file's, and results are in `runs/NAME`."""

    name: str
    recipe: str
    runs: dict[str, dict]
    gather: str
    command: str = "train"
    before: dict[str, dict] = field(default_factory=dict)
    fixed: dict = field(default_factory=dict)
    compared_with: dict[str, str] = field(default_factory=dict)
    report: list[str] = field(default_factory=list)

    def __post_init__(self):
        for key in ("runs", "before", "fixed", "compared_with"):
            value = getattr(self, key)
            inner = value.values() if key in ("runs", "before") and isinstance(value, dict) else ()
            if not all(isinstance(part, dict) for part in (value, *inner)):
                shape = " of mappings; write {} for one that says nothing" if key in ("runs", "before") else ""
                raise ValueError(f"sweep {self.name}: {key} must be a mapping{shape}, not {value}.")
        for command in (self.command, *self.before):
            if str(command) not in COMMANDS:
                raise ValueError(f"sweep {self.name}: {command} is no command; there are {', '.join(COMMANDS)}.")
        unknown = {*self.compared_with, *map(str, self.compared_with.values())} - {*self.runs}
        if unknown:
            raise ValueError(f"sweep {self.name}: compared_with names {', '.join(sorted(unknown))}, which is no run.")
        if not isinstance(self.gather, str) or self.gather not in GATHER:
            raise ValueError(f"sweep {self.name}: gather={self.gather} is not one of {', '.join(GATHER)}.")

    @property
    def folder(self) -> Path:
        return Path("runs") / self.name

    def reference(self, run: str) -> str | None:
        """The run that a run is compared with."""
        return self.compared_with.get(run, BASE if BASE in self.runs and run != BASE else None)


def read_sweep(name: str) -> Sweep:
    """
    The sweep of a name, or of a YAML file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file says something else than a sweep does.
    """
    path = name if name.endswith(".yaml") else str(RECIPES / "sweeps" / f"{name}.yaml")
    try:
        return Sweep(name=Path(path).stem, **read_recipe(path))
    except TypeError as error:
        raise ValueError(f"{path} is no sweep: {str(error).removeprefix('Sweep.__init__() ')}") from error


def run_sweep(sweep: Sweep, only: list[str], parallel: int, options: list[str]) -> list[str]:
    """
    Makes the runs, each a process of its own that goes on where it was interrupted, with its output in
    `runs/NAME/RUN.log` where several share the machine.

    Args:
        only (`list[str]`): runs to make; all if empty.
        parallel (`int`): runs that share the machine.
        options (`list[str]`): command-line options for every run, and for the commands before them that know them.

    Returns:
        `list[str]`: runs that failed.

    Raises:
        ValueError: if `only` names no run of the sweep.
        RuntimeError: if a command before the runs fails.
    """
    unknown = {*only} - {*sweep.runs}
    if unknown:
        raise ValueError(f"sweep {sweep.name} has no run {', '.join(sorted(unknown))}; it has {', '.join(sweep.runs)}.")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    for command, own in sweep.before.items():
        known = keys_of(importlib.import_module(f"eval_tasks.commands.{command}").ARGUMENTS)
        arguments = ["--config", sweep.recipe, *options_of(own), *_known(options, known)]
        if _protogen(command, arguments):
            raise RuntimeError(f"`protogen {command}` failed, which comes before the runs of {sweep.name}.")
    waiting: dict[str, Future] = {}

    def make(run: str) -> int:
        values = sweep.fixed | sweep.runs[run]
        first = Path(str(values.get("start_from", ""))).parent.name
        if first in waiting:  # A run that starts from another's model.
            waiting[first].result()
        arguments = ["--config", sweep.recipe, "--output_dir", str(sweep.folder / run), *options_of(values), *options]
        print(f"== {run}", flush=True)
        return _protogen(sweep.command, arguments, sweep.folder / f"{run}.log" if parallel > 1 else None)

    with ThreadPoolExecutor(parallel) as pool:
        for run in only or sweep.runs:
            waiting[run] = pool.submit(make, run)
    return [run for run, made in waiting.items() if made.result()]


def _protogen(command: str, arguments: list[str], log: Path | None = None) -> int:
    line = [sys.executable, "-m", "eval_tasks.command_line", command, *arguments]
    if log is None:
        return subprocess.run(line).returncode
    with open(log, "a") as file:
        return subprocess.run(line, stdout=file, stderr=file).returncode


def _known(options: list[str], known: set[str]) -> list[str]:
    """The options, with their values, whose keys are known."""
    kept, keep = [], False
    for option in options:
        if option.startswith("--"):
            keep = option.removeprefix("--").split("=")[0] in known
        if keep:
            kept.append(option)
    return kept


def gather(sweep: Sweep, command: str) -> dict:
    """
    The result of a sweep's finished runs; learning curves are drawn beside it, in `runs/NAME.png`.

    Args:
        command (`str`): what made it, for the result.

    Raises:
        FileNotFoundError: if no run is finished.
        ValueError: if the runs cannot be compared.
    """
    return GATHER[sweep.gather](sweep, command)


def finished(sweep: Sweep, name: str) -> dict[str, Path]:
    """Folders of the runs that have left a file."""
    folders = {run: sweep.folder / run for run in sweep.runs if (sweep.folder / run / name).is_file()}
    if not folders:
        raise FileNotFoundError(f"no */{name} in {sweep.folder}: run `protogen sweep {sweep.name}` first.")
    return folders


def split_of(recipe: dict) -> tuple[list[Example], list[Example]]:
    """The examples that a recipe trains on, and those that it holds out."""
    data = DataArguments(data=recipe["data"])
    return split_by_instruction(load_examples(data), recipe.get("validation_share", data.validation_share))


def gather_answers(sweep: Sweep, command: str) -> dict:
    """
    How well held-out answers are written, and what each run gains on the one that it is compared with, instruction by
    instruction.
    """
    runs = finished(sweep, "answers.csv")
    metrics, learning, made_with, encoders = {}, {}, set(), set()
    tables = {run: pd.read_csv(folder / "answers.csv", index_col="id") for run, folder in runs.items()}
    # An encoder's window may leave out instructions that other runs have.
    common = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    if not common:
        raise ValueError(
            f"the runs in {sweep.folder} have no held-out instruction in common: what is only a start for others, as "
            "targets: self, belongs under `before`."
        )
    for run, folder in runs.items():
        training = read_json(folder / "metrics.json")
        measured = gains(tables[run], tables.get(sweep.reference(run)), common)
        # Which agree without any learning.
        config = ProtoGenConfig.from_pretrained(folder / "model")
        measured["num_autoregressive_tokens"] = config.num_autoregressive_tokens
        measured["steps"] = training["log"][-1]["step"]
        measured["instructions"] = training["run"]["train_examples"]
        made_with.add(tuple(training["run"][name] for name in ["decoder", "decoder_dtype", "data", "seed"]))
        # A run may do without one.
        encoders |= {training["run"]["encoder"]} - {None}
        # Over the last steps, and over held-out texts: as large on both is too little learned, not too few texts.
        for name in ("loss_reconstruction", "eval_loss_reconstruction"):
            logged = [entry[name] for entry in training["log"] if name in entry]
            if logged:
                measured[name] = logged[-1]
        log = {entry["step"]: entry["eval_token_accuracy"] for entry in training["log"] if "eval_loss" in entry}
        learning[run] = exact_points(log, log.values())
        measured |= {f"agreement_at_{step}": agreement for step, agreement in log.items()}
        metrics |= {f"{run}_{name}": value for name, value in measured.items()}
    if len(made_with) > 1 or len(encoders) > 1:
        differ = ", ".join(map(str, sorted(made_with) + sorted(encoders)))
        raise ValueError(f"runs in {sweep.folder} differ in what they were made with: {differ}.")
    [(decoder, dtype, data, seed)] = made_with
    curves(learning, ("step", "agreement"), "Held-out instructions", sweep.folder.with_suffix(".png"))
    return report.result(
        command=command,
        model=f"{decoder}, {dtype}; encoder {', '.join(encoders) or 'none'}",
        revision=decoder_revision(decoder),
        data=f"{len(common)} held-out instructions of {data}",
        seed=seed,
        metrics=metrics,
    )


def gains(table: pd.DataFrame, reference: pd.DataFrame | None, ids: list[str]) -> dict[str, list[float]]:
    """Means over these answers, and of their differences from the reference's, with intervals."""
    measured = {}
    for name in ("agreement", "accepted_length", "exact_match"):
        values = table.loc[ids, name]
        measured[name] = mean_with_interval(values)
        if reference is not None:
            measured[f"{name}_gain"] = mean_with_interval(values - reference.loc[ids, name])
    return measured


def examples_seen(training: dict) -> int:
    """By the `metrics.json` of a run."""
    return training["log"][-1]["step"] * training["run"]["examples_a_step"]


def of_recipe(recipe: dict, command: str, what: str, texts: str, metrics: dict) -> dict:
    """A result about these texts of a recipe's data, by its decoder, of which `what` says more."""
    return report.result(
        command=command,
        model=f"{recipe['decoder']}, {what}",
        revision=decoder_revision(recipe["decoder"]),
        data=f"{texts} of {recipe['data']}",
        seed=recipe.get("seed", 0),
        metrics=metrics,
    )


def gather_token_head(sweep: Sweep, command: str) -> dict:
    """Exact match on held-out instructions of what the predictors alone say, and gains, instruction by instruction."""
    runs, recipe = finished(sweep, "metrics.json"), read_recipe(sweep.recipe)
    _, held_out = split_of(recipe)
    right, metrics = {}, {}
    for run, folder in tqdm(runs.items(), desc="token heads", unit="model"):
        model = ProtoGenForConditionalGeneration.from_pretrained(folder / "model").eval()
        write = token_head(model, ProtoGenProcessor.from_pretrained(folder / "model"))
        answers = written(write, held_out, model.config.max_answer_length, run)
        right[run] = exact_match(answers, [example.answer for example in held_out])
    for run, values in right.items():
        metrics[f"{run}_exact_match"] = mean_with_interval(values)
        reference = right.get(sweep.reference(run))
        if reference is not None:
            metrics[f"{run}_exact_match_gain"] = mean_with_interval(values - reference)
        metrics[f"{run}_commands_seen"] = examples_seen(read_json(runs[run] / "metrics.json"))
    what = f"without a pass of it; encoder {recipe.get('encoder', 'none')}"
    return of_recipe(recipe, command, what, f"{len(held_out)} held-out instructions", metrics)


def gather_drafts(sweep: Sweep, command: str) -> dict:
    """How many drafted tokens are right at each place, behind places at even distances in held-out answers."""
    runs, recipe, metrics = finished(sweep, "metrics.json"), read_recipe(sweep.recipe), {}
    for run, folder in runs.items():
        training = read_json(folder / "metrics.json")
        measured = {key.removeprefix("eval_"): value for key, value in training["after"].items()}
        kept = {key: value for key, value in measured.items() if key.startswith("top1_") or key == "kept_tokens"}
        kept["answers_seen"] = examples_seen(training)
        metrics |= {f"{run}_{key}": value for key, value in kept.items()}
    return of_recipe(recipe, command, "frozen", "the decoder's answers to held-out instructions", metrics)


def gather_fits(sweep: Sweep, command: str) -> dict:
    """Accuracy, steps and time of fits of the same texts."""
    runs = {run: read_json(path / "fit.json") for run, path in finished(sweep, "fit.json").items()}
    metrics = {}
    for name, run in runs.items():
        if run["texts_fitted"] != run["texts"]:
            raise ValueError(f"the fit {name} was interrupted, so its time is not known: remove {sweep.folder}/{name}.")
        metrics[f"{name}_accuracy"] = run["reconstruction_accuracy"]
        metrics[f"{name}_perfect_texts"] = run["perfect_texts"]
        metrics[f"{name}_mean_steps_to_best"] = run["mean_steps_to_best"]
        metrics[f"{name}_seconds_a_text"] = run["seconds"] / run["texts"]
    some, recipe = next(iter(runs.values())), read_recipe(sweep.recipe)
    return report.result(
        command=command,
        model=f"{recipe['decoder']}, {recipe['decoder_dtype']}",
        revision=decoder_revision(recipe["decoder"]),
        data=f"first {some['settings']['fit_max_length']} tokens of {some['texts']} responses of {some['data']}",
        seed=some["settings"]["fit_seed"],
        metrics=metrics,
    )


def gather_losses(sweep: Sweep, command: str) -> dict:
    """Models that each learned with one loss from one bank, `OUTPUT_DIR/bank` of the recipe."""
    runs, recipe = finished(sweep, "metrics.json"), read_recipe(sweep.recipe)
    bank = ProtoTokenBank(Path(recipe["output_dir"]) / "bank")
    bank.verify()
    known, held_out = ([example for example in part if example.id in bank] for part in split_of(recipe))
    metrics = {}
    for run, folder in tqdm(runs.items(), desc="losses", unit="model"):
        model = ProtoGenForConditionalGeneration.from_pretrained(folder / "model").eval()
        processor = ProtoGenProcessor.from_pretrained(folder / "model")
        measured = compare_with_bank(model, processor, bank, known, held_out, metric_of(run))
        metrics |= {f"{run}_{name}": value for name, value in measured.items()}
    metrics["held_out"] = len(held_out)
    metrics["chance_reciprocal_rank"] = float((1 / np.arange(1, len(held_out) + 1)).mean())
    return report.result(
        command=command,
        model=f"encoder {recipe['encoder']}, {bank.info.decoder}",
        revision=decoder_revision(bank.info.decoder),
        data=f"{len(known)} banked answers to learn from and {len(held_out)} held out, of {recipe['data']}",
        seed=recipe.get("seed", 0),
        metrics=metrics,
    )


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


GATHER = {
    "answers": gather_answers,
    "token_head": gather_token_head,
    "drafts": gather_drafts,
    "fits": gather_fits,
    "losses": gather_losses,
}
