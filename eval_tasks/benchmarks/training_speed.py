"""What a training step costs: tokens a second, use of the processor, and how much of the time is not the decoder's."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from eval_tasks import report
from eval_tasks.latency import interleaved_seconds
from modeling_protogen import ProtoGenConfig, ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.anchors import even_anchors, labels_behind
from modeling_protogen.objectives import IGNORE_INDEX
from trainers.data import DataArguments, Example, ProtoGenCollator, load_examples
from trainers.devices import best_device, synchronize
from trainers.embedded import decoder_revision
from trainers.losses import needs_of
from trainers.prompt_store import PromptStore
from trainers.protogen_trainer import ProtoGenTrainer
from trainers.text_files import read_json
from trainers.training_args import ProtoGenTrainingArguments

# Dense bfloat16 operations a second, from the makers' data sheets.
DATA_SHEET_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
# Tokens of answers behind whose places drafts are learned, at most, and how many drafts of each.
DRAFTED_ANSWER, ANCHORS = 128, 32


def add_commands(commands) -> None:
    command = commands.add_parser("training-speed")
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
    answer = (batch["labels"] != IGNORE_INDEX).sum().item()
    flops = 4 * (body + head) * answer
    if model.config.decoder_sees_prompt:
        flops += 2 * body * batch["decoder_prompt_mask"].sum().item()
    if model.encoder is not None:
        flops += 6 * weights(model.encoder) * batch["attention_mask"].sum().item()
    return flops


class StepClock(TrainerCallback):
    """
    When each step ended; clears the decoder's clock after the first `warm_up`.

    Args:
        decoder_seconds (`dict[str, float]`): of [`decoder_clock`].
        warm_up (`int`): steps that do not count.
    """

    def __init__(self, decoder_seconds: dict[str, float], warm_up: int):
        self.decoder_seconds, self.warm_up, self.ends = decoder_seconds, warm_up, []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(now())
        if state.global_step == self.warm_up:
            self.decoder_seconds.update(forward=0.0, backward=0.0)


def timed_steps(
    run: Path,
    examples: list[Example],
    losses: dict[str, float],
    batch_size: int,
    warm_up: int,
    stores_prompts: bool = False,
    num_anchors: int = 0,
) -> dict:
    """
    What a step of the trainer costs with these losses, batch after batch of the examples, after the first `warm_up`;
    making its batch is a part of it. With `stores_prompts` a [`PromptStore`] has read all prompts before. With
    `num_anchors` the steps learn drafts, and the tokens are those drafted.
    """
    model = ProtoGenForConditionalGeneration.from_pretrained(run / "model").to(best_device())
    model.decoder.to(torch.bfloat16)
    processor = ProtoGenProcessor.from_pretrained(run / "model")
    if num_anchors:
        processor.max_answer_length = DRAFTED_ANSWER
    collate = ProtoGenCollator(processor, model.config.categories, finds_durations="durations" in needs_of(losses))
    batches = [collate(examples[at : at + batch_size]) for at in range(0, len(examples), batch_size)]
    with tempfile.TemporaryDirectory() as folder, decoder_clock(model.decoder) as decoder_seconds:
        if stores_prompts:
            model.prompt_store = PromptStore(Path(folder) / "prompts", model.decoder, model.config.layers_read)
            for batch in batches:
                prompt = batch["decoder_prompt_ids"].to(model.device), batch["decoder_prompt_mask"].to(model.device)
                model.read_prompt(*prompt, model.config.layers_read)
        clock = StepClock(decoder_seconds, warm_up)
        arguments = ProtoGenTrainingArguments(
            output_dir=folder,
            max_steps=len(batches),
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="sequential",
            losses=losses,
            num_anchors=num_anchors,
            bf16=True,
            save_strategy="no",
            logging_strategy="no",
        )
        trainer = ProtoGenTrainer(
            model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[clock]
        )
        trainer.train()
    seconds, timed = np.diff(clock.ends[warm_up - 1 :]), batches[warm_up:]
    if num_anchors:
        labels = [batch["labels"] for batch in timed]
        drafted = [labels_behind(each, even_anchors(each, num_anchors), model.config.draft_length) for each in labels]
        tokens = sum((each != IGNORE_INDEX).sum().item() for each in drafted)
        return {"drafted_tokens_per_second": tokens / seconds.sum()}
    tokens = sum((batch["labels"] != IGNORE_INDEX).sum().item() for batch in timed)
    prompt_tokens = sum(
        batch["decoder_prompt_mask"].sum().item() for batch in timed if model.config.decoder_sees_prompt
    )
    return {
        "answer_tokens_per_second": tokens / seconds.sum(),
        "prompt_tokens_per_second": prompt_tokens / seconds.sum(),
        "milliseconds_a_step": 1000 * float(np.median(seconds)),
        "share_of_time_outside_the_decoder": 1 - sum(decoder_seconds.values()) / seconds.sum(),
        "teraflops_per_second": sum(training_flops(model, batch) for batch in timed) / seconds.sum() / 1e12,
    }


def training_speed(arguments) -> None:
    """
    Where the decoder sees the prompt, also with prompts that a [`PromptStore`] has read before; of a model that drafts,
    with many anchors in an answer beside one in each of four times as many answers.
    """
    run = Path(arguments.run)
    if not (run / "metrics.json").is_file():
        raise FileNotFoundError(f"there is no trained model in {run}; train one first.")
    made_with = read_json(run / "metrics.json")["run"]
    losses = made_with["losses"]
    if needed := needs_of(losses) & {"bank", "embeddings"}:
        raise ValueError(f"{run} learned with {', '.join(losses)}, and the benchmark has no {' and '.join(needed)}.")
    config = ProtoGenConfig.from_pretrained(run / "model")
    processor, warm_up, size = ProtoGenProcessor.from_pretrained(run / "model"), 2, arguments.batch_size
    examples = [e for e in load_examples(DataArguments(data=arguments.data)) if processor.fits(e.instruction)]
    examples = list(islice(cycle(examples), 4 * (warm_up + arguments.steps) * size))
    some = examples[: len(examples) // 4]
    if config.first_tokens == "drafts":
        packed = timed_steps(run, some, losses, size, warm_up, num_anchors=ANCHORS)["drafted_tokens_per_second"]
        alone = timed_steps(run, examples, losses, 4 * size, warm_up, num_anchors=1)["drafted_tokens_per_second"]
        metrics = {f"drafted_tokens_per_second_{ANCHORS}_anchors": packed, "drafted_tokens_per_second_1_anchor": alone}
        metrics["times_one_anchor"] = packed / alone
    else:
        metrics = timed_steps(run, some, losses, size, warm_up)
        metrics["peak_teraflops_per_second"] = peak_flops(best_device()) / 1e12
        metrics["model_flops_utilisation"] = metrics["teraflops_per_second"] / metrics["peak_teraflops_per_second"]
        if config.decoder_sees_prompt:
            stored = timed_steps(run, some, losses, size, warm_up, stores_prompts=True)
            metrics["milliseconds_a_step_with_stored_prompts"] = stored["milliseconds_a_step"]
    content = report.result(
        command=arguments.command_line,
        model=f"{made_with['decoder']}, bfloat16; encoder {made_with['encoder'] or 'none'}; losses {', '.join(losses)}",
        revision=decoder_revision(made_with["decoder"]),
        data=f"{arguments.steps} batches of {arguments.batch_size} examples of {arguments.data}",
        seed=0,
        metrics=metrics,
    )
    report.write_result(arguments.result, content)
