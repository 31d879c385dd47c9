"""
Methods on tasks of the Language Model Evaluation Harness, one cell after another; an interrupted run goes on.

    protogen evaluate --config evaluation/dolly --limit 50
    protogen evaluate --config evaluation/dolly --data_dir FOLDER    # tasks' data from .jsonl files there

Leaves evaluation.json, plots and examples.html in OUTPUT_DIR; `protogen report` collects them.
"""

import json
import logging
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModel

from eval_tasks.baselines.masked_diffusion import masked_diffusion
from eval_tasks.evaluation import (
    WriterLM,
    add_open_metrics,
    draw,
    evaluate_cell,
    main_metric,
    metric_table,
    quality_metrics,
    side_by_side,
    task_manager,
    uncertainty_metrics,
)
from eval_tasks.protogen_lm import ProtoGenLM
from eval_tasks.recipes import RecipeParser
from eval_tasks.report import result, write_csv, write_json, write_result
from modeling_protogen.loading import load_tokenizer, load_weights
from trainers.decoders import load_decoder
from trainers.devices import best_device
from trainers.embedded import resolve
from trainers.text_files import parse_json, read_json


@dataclass
class EvaluationArguments:
    """What is measured on what."""

    output_dir: str = field(metadata={"help": "Folder of the run."})
    tasks: list[str] = field(metadata={"help": "Tasks or groups, the harness's or those in eval_tasks/."})
    methods: str = field(
        metadata={
            "help": "From a name to `kind` (protogen, hf or masked_diffusion) and arguments: those of ProtoGenLM, of "
            "HFLM, or of masked_diffusion with `pretrained`, `revision`, `trust_remote_code` and `batch_size`; JSON on "
            "the command line."
        },
    )
    baseline: str = field(metadata={"help": "Method that the others are compared with, question by question."})
    open_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks whose answers are also judged by meaning and fluency."}
    )
    sentence_encoder: str = field(default="embedded:minilm-l6", metadata={"help": "Judges what answers mean."})
    fluency_decoder: str = field(default="embedded:smollm2-135m", metadata={"help": "Judges how likely they are."})
    fluency_decoder_revision: str | None = field(default=None, metadata={"help": "Hub revision of it."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of .jsonl files; the Hub by default."})
    limit: int | None = field(default=None, metadata={"help": "Questions of each task, of each part of a group."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in the prompt; the task's by default."})
    gen_kwargs: str | None = field(default=None, metadata={"help": "As of lm_eval: max_gen_toks=256."})
    apply_chat_template: bool = field(default=True, metadata={"help": "Prompts in the decoder's chat template."})
    main_metrics: list[str] = field(
        default_factory=lambda: ["rouge_l", "exact_match_flexible-extract", "exact_match_custom-extract", "acc"],
        metadata={"help": "What plots show and retention is of: the first of these that a task has, each in 0..1."},
    )
    acceptable_error: float = field(default=0.7, metadata={"help": "An answer with at most this error is acceptable."})

    def __post_init__(self):
        self.methods = parse_json(self.methods, "methods")
        if not isinstance(self.methods, dict):
            raise ValueError(f"methods must be a mapping from names, not {json.dumps(self.methods)}.")
        for name, settings in self.methods.items():
            if not isinstance(settings, dict) or not {"kind", "pretrained"} <= settings.keys():
                raise ValueError(f"the method {name} must be a mapping with kind and pretrained, not {settings}.")
        if self.baseline not in self.methods:
            raise ValueError(f"baseline={self.baseline} is not one of the methods {', '.join(self.methods)}.")


def load_method(kind: str, pretrained: str, **settings):
    """A model of the harness."""
    device = str(best_device())
    if kind == "protogen":
        return ProtoGenLM(pretrained, device=device, **settings)
    if kind == "hf":
        return HFLM(resolve(pretrained), device=device, **settings)
    if kind == "masked_diffusion":
        return masked_diffusion_lm(pretrained, device, **settings)
    raise ValueError(f"kind={kind} is not one of protogen, hf, masked_diffusion.")


def masked_diffusion_lm(
    pretrained: str,
    device: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    batch_size: int = 1,
    **settings,
) -> WriterLM:
    """
    Args:
        pretrained (`str`): Hub id or folder.
        device (`str`)
        revision (`str`, *optional*): Hub revision: a commit keeps its code as it was read.
        trust_remote_code (`bool`, defaults to False): run the code that comes with the model.
        batch_size (`int`, defaults to 1)
        **settings: as in [`masked_diffusion`].
    """
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_weights(AutoModel.from_pretrained, pretrained, dtype=torch.bfloat16, **source).to(device).eval()
    tokenizer = load_tokenizer(pretrained, **source)
    return WriterLM(masked_diffusion(model, tokenizer, **settings), batch_size)


def main(argv: list[str]) -> None:
    (arguments,) = RecipeParser(EvaluationArguments).parse(argv)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    output = Path(arguments.output_dir)
    manager = task_manager(arguments.tasks, arguments.data_dir)
    options = {name: getattr(arguments, name) for name in ("limit", "num_fewshot", "gen_kwargs", "apply_chat_template")}
    cells, fluency = {}, None
    if arguments.open_tasks:
        fluency = load_decoder(
            arguments.fluency_decoder, arguments.fluency_decoder_revision, "float32", torch.device("cpu")
        )
    for method, settings in arguments.methods.items():
        lm = None
        for task in arguments.tasks:
            path = output / "cells" / f"{method}--{task}.json"
            made_with = {"settings": settings, "data_dir": arguments.data_dir, **options}
            if path.is_file():
                cell = read_json(path)
                if cell["made_with"] != made_with:
                    raise ValueError(f"{path} was made with {cell['made_with']}; remove it or use another output_dir.")
            else:
                print(f"{method} on {task}")
                lm = lm or load_method(**settings)
                cell = evaluate_cell(lm, task, manager, **options) | {"made_with": made_with}
                if task in arguments.open_tasks:
                    add_open_metrics(cell, resolve(arguments.sentence_encoder), *fluency)
                write_json(path, cell)
            cells[method, task] = cell
    table = metric_table(cells)
    metrics = quality_metrics(table, arguments.baseline)
    rated = main_metric(table, arguments.main_metrics)
    metrics |= uncertainty_metrics(rated, arguments.acceptable_error)
    metrics |= {f"seconds_an_example_{m}_{task}": cell["seconds_an_example"] for (m, task), cell in cells.items()}
    content = result(
        command=f"protogen evaluate {shlex.join(argv)}",
        model="; ".join(f"{name}: {settings['pretrained']}" for name, settings in arguments.methods.items()),
        revision=None,
        data=f"{', '.join(arguments.tasks)}, {arguments.limit or 'all'} questions of each",
        seed=0,
        metrics=metrics,
    )
    (output / "examples.html").write_text(side_by_side(cells))
    write_csv(output / "evaluation.csv", table.to_dict("records"))
    draw(cells, rated, arguments.acceptable_error, output)
    write_result(output / "evaluation.json", content, beside=", .csv, examples.html and plots beside it")
