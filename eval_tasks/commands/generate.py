"""
Answers instructions, each batch in one pass of the decoder, or in another mode.

    protogen generate runs/embedded/model "Name three birds that cannot fly."
    protogen generate org/protogen-pythia-1b --file prompts.jsonl --json > answers.jsonl
    cat prompts.txt | protogen generate runs/embedded/model
    protogen generate runs/embedded/model "Name three birds." --mode verified --max-new-tokens 128 --stream

A `.jsonl` file has `instruction` and, if any, `context`; any other file and standard input have one instruction a line.
A line that cannot be answered is named on standard error, and the exit code is 1 then; the others are answered.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import TextStreamer

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.configuration_protogen import category_id
from modeling_protogen.generation_protogen import MODES, SAMPLING, ProtoGenGenerateOutput
from trainers.decoders import add_loading_options, load_trained
from trainers.text_files import json_object, numbered_lines, parse_json, read_text, text_of


@dataclass
class PromptLine:
    """One of a file or of standard input; `where` is its file and line."""

    where: str
    instruction: str
    context: str


def read_prompts(arguments) -> tuple[list[PromptLine], list[str]]:
    """
    Prompts of a file or of standard input, and what is wrong with the other lines.

    Raises:
        FileNotFoundError, ValueError: if there is nothing to read.
    """
    if arguments.file is None:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, with --file, or on standard input.")
        name, text = "standard input", sys.stdin.read().removeprefix("\ufeff")
    else:
        name = arguments.file
        if not Path(name).is_file():
            raise FileNotFoundError(f"prompt file {name} does not exist, or is a folder.")
        text = read_text(name)
    is_json = Path(name).suffix.lower() == ".jsonl"
    prompts, problems = [], []
    for where, line in numbered_lines(text, name):
        try:
            row = json_object(parse_json(line, where), where) if is_json else {"instruction": line}
            prompts.append(prompt_of(row, where))
        except ValueError as error:
            problems.append(str(error))
    if not prompts and not problems:
        raise ValueError(f"{name} has no prompts.")
    return prompts, problems


def prompt_of(row: dict, where: str) -> PromptLine:
    instruction, context = (text_of(row.get(name), f"{where}: {name}") for name in ("instruction", "context"))
    if not instruction.strip():
        raise ValueError(f"{where}: instruction is missing or empty.")
    return PromptLine(where, instruction, context)


def fitting_prompts(prompts: list[PromptLine], processor: ProtoGenProcessor) -> tuple[list[PromptLine], list[str]]:
    """The prompts that the processor takes, and what it says of the others."""
    taken, problems = [], []
    for prompt in prompts:
        try:
            processor([prompt.instruction], [prompt.context])
            taken.append(prompt)
        except ValueError as error:
            problems.append(f"{prompt.where}: {error}")
    return taken, problems


def measures_of(output: ProtoGenGenerateOutput, row: int) -> dict[str, float]:
    """What `generate` says of one answer, besides its text."""
    metrics = {"tokens": output.lengths, "predicted_length": output.predicted_lengths}
    metrics |= {"length_sigma": output.length_sigmas, "confidence": output.confidences}
    metrics |= {"uncertainty": output.uncertainties, "abstained": output.abstained}
    metrics |= {"accepted_length": output.accepted_lengths}
    return {name: round(values[row].item(), 4) for name, values in metrics.items() if values is not None}


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="folder or Hub id of a ProtoGen model")
    parser.add_argument("prompt", nargs="?", help="instruction")
    parser.add_argument("--context", help="text that the instruction speaks of")
    parser.add_argument("--file", help="file of prompts")
    parser.add_argument("--category", help="category, for a model with one m for each")
    parser.add_argument("--retrieve", metavar="BANK", help="write the banked text whose proto-tokens are the nearest")
    parser.add_argument("--stream", action="store_true", help="print tokens as they are written")
    # What is not given is left to the model, and so is what does not go with the mode.
    option = partial(parser.add_argument, default=argparse.SUPPRESS)
    option("--mode", choices=list(MODES), help="how answers are written; one_step if the model says nothing else")
    option("--temperature", type=float, help="draw tokens with logits divided by this")
    option("--top-k", type=int, help="draw among this many of the most likely tokens, 50 by default; 0 for all")
    option("--top-p", type=float, help="draw among the most likely tokens that have this probability together")
    option("--length", type=int, help="one_step, refine: tokens to write, instead of the predicted length")
    option("--num-length-sigmas", type=float, help="one_step, refine: lengthen the prediction by this many σ")
    option("--abstain-above", type=float, help="one_step, refine: give no answer that is more uncertain")
    option("--num-candidates", type=int, help="one_step: answers of which the decoder chooses")
    option("--num-refinements", type=int, help="refine: passes over the draft")
    option("--confidence-threshold", type=float, help="refine, adaptive: probability of a sure token")
    option("--max-new-tokens", type=int, help="tokens at most")
    option("--block-size", type=int, help="adaptive, verified: tokens of a draft at most")
    parser.add_argument("--seed", type=int, help="draw the same tokens again")
    parser.add_argument("--batch-size", type=int, default=16)
    add_loading_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size {arguments.batch_size} must be at least 1.")
    if arguments.prompt is not None and arguments.file is not None:
        raise ValueError(
            f"there is a prompt, {arguments.prompt[:60]!r}, and --file {arguments.file}: give one of them."
        )
    if arguments.stream and arguments.json:
        raise ValueError("--stream prints text as it is written and --json whole objects: choose one of them.")
    return arguments


def main(argv: list[str]) -> None:
    arguments = parsed(argv)
    if arguments.prompt is None:
        prompts, problems = read_prompts(arguments)
    else:
        prompts, problems = [prompt_of(vars(arguments) | {"instruction": arguments.prompt}, "the prompt")], []
    model, processor = load_trained(arguments.model, arguments.dtype, arguments.decoder, arguments.fuse_adapters)
    if arguments.stream and processor.answer_format != "text":
        raise ValueError("this model's answers become JSON when they are whole: leave out --stream.")
    if arguments.prompt is None:
        prompts, refused = fitting_prompts(prompts, processor)
        problems += refused
    for problem in problems:
        print(f"not answered: {problem}", file=sys.stderr)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    answer(arguments, model, processor, prompts)
    if problems:
        sys.exit(f"error: {len(problems)} of {len(prompts) + len(problems)} prompts were not answered, see above.")


def answer(
    arguments: argparse.Namespace,
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    prompts: list[PromptLine],
) -> None:
    """Prints the answers, batch after batch."""
    device = model.device
    names = {"mode", "max_new_tokens", *SAMPLING}.union(*(mode.options for mode in MODES.values()))
    options = {name: value for name, value in vars(arguments).items() if name in names}
    if SAMPLING.keys() & options.keys():
        options["do_sample"] = True
    options["processor"] = processor
    retrieve = None
    if arguments.retrieve:  # Needs more than answering does.
        from eval_tasks.nearest_banked import NearestBanked, ProtoTokenBank

        retrieve = NearestBanked(model, ProtoTokenBank(arguments.retrieve))
    batch_size = arguments.batch_size
    if arguments.stream:
        batch_size = 1
        options["streamer"] = TextStreamer(processor.decoder_tokenizer, skip_prompt=True, skip_special_tokens=True)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        began = time.perf_counter()
        inputs = processor([p.instruction for p in batch], [p.context for p in batch]).to(device)
        if arguments.category is not None:
            index = category_id(arguments.category, model.config.categories or [])
            inputs["category_ids"] = torch.full((len(batch),), index, device=device)
        if retrieve is not None:
            options["proto_tokens"], options["length"] = retrieve(inputs)
        output = model.generate(**inputs, return_dict_in_generate=True, **options)
        answers = processor.batch_decode(output.sequences)
        milliseconds = 1000 * (time.perf_counter() - began) / len(batch)
        for row, (prompt, answer) in enumerate(zip(batch, answers, strict=True)):
            metrics = measures_of(output, row) | {"milliseconds": round(milliseconds, 1)}
            if arguments.json:
                report = {"instruction": prompt.instruction, "answer": answer, **metrics}
                print(json.dumps(report, ensure_ascii=False))
            else:
                if len(prompts) > 1:
                    print(f"> {prompt.instruction}")
                if not arguments.stream:
                    print(answer)
                words = [f"{name.replace('_', ' ')} {value:g}" for name, value in metrics.items()]
                print(f"[{', '.join(words)}]\n")
        sys.stdout.flush()
