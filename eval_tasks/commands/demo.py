"""
Shows a trained model in the browser, beside its own decoder that writes token by token.

    protogen demo runs/embedded/model
    protogen demo org/name --host 0.0.0.0 --port 80

docs/demo.md says what is seen, and how the page becomes a Space on the Hub.
"""

import argparse
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import cached_file

from eval_tasks.commands.generate import prompt_of
from eval_tasks.demo.page import demo, launch
from eval_tasks.demo.racing import Question, answer_at_once
from trainers.decoders import add_loading_options, load_trained
from trainers.text_files import read_json_rows

NUM_EXAMPLES = 6


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="protogen demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or Hub id of a ProtoGen model")
    parser.add_argument(
        "--examples",
        help=".jsonl file of instructions to offer; by default those of the model's card, or of the validation.json "
        "that its training left beside it",
    )
    parser.add_argument("--host", help="0.0.0.0 for others than this machine (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    add_loading_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parsed(argv)
    model, processor = load_trained(arguments.model, arguments.dtype, arguments.decoder, arguments.fuse_adapters)
    examples = examples_of(arguments.model, arguments.examples)
    # The first answer pays for what is made once.
    answer_at_once(model, processor, Question("Hello", category=(model.config.categories or [None])[0]))
    page = demo(model, processor, arguments.model, examples)
    print(launch(page, server_name=arguments.host, server_port=arguments.port), flush=True)
    page.block_thread()


def examples_of(model: str, file: str | None) -> list[Question]:
    """
    Instructions to try: of a file, or else of the model's card, or else of what its training held out.

    Raises:
        FileNotFoundError, ValueError: if the file is missing or has no instructions.
    """
    held_out = Path(model).parent / "validation.json"
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"file of examples {file} does not exist.")
        rows = read_json_rows(file)
    else:
        rows = card_examples(model) or (read_json_rows(held_out) if held_out.is_file() else [])
    prompts = [prompt_of(row, where) for where, row in rows]
    # From all of a file, which may be sorted.
    chosen = prompts[:: max(1, len(prompts) // NUM_EXAMPLES)][:NUM_EXAMPLES]
    return [Question(prompt.instruction, prompt.context) for prompt in chosen]


def card_examples(model: str) -> list[tuple[str, dict[str, str]]]:
    """Those of a model's card, as rows of a file."""
    card = cached_file(model, "README.md", _raise_exceptions_for_missing_entries=False)
    if card is None:
        return []
    widget = ModelCard.load(card, ignore_metadata_errors=True).data.get("widget") or []
    return [(f"{card}, widget", {"instruction": example["text"]}) for example in widget if example.get("text")]
