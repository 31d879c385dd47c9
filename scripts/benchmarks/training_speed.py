"""What a training step costs: tokens a second, use of the processor, and how much of the time is not the decoder's."""

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from embedded import decoder_revision
from tqdm import tqdm

from eval_tasks import report
from eval_tasks.latency import best_device, interleaved_seconds, synchronize
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.data import DataArguments, Example, ProtoGenCollator, load_examples
from trainers.prompt_store import PromptStore

# Dense bfloat16 operations a second, from the makers' data sheets.
DATA_SHEET_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def add_commands(commands) -> None:
    command = commands.add_parser("training-speed", help="tokens a second of a training step, and where its time goes")
    command.add_argument("--run", required=True, help="output_dir of a trained model, for its shape")
    command.add_argument("--data", default="scripts/data/dolly_sample.jsonl")
    command.add_argument("--batch-size", type=int, default=24)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--result", default="runs/training_speed.json")
    command.set_defaults(run_command=training_speed)


def now() -> float:
    synchronize()
    return time.perf_counter()


def peak_flops(device: torch.device) -> float:
    """
    Bfloat16 operations a second that the device can do: of the data sheet for known GPUs, of the fastest of ten large
    matrix products for others and for CPUs.
    """
    if device.type == "cuda":
        for name, flops in DATA_SHEET_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return flops
    size = 2048
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    seconds = interleaved_seconds({"product": lambda _: matrix @ matrix}, rounds=10)["product"]
    return 2 * size**3 / seconds.min()


@contextmanager
def decoder_clock(decoder) -> Iterator[dict[str, float]]:
    """Adds up the seconds of the decoder's body and head, and of the way back from its logits to its inputs."""
    body, head = decoder.base_model, decoder.get_output_embeddings()
    clock, started = {"forward": 0.0, "backward": 0.0}, {}

    def start(_, args, kwargs):
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and embeds.requires_grad:
            embeds.register_hook(leave)
        started["forward"] = now()

    def end(_, args, output):
        clock["forward"] += now() - started["forward"]
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(enter)

    def enter(_):
        started["backward"] = now()

    def leave(_):
        clock["backward"] += now() - started["backward"]

    hooks = [module.register_forward_pre_hook(start, with_kwargs=True) for module in (body, head)]
    hooks += [module.register_forward_hook(end) for module in (body, head)]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


def training_flops(model: ProtoGenForConditionalGeneration, batch: dict[str, torch.Tensor]) -> float:
    """
    Multiplications and additions of one step, two a weight and token and pass: the encoder forwards and back to its
    weights and inputs, the decoder over the prompt forwards, over the answer forwards and back to its inputs. Padding
    and attention itself are left out.
    """

    def weights(module):
        embeddings = module.get_input_embeddings().weight.numel()
        return sum(p.numel() for p in module.parameters()) - embeddings

    head = model.decoder.get_output_embeddings().weight.numel()
    body = weights(model.decoder.base_model)
    answer = (batch["labels"] != -100).sum().item()
    flops = 4 * (body + head) * answer
    if model.config.decoder_sees_prompt:
        flops += 2 * body * batch["decoder_prompt_mask"].sum().item()
    if model.encoder is not None:
        flops += 6 * weights(model.encoder) * batch["attention_mask"].sum().item()
    return flops


def timed_steps(
    model: ProtoGenForConditionalGeneration, collate: ProtoGenCollator, parts: list[list[Example]], warm_up: int
) -> dict[str, float]:
    """What a step for each of the parts costs, after the first `warm_up`; making its batch is a part of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    seconds, flops, tokens, prompt_tokens = [], 0, 0, 0
    with decoder_clock(model.decoder) as clock:
        for step, part in enumerate(tqdm(parts, desc="steps")):
            if step == warm_up:
                clock.update(forward=0.0, backward=0.0)
            began = now()
            batch = {name: value.to(model.device) for name, value in collate(part).items()}
            # As the recipes' `bf16: true`.
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= warm_up:
                seconds.append(now() - began)
                flops += training_flops(model, batch)
                tokens += (batch["labels"] != -100).sum().item()
                prompt_tokens += batch["decoder_prompt_mask"].sum().item()
    total = sum(seconds)
    return {
        "answer_tokens_per_second": tokens / total,
        "prompt_tokens_per_second": prompt_tokens / total if model.config.decoder_sees_prompt else 0.0,
        "milliseconds_a_step": 1000 * float(np.median(seconds)),
        "share_of_time_outside_the_decoder": 1 - sum(clock.values()) / total,
        "teraflops_per_second": flops / total / 1e12,
    }


def training_speed(arguments) -> None:
    """Where the decoder sees the prompt, also with prompts that a [`PromptStore`] has read before."""
    run = Path(arguments.run)
    if not (run / "metrics.json").is_file():
        raise FileNotFoundError(f"there is no trained model in {run}; train one first.")
    made_with = json.loads((run / "metrics.json").read_text())["run"]
    device = best_device()
    model = ProtoGenForConditionalGeneration.from_pretrained(run / "model").to(device)
    model.decoder.to(torch.bfloat16)
    model.train()
    collate = ProtoGenCollator(ProtoGenProcessor.from_pretrained(run / "model"))
    examples = [e for e in load_examples(DataArguments(data=arguments.data)) if collate.processor.fits(e.instruction)]
    parts = [examples[at : at + arguments.batch_size] for at in range(0, len(examples), arguments.batch_size)]
    warm_up = 2
    parts = list(islice(cycle(parts), warm_up + arguments.steps))
    figures = timed_steps(model, collate, parts, warm_up)
    figures["peak_teraflops_per_second"] = peak_flops(device) / 1e12
    figures["model_flops_utilisation"] = figures["teraflops_per_second"] / figures["peak_teraflops_per_second"]
    if model.config.decoder_sees_prompt:
        with tempfile.TemporaryDirectory() as folder:
            model.prompt_store = PromptStore(folder, model.decoder, model.config.layers_read)
            for batch in map(collate, parts):
                prompt = batch["decoder_prompt_ids"].to(device), batch["decoder_prompt_mask"].to(device)
                model.read_prompt(*prompt, model.config.layers_read)
            stored = timed_steps(model, collate, parts, warm_up)
        figures["milliseconds_a_step_with_stored_prompts"] = stored["milliseconds_a_step"]
    content = report.result(
        command=f"python scripts/benchmark.py {shlex.join(sys.argv[1:])}",
        model=f"{made_with['decoder']}, bfloat16; encoder {made_with['encoder']}",
        revision=decoder_revision(made_with["decoder"]),
        data=f"{arguments.steps} batches of {arguments.batch_size} examples of {arguments.data}",
        seed=0,
        figures=figures,
    )
    report.write_result(arguments.result, content)
