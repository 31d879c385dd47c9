"""One pass against token by token: latency, throughput and memory."""

import random
import time
from collections import defaultdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from tqdm import tqdm

from eval_tasks import report
from eval_tasks.baselines.autoregressive import autoregressive, prompt_lookup
from eval_tasks.baselines.one_pass import protogen
from eval_tasks.baselines.writing import Writer
from eval_tasks.latency import interleaved_seconds, peak_gigabytes, ratio_with_interval
from eval_tasks.plots import curves, lines
from eval_tasks.statistics import mean_with_interval
from eval_tasks.text_metrics import rouge_l
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.data import DataArguments, Example, held_out_of, load_examples
from trainers.devices import best_device
from trainers.embedded import decoder_revision, resolve


def add_commands(commands) -> None:
    command = commands.add_parser("decode")
    command.add_argument("--encoder", default="embedded:minilm-l6")
    command.add_argument("--decoder", default="embedded:smollm2-135m")
    command.add_argument("--dtype", default="bfloat16")
    command.add_argument("--data", default="scripts/data/dolly_sample.jsonl")
    command.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128, 256, 512], help="at batch size 1")
    command.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64], help="at --batch-tokens")
    command.add_argument("--batch-tokens", type=int, default=64)
    command.add_argument("--rounds", type=int, default=9)
    command.add_argument("--soak-calls", type=int, default=1000)
    command.add_argument("--trained", help="folder or Hub id of a trained model: its quality against its speed")
    command.add_argument("--quality-prompts", type=int, default=40, help="held out, at --batch-tokens")
    command.add_argument("--result", default="runs/benchmark_decode.json", help="plots and a .csv are beside it")
    command.set_defaults(run_command=decode)


def decode(arguments) -> None:
    device = best_device()
    processor, model, sees_prompt = untrained(arguments, device)
    trained = None
    if arguments.trained:
        dtype = getattr(torch, arguments.dtype)
        trained = ProtoGenForConditionalGeneration.from_pretrained(arguments.trained, dtype=dtype).to(device).eval()
    examples = [e for e in load_examples(DataArguments(data=arguments.data)) if not e.context]
    prompts = [e.instruction for e in examples]
    static = {"cache_implementation": "static"} if device.type == "cuda" else {}
    greedy = autoregressive(model.decoder, processor, **static)
    one_step, with_prompt = protogen(model, processor), protogen(sees_prompt, processor)

    writers = {
        "one_step": one_step,
        "one_step_with_prompt": with_prompt,
        "greedy": greedy,
        "bare_forward": bare_forward(model.decoder, processor, reads_prompt=False),
        "bare_forward_with_prompt": bare_forward(model.decoder, processor, reads_prompt=True),
    }

    rows, metrics = timed_cells(writers, prompts, arguments)
    largest = [prompts[at % len(prompts)] for at in range(max(arguments.batch_sizes))]
    for name in ("one_step", "one_step_with_prompt", "greedy"):
        metrics[f"{name}_peak_memory_gb_{arguments.batch_tokens}_batch_{len(largest)}"] = peak_gigabytes(
            lambda write=writers[name]: write(largest, [None] * len(largest), arguments.batch_tokens, exactly=True)
        )
    if arguments.soak_calls:
        modes = {mode: protogen(sees_prompt, processor, mode) for mode in ("one_step", "adaptive", "verified")}
        metrics |= soak(
            modes | {"one_step_without_prompt": one_step}, prompts, min(arguments.lengths), arguments.soak_calls
        )

    path = Path(arguments.result)
    model_name = f"{arguments.encoder}, {arguments.decoder}, {arguments.dtype}; heads untrained"
    if trained is not None:
        metrics |= quality_metrics(trained, examples, arguments, path.with_name(f"{path.stem}_quality.png"))
        model_name += f", but for quality: {arguments.trained}"
    content = report.result(
        command=arguments.command_line,
        model=model_name,
        revision=decoder_revision(arguments.decoder),
        data=f"instructions of {arguments.data} without context",
        seed=0,
        metrics=metrics,
    )
    report.write_csv(path.with_suffix(".csv"), rows)
    plot(pd.DataFrame(rows), arguments.batch_tokens, path)
    report.write_result(path, content, beside=", .csv and plots beside it")


def timed_cells(writers: dict[str, Writer], prompts: list[str], arguments) -> tuple[list[dict], dict]:
    """A row for each call of each writer, and speeds, at each length and each batch size."""
    rows, metrics = [], {}
    cells = [(1, length) for length in arguments.lengths]
    cells += [(size, arguments.batch_tokens) for size in arguments.batch_sizes]
    for batch, length in dict.fromkeys(cells):
        print(f"{batch} at a time, {length} tokens")
        seconds = cell_seconds(writers, prompts, batch, length, arguments.rounds)
        for name, values in seconds.items():
            for value in values:
                rows.append({"method": name, "batch": batch, "tokens": length, "milliseconds": 1000 * value})
        suffix = f"{length}" if batch == 1 else f"{length}_batch_{batch}"
        metrics |= {f"{name}_{suffix}": value for name, value in speed_metrics(seconds, batch * length).items()}
    return rows, metrics


def untrained(
    arguments, device: torch.device
) -> tuple[ProtoGenProcessor, ProtoGenForConditionalGeneration, ProtoGenForConditionalGeneration]:
    """
    A processor, a model, and one whose decoder sees the prompt. Heads are fresh: how long a pass takes does not depend
    on what they have learned.
    """
    names = resolve(arguments.encoder), resolve(arguments.decoder)
    longest, dtype = max(*arguments.lengths, arguments.batch_tokens), getattr(torch, arguments.dtype)
    models = [
        ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
            *names, encoder_dtype=dtype, decoder_dtype=dtype, chunk_size=longest, decoder_sees_prompt=sees
        )
        .to(device)
        .eval()
        for sees in (False, True)
    ]
    if device.type == "cuda":
        for model in models:
            # One shape of inputs, so that nothing is recorded while it is timed.
            model.use_cuda_graphs([*arguments.lengths, arguments.batch_tokens], input_multiple=128)
    return ProtoGenProcessor.from_encoder_decoder_pretrained(*names, max_answer_length=longest), *models


def bare_forward(decoder, processor: ProtoGenProcessor, reads_prompt: bool) -> Writer:
    """The decoder alone over some tokens, with logits where answers would be: what one pass costs at least."""

    @torch.no_grad()
    def write(instructions, contexts, tokens, exactly):
        ids = torch.zeros(len(instructions), tokens, dtype=torch.long, device=decoder.device)
        prompt = ids[:, :0]
        if reads_prompt:
            prompt = processor(instructions, contexts)["decoder_prompt_ids"].to(decoder.device)
        places = torch.arange(prompt.shape[1] + tokens, device=decoder.device)
        is_answer = places.expand(len(ids), -1) >= prompt.shape[1]
        decoder(torch.cat([prompt, ids], dim=1), use_cache=False, logits_to_keep=is_answer)

    return write


def speed_metrics(seconds: dict[str, np.ndarray], num_tokens: int) -> dict[str, float | list[float]]:
    """How methods that write `num_tokens` tokens compare, from their seconds `(rounds,)`."""
    greedy, with_prompt = seconds["greedy"], seconds["one_step_with_prompt"]
    metrics = {
        "one_step_speedup": ratio_with_interval(greedy, seconds["one_step"]),
        "one_step_with_prompt_speedup": ratio_with_interval(greedy, with_prompt),
        "one_step_share_of_bare_forward": ratio_with_interval(seconds["bare_forward_with_prompt"], with_prompt),
        "bare_forward_speedup": ratio_with_interval(greedy, seconds["bare_forward"]),
    }
    for name, values in seconds.items():
        for quantile in (50, 90):
            metrics[f"{name}_milliseconds_p{quantile}"] = 1000 * float(np.percentile(values, quantile))
        metrics[f"{name}_tokens_per_second"] = num_tokens / float(np.median(values))
    return metrics


def cell_seconds(
    writers: dict[str, Writer], prompts: list[str], batch: int, length: int, rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of each way to write `batch` answers of `length` tokens, `(rounds,)`."""

    def call(write, number):
        texts = list(islice(cycle(prompts), number * batch, (number + 1) * batch))
        return write(texts, [None] * batch, length, exactly=True)

    return interleaved_seconds({name: partial(call, write) for name, write in writers.items()}, rounds=rounds)


def quality_metrics(
    model: ProtoGenForConditionalGeneration, examples: list[Example], arguments, plot_path: Path
) -> dict[str, float | list[float]]:
    """The quality of a trained model's modes on instructions that it has not learned from, which it draws too."""
    processor = ProtoGenProcessor.from_pretrained(arguments.trained)
    unknown = held_out_of(examples, model.config.validation_share)
    held_out = [e for e in unknown if processor.fits(e.instruction)][: arguments.quality_prompts]
    measured = quality(model, processor, held_out, arguments.batch_tokens)
    draw_quality(measured, plot_path)
    metrics = {f"{name}_{figure}": value for name, found in measured.items() for figure, value in found.items()}
    return metrics | {"quality_prompts": len(held_out)}


def quality(
    model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor, examples: list[Example], tokens: int
) -> dict[str, dict[str, list[float]]]:
    """
    Answers of a trained model in each of its modes, beside its decoder's, one prompt at a time: ROUGE-L with human
    answers and seconds an answer, with intervals. `NAME@SETTING` is a mode with a confidence threshold, or a number of
    refinements.
    """
    writers = {
        "greedy": autoregressive(model.decoder, processor),
        "prompt_lookup": prompt_lookup(model.decoder, processor),
        "one_step": protogen(model, processor),
        **{f"refine@{k}": protogen(model, processor, "refine", num_refinements=k) for k in (1, 2, 4)},
        **{f"adaptive@{p}": protogen(model, processor, "adaptive", confidence_threshold=p) for p in (0.3, 0.6, 0.9)},
        "verified": protogen(model, processor, "verified"),
    }
    answers = {}

    def call(name, number):
        example = examples[number % len(examples)]
        answers[name, example.id] = writers[name]([example.instruction], [""], tokens).texts[0]

    seconds = interleaved_seconds({name: partial(call, name) for name in writers}, rounds=len(examples))
    references = [example.answer for example in examples]
    return {
        name: {
            "rouge_l": mean_with_interval(rouge_l([answers[name, e.id] for e in examples], references)),
            "seconds_an_answer": mean_with_interval(seconds[name]),
        }
        for name in writers
    }


def draw_quality(measured: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A point for each way to write, a line through those that differ in a setting alone."""
    points = defaultdict(list)
    for name, metrics in measured.items():
        mean, low, high = metrics["seconds_an_answer"]
        points[name.split("@")[0]].append(([1 / mean, 1 / high, 1 / low], metrics["rouge_l"]))
    curves(points, ("answers a second", "ROUGE-L"), "Quality against speed, one prompt at a time", path, log_x=True)


def soak(writers: dict[str, Writer], prompts: list[str], longest: int, calls: int) -> dict[str, float]:
    """
    Mixed calls in a row, the later half the same as the earlier, so that no shape is new: by how much the process's
    memory grows from then on, and the time of a call over that of the first time.
    """
    rng, process, rows = random.Random(0), psutil.Process(), []
    for _ in range(-(-calls // 2)):
        size, length = rng.choice((1, 2)), rng.choice((longest, max(1, longest // 4)))
        rows.append((rng.choice(list(writers)), rng.sample(prompts, size), length))
    seconds = []
    for call, (name, batch, length) in enumerate(tqdm(rows + rows, desc="soak", unit="call")):
        if call == len(rows):
            before = process.memory_info().rss
        start = time.perf_counter()
        writers[name](batch, [None] * len(batch), length, exactly="one_step" in name)
        seconds.append(time.perf_counter() - start)
    early, late = np.split(np.array(seconds), 2)
    return {
        f"memory_growth_megabytes_{calls}_calls": (process.memory_info().rss - before) / 1e6,
        f"late_over_early_time_{calls}_calls": float(np.median(late / early)),
    }


def plot(rows: pd.DataFrame, batch_tokens: int, path: Path) -> None:
    """Latency against length at batch size 1, throughput against batch size."""
    axes = {"line": "method", "log2": True}
    alone = rows[rows["batch"] == 1]
    lines(
        alone.assign(seconds=alone["milliseconds"] / 1000),
        "tokens",
        "seconds",
        "prompt in, text out",
        path.with_name(f"{path.stem}_latency.png"),
        log_y=True,
        **axes,
    )
    together = rows[rows["tokens"] == batch_tokens]
    rate = 1000 * together["batch"] * together["tokens"] / together["milliseconds"]
    lines(
        together.assign(tokens_per_second=rate),
        "batch",
        "tokens_per_second",
        f"{batch_tokens} tokens an answer, prompt in, text out",
        path.with_name(f"{path.stem}_throughput.png"),
        log_y=True,
        **axes,
    )
