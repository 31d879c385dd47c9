"""
Publishes a trained model on the Hub: code, weights, processor, generation config, and a card that is made of what lies
beside the model (metrics.json) and of result files.

    protogen push runs/snips org/snips --full
    protogen push runs/pythia-160m org/pythia --revision v2
    protogen push runs/snips org/snips --full --result results/snips.json exact_match slot_f1 --example "Play some jazz"
"""

import argparse
from pathlib import Path

from huggingface_hub import EvalResult
from transformers import AutoModelForCausalLM

from eval_tasks.report import markdown_table, read_result
from modeling_protogen import ProtoGenConfig
from modeling_protogen.publishing import MODEL_FILES, eval_result, model_card, pin_decoder, publish
from trainers.decoders import load_processor_of, load_protogen
from trainers.embedded import HUB_NAMES
from trainers.text_files import read_json


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output_dir of a training, or folder of a model")
    parser.add_argument("repo_id", help="where it goes: org/name")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--thin", action="store_true", default=None, help="leave the frozen decoder out")
    weights.add_argument("--full", action="store_false", dest="thin", help="all weights; as it was saved by default")
    parser.add_argument("--revision", help="branch; made if it is missing")
    parser.add_argument("--decoder", help="Hub id of the decoder to load with the model, and to name in it")
    parser.add_argument("--license", help="licence, as the Hub spells it; the decoder's by default")
    parser.add_argument(
        "--result",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "METRIC"),
        help="result file for the card, and which of its metrics are this model's; all by default",
    )
    parser.add_argument("--example", action="append", default=[], help="instruction for the card to try")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parsed(argv)
    folder = arguments.folder / "model" if (arguments.folder / "model").is_dir() else arguments.folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no model in {arguments.folder}: config.json is missing.")
    results, tables = chosen_results(arguments.result)
    metrics_path = (folder.parent if folder.name == "model" else folder) / "metrics.json"
    training = read_json(metrics_path) if metrics_path.is_file() else {"run": {}, "after": None}
    run = training["run"]

    config = ProtoGenConfig.from_pretrained(folder)
    was_thin, thin = config.thin, config.thin if arguments.thin is None else arguments.thin
    if arguments.decoder:
        config.decoder_name_or_path, config.decoder_revision = arguments.decoder, None
    if thin:
        pin_decoder(config, arguments.private)
    model = load_protogen(folder, str(config.dtype).removeprefix("torch."), arguments.decoder)
    processor = load_processor_of(folder, arguments.decoder)
    if arguments.decoder and not was_thin:  # It has been loaded with its own.
        model.attach_decoder(AutoModelForCausalLM.from_pretrained(arguments.decoder, dtype=model.dtype))
    model.config.decoder_name_or_path = config.decoder_name_or_path
    model.config.decoder_revision = config.decoder_revision
    if run.get("encoder_learning_rate") == 0 and model.encoder is not None:
        model.encoder.requires_grad_(False)
    decoder = arguments.decoder or run.get("decoder") or config.decoder_name_or_path
    encoder = run.get("encoder")

    def write(target: Path, repo_id: str) -> None:
        model.save_pretrained(target, thin=thin)
        processor.save_pretrained(target)
        model_card(
            model,
            repo_id,
            thin,
            decoder=HUB_NAMES.get(decoder, decoder),
            encoder=HUB_NAMES.get(encoder, encoder),
            license=arguments.license,
            run=run,
            held_out=training["after"],
            results=results,
            tables=tables,
            examples=arguments.example,
            answers_json=processor.answer_format == "key_value_lines",
        ).save(target / "README.md")

    message = f"{'Thin' if thin else 'Full'} model from protogen push"
    options = {"private": arguments.private, "revision": arguments.revision}
    done = publish(write, arguments.repo_id, message=message, replaces=MODEL_FILES, **options)
    print(f"{done.commit_url}\nAutoModel.from_pretrained({arguments.repo_id!r}, trust_remote_code=True, "
          f"revision={done.oid!r})")  # fmt: skip


def chosen_results(choices: list[list[str]]) -> tuple[list[EvalResult], list[str]]:
    """
    Of result files the metrics that are asked for: for a card's metadata, and as tables.

    Raises:
        ValueError: if a file is no result file or has no such metric.
    """
    results, tables = [], []
    for path, *names in choices:
        content = read_result(path)
        metrics = content["metrics"]
        unknown = [name for name in names if name not in metrics]
        if unknown:
            raise ValueError(f"{path} has no metric {unknown[0]}; it has {', '.join(metrics)}.")
        metrics = {name: metrics[name] for name in names or metrics}
        for name, value in metrics.items():
            # With its interval in the table alone.
            results.append(eval_result(name, value[0] if isinstance(value, list) else value, content["data"]))
        tables.append(markdown_table(content | {"metrics": metrics}))
    return results, tables
