"""
Studies what proto-tokens carry and how much. The recipe's key `study` says which study; the module of that name in
`eval_tasks.studies` has its arguments.

    protogen study --config anatomy/roles
    protogen study --config capacity --smoke    # the whole recipe in seconds, for no real numbers
"""

import argparse
import importlib
import shlex
from pathlib import Path
from types import ModuleType

from eval_tasks.recipes import RecipeParser, keys_of, read_recipe
from eval_tasks.report import result, write_csv, write_result
from eval_tasks.studies import STUDIES
from eval_tasks.studies.study import StudyArguments, StudyContext
from trainers.arguments import ModelArguments, open_accelerator
from trainers.data import DataArguments
from trainers.embedded import decoder_revision
from trainers.fitting import FittingArguments
from trainers.training_args import ProtoGenTrainingArguments

ARGUMENTS = (StudyArguments, ModelArguments, DataArguments, FittingArguments, ProtoGenTrainingArguments)
SMOKE = {
    "fit_max_steps": ["2"],
    "fit_attempts": ["1"],
    "fit_shared_m_steps": ["2"],
    "capacity_texts": ["2"],
    "capacity_lengths": ["3", "4"],
    "study_texts": ["10"],
    "study_length": ["4"],
    "study_min_length": ["4"],
    "study_seeds": ["2"],
    "study_noise": ["0", "0.5"],
    "study_curve_steps": ["2"],
    "study_weights": ["0", "1"],
}


def main(argv: list[str]) -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--study")
    first.add_argument("--config")
    first.add_argument("--smoke", action="store_true")
    chosen, _ = first.parse_known_args(argv)
    recipe = read_recipe(chosen.config) if chosen.config else {}
    name = chosen.study or recipe.get("study", StudyArguments.study)
    if name not in STUDIES:
        raise ValueError(f"study={name} is not one of {', '.join(STUDIES)}.")
    module = importlib.import_module(f"eval_tasks.studies.{name}")
    types, smoke = (module.Arguments, *ARGUMENTS), []
    if chosen.smoke:
        smoke = [word for key, value in SMOKE.items() if key in keys_of(types) for word in (f"--{key}", *value)]
    make(module, f"protogen study {shlex.join(argv)}", *RecipeParser(*types).parse(argv + smoke))


def make(
    module: ModuleType,
    command: str,
    own: object,
    study_args: StudyArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    fit_args: FittingArguments,
    args: ProtoGenTrainingArguments,
) -> None:
    """Makes a study; leaves its metrics in OUTPUT_DIR/study.json, rows in study.csv, plots and banks beside them."""
    accelerator, output = open_accelerator(args), Path(args.output_dir)
    context = StudyContext(model_args, data_args, fit_args, study_args, accelerator, output)
    found = module.study(context, own)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    content = result(
        command=command,
        model=f"{found.model or model_args.decoder}, {model_args.decoder_dtype}",
        revision=decoder_revision(model_args.decoder, model_args.decoder_revision),
        data=f"{found.texts or context.described_texts()} of {data_args.data}",
        seed=fit_args.fit_seed,
        metrics=found.metrics,
    )
    write_csv(output / "study.csv", found.rows.to_dict("records"))
    if found.html:
        (output / "examples.html").write_text(found.html)
    write_result(output / "study.json", content, found.columns, ", .csv and plots beside it")
