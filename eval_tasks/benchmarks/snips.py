"""Commands to JSON: one-step answers beside the same decoder fine-tuned or prompted, token by token, and rivals."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from eval_tasks import report
from eval_tasks.abstention import coverage_curve, ranking_metrics, threshold_for_accuracy
from eval_tasks.baselines.autoregressive import autoregressive
from eval_tasks.baselines.few_shot import few_shot
from eval_tasks.baselines.one_pass import protogen
from eval_tasks.baselines.token_head import token_head
from eval_tasks.baselines.writing import Writer, written
from eval_tasks.latency import interleaved_seconds, ratio_with_interval
from eval_tasks.plots import curves, exact_points
from eval_tasks.retention import retention_metrics
from eval_tasks.slot_filling import exact_match, slot_filling_metrics
from eval_tasks.statistics import mean_with_interval
from modeling_protogen import ProtoGenProcessor
from trainers.data import DataArguments, Example, load_examples
from trainers.decoders import FUSE_HELP, load_processor_of, load_protogen, load_trained
from trainers.devices import best_device
from trainers.files import read_lines
from trainers.text_files import read_json

BATCH_SIZE = 32


def add_commands(commands) -> None:
    command = commands.add_parser("snips")
    command.add_argument("--run", default="runs/snips", help="output_dir of the recipe snips")
    command.add_argument("--finetuned", help="model of protogen finetune; left out by default")
    command.add_argument("--predictor", help="output_dir of the run with the token head alone; left out by default")
    command.add_argument("--data", default="scripts/data/snips_test.jsonl")
    command.add_argument("--train-data", default="scripts/data/snips_train.jsonl", help="examples of few-shot prompts")
    command.add_argument("--few-shot", type=int, default=0, help="examples before each command, token by token")
    command.add_argument("--foreign", nargs="*", default=[], help=".jsonl files of questions that are no commands")
    command.add_argument("--max-foreign", type=int, default=350, help="of each of these files")
    command.add_argument("--limit", type=int, help="test commands; all by default")
    command.add_argument("--few-shot-limit", type=int, help="test commands for few-shot answers; all by default")
    command.add_argument("--show", type=int, default=0, help="commands whose answers are printed first")
    command.add_argument("--rounds", type=int, default=40, help="timed commands")
    command.add_argument("--fuse-adapters", action="store_true", help=FUSE_HELP)
    command.add_argument("--cuda-graphs", action="store_true", help="of one step and of the fine-tuned rival, for time")
    command.add_argument("--result", default="runs/snips.json")
    command.set_defaults(run_command=snips)


def snips(arguments) -> None:
    run, device = Path(arguments.run), best_device()
    Path(arguments.result).parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_trained(str(run / "model"), "auto", None, arguments.fuse_adapters)
    examples = load_examples(DataArguments(data=arguments.data))[: arguments.limit]
    references, longest = [example.answer for example in examples], model.config.max_answer_length
    writers: dict[str, Writer] = {"one_step": protogen(model, processor)}
    if arguments.finetuned:
        decoder = AutoModelForCausalLM.from_pretrained(arguments.finetuned, dtype=model.decoder.dtype).to(device).eval()
        writers["finetuned"] = autoregressive(decoder, processor)
    if arguments.few_shot:
        shown = one_of_each_kind(load_examples(DataArguments(data=arguments.train_data)), arguments.few_shot)
        writers["few_shot"] = few_shot(model.decoder, processor, shown)
    if arguments.predictor:
        folder = Path(arguments.predictor) / "model"
        writers["token_head"] = token_head(load_protogen(folder).to(device), load_processor_of(folder))
    show(writers, examples[: arguments.show], longest)

    records = records_of(model, processor, examples)
    metrics = slot_filling_metrics(list(records["answer"]), references)
    metrics |= named("one_step", metrics)
    metrics["one_step_exact_match"] = mean_with_interval(exact_match(list(records["answer"]), references))
    metrics |= uncertainty_metrics(model, processor, run, records, references, foreign_questions(arguments, processor))
    for name in [name for name in writers if name != "one_step"]:
        asked = examples[: arguments.few_shot_limit] if name == "few_shot" else examples
        answers, wanted = written(writers[name], asked, longest, name), references[: len(asked)]
        metrics |= named(name, slot_filling_metrics(answers, wanted))
        metrics[f"{name}_exact_match"] = mean_with_interval(exact_match(answers, wanted))
        metrics[f"{name}_commands"] = len(asked)
    if metrics.get("finetuned_exact_match", [0])[0]:
        metrics["share_of_finetuned"] = metrics["one_step_exact_match"][0] / metrics["finetuned_exact_match"][0]

    if arguments.cuda_graphs:
        model.use_cuda_graphs(input_multiple=processor.max_prompt_length)
        if arguments.finetuned:
            writers["finetuned"] = autoregressive(decoder, processor, cache_implementation="static")
    metrics |= speed_metrics(writers, processor, examples, longest, arguments.rounds)
    metrics["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = model.slot_adapters.parameters() if model.slot_adapters is not None else []
    metrics["trained_parameters_in_slot_adapters"] = sum(p.numel() for p in adapters)
    metrics |= learning(run, arguments.result)
    write_answers(Path(arguments.result).with_suffix(".md"), examples, records)
    training, dtype = read_json(run / "metrics.json")["run"], str(model.decoder.dtype).removeprefix("torch.")
    content = report.result(
        command=arguments.command_line,
        model=f"{training['decoder']}, {dtype}, frozen; trained are slot adapters of rank "
        f"{model.config.slot_adapter_rank}, the predictor and the encoder ({training['encoder'] or 'none'})",
        revision=None,
        data=f"{len(examples)} commands of {arguments.data}; {training['train_examples']} others to train on",
        seed=training["seed"],
        metrics=metrics,
    )
    report.write_result(arguments.result, content, beside=", .png and .md (answers) beside it")


def speed_metrics(
    writers: dict[str, Writer], processor: ProtoGenProcessor, examples: list[Example], longest: int, rounds: int
) -> dict[str, float | list[float]]:
    """Milliseconds an answer and tokens a second of each, one command at a time, and how much faster one step is."""
    seconds = interleaved_seconds(
        {
            name: lambda number, write=write: write([examples[number % len(examples)].instruction], [None], longest)
            for name, write in writers.items()
        },
        rounds,
    )
    tokens = processor.encode_answers([e.answer for e in examples])["length_labels"].float().mean().item()
    metrics = {}
    for name, values in seconds.items():
        metrics[f"{name}_milliseconds_an_answer"] = 1000 * float(np.median(values))
        metrics[f"{name}_tokens_a_second"] = tokens / float(np.median(values))
        if name != "one_step":
            metrics[f"speedup_{name}"] = ratio_with_interval(values, seconds["one_step"])
    return metrics


def show(writers: dict[str, Writer], examples: list[Example], longest: int) -> None:
    """Prints each method's answers to commands, with their times."""
    for example in examples:
        print(f"\n> {example.instruction}")
        for name, write in writers.items():
            start = time.perf_counter()
            (answer,) = write([example.instruction], [example.context], longest).texts
            seconds = time.perf_counter() - start
            (right,) = exact_match([answer], [example.answer])
            print(f"{name.replace('_', ' '):>10} {1000 * seconds:5.0f} ms  {'right' if right else 'wrong'}  {answer}")
    print()


def named(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in metrics.items()}


@torch.no_grad()
def records_of(model, processor: ProtoGenProcessor, examples: list[Example]) -> pd.DataFrame:
    """One-step answers, `answer`, and all of their uncertainty scores, a row for each example."""
    rows = {}
    # Commands of like lengths side by side: little is padding.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].instruction))
    for first in tqdm(range(0, len(order), BATCH_SIZE), desc="one step"):
        part = order[first : first + BATCH_SIZE]
        inputs = processor([examples[row].instruction for row in part], [examples[row].context for row in part])
        output = model.generate(**inputs.to(model.device), return_dict_in_generate=True, output_uncertainty_scores=True)
        answers = processor.batch_decode(output.sequences)
        for at, row in enumerate(part):
            scores = {name: values[at].item() for name, values in output.uncertainty_scores.items()}
            rows[row] = {"answer": answers[at], **scores}
    return pd.DataFrame([rows[row] for row in range(len(examples))])


def one_of_each_kind(examples: list[Example], count: int) -> list[Example]:
    """The first examples of the categories in turn."""
    by_kind = pd.DataFrame({"kind": [e.category for e in examples]}).groupby("kind").cumcount()
    order = by_kind.sort_values(kind="stable").index[:count]
    return [examples[row] for row in order]


def foreign_questions(arguments, processor: ProtoGenProcessor) -> list[Example]:
    """Questions that are no commands, to be abstained from."""
    found = []
    for path in arguments.foreign:
        questions = [row.get("instruction") or row["question"] for row in read_lines(Path(path))]
        fitting = [question for question in questions if processor.fits(question)]
        found += [
            Example(question, question, "", '{"intent": "none"}') for question in fitting[: arguments.max_foreign]
        ]
    return found


def uncertainty_metrics(model, processor, run: Path, records: pd.DataFrame, references: list[str], foreign) -> dict:
    """
    How well uncertainty tells wrong answers from right ones: with a threshold that the held-out commands of training
    ask for, at the best one afterwards, and with foreign questions mixed in, every answer to which is wrong.
    """
    score = model.config.uncertainty_score
    right, uncertainties = exact_match(list(records["answer"]), references), records[score].to_numpy()
    metrics = {"auroc_wrong": ranking_metrics(right, uncertainties)["auroc_wrong"]}
    held_out = pd.read_csv(run / "answers.csv")
    coverage, precision = coverage_curve(right, uncertainties)
    number_right = max(right.sum(), 1)
    for wanted in (0.95, 0.99):
        percent = round(100 * wanted)
        reached = np.flatnonzero(precision >= wanted)
        last = reached[-1] if len(reached) else None
        metrics[f"coverage_at_{percent}_precision"] = 0.0 if last is None else float(coverage[last])
        kept = 0.0 if last is None else coverage[last] * precision[last] * len(right)
        metrics[f"kept_right_at_{percent}_precision"] = float(kept / number_right)
        threshold = threshold_for_accuracy(held_out["exact_match"], held_out[score], wanted)
        given = uncertainties <= (-np.inf if threshold is None else threshold)
        metrics[f"kept_right_at_threshold_for_{percent}"] = float(right[given].sum() / number_right)
        metrics[f"precision_at_threshold_for_{percent}"] = float(right[given].mean()) if given.any() else 1.0
    if foreign:
        asked = records_of(model, processor, foreign)[score].to_numpy()
        both = np.concatenate([uncertainties, asked])
        if right.any():
            errors = np.concatenate([1 - right, np.ones(len(asked))])
            metrics |= named("with_foreign", retention_metrics(errors, both, 0.5))
        is_command = np.repeat([1.0, 0.0], [len(right), len(asked)])
        metrics["auroc_foreign"] = ranking_metrics(is_command, both)["auroc_wrong"]
        metrics["foreign_questions"] = len(asked)
    return metrics


def learning(run: Path, result: str) -> dict[str, float]:
    """Exact match on held-out commands against the examples seen; draws it beside the result."""
    training = read_json(run / "metrics.json")
    batch = training["run"]["examples_a_step"]
    points = {entry["step"] * batch: entry["eval_exact_match"] for entry in training["log"] if "eval_loss" in entry}
    curves(
        {"one step": exact_points(points, points.values())},
        ("commands seen through the decoder", "exact match"),
        "Held-out commands",
        Path(result).with_suffix(".png"),
    )
    return {f"held_out_exact_match_after_{seen}_examples": value for seen, value in points.items()}


def write_answers(path: Path, examples: list[Example], records: pd.DataFrame, count: int = 20) -> None:
    """The first test commands with what was answered, and what should have been where that is wrong."""
    lines = ["| command | answer | right |", "| --- | --- | --- |"]
    right = exact_match(list(records["answer"]), [example.answer for example in examples])
    for example, answer, is_right in list(zip(examples, records["answer"], right, strict=True))[:count]:
        wanted = "yes" if is_right else f"no: `{example.answer}`"
        shown = answer.replace("\n", "\\n")
        lines.append(f"| {example.instruction} | `{shown}` | {wanted} |")
    path.write_text("\n".join(lines) + "\n")
