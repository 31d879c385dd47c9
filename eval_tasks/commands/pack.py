"""
Packs a trained run to go with the repository: its model in bfloat16 and what tells how it was made. The frozen decoder,
the encoder's word embeddings, which are frozen too, and a copy of the code are left out.

    protogen pack runs/snips scripts/data/snips_smollm2_135m
"""

import shutil
from pathlib import Path

import torch
from transformers import AutoModel, HfArgumentParser

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.loading import load_weights
from trainers.embedded import resolve
from trainers.files import written_aside
from trainers.text_files import read_json


def main(arguments: list[str]) -> None:
    parser = HfArgumentParser([], description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a training")
    parser.add_argument("folder", type=Path, help="where the packed run goes; must not exist")
    arguments = parser.parse_args(arguments)
    if arguments.folder.exists():
        raise FileExistsError(f"{arguments.folder} exists; remove it, or give another folder.")
    if not (arguments.run / "metrics.json").is_file():
        raise FileNotFoundError(f"{arguments.run} is no output_dir of a finished training: it has no metrics.json.")
    metrics = read_json(arguments.run / "metrics.json")
    model = ProtoGenForConditionalGeneration.from_pretrained(arguments.run / "model")
    # The names that the recipe has, which are the same on every machine.
    model.config.decoder_name_or_path = metrics["run"]["decoder"]
    model.config.decoder_config._name_or_path = metrics["run"]["decoder"]
    if model.config.uses_encoder:
        leave_word_embeddings_out(model, metrics["run"]["encoder"])
    with written_aside(arguments.folder) as folder:
        model.to(torch.bfloat16).save_pretrained(folder / "model", thin=True)
        processor = ProtoGenProcessor.from_pretrained(arguments.run / "model")
        processor.save_pretrained(folder / "model")
        for path in (folder / "model").glob("*.py"):
            path.unlink()  # Beside this repository's code a copy of it would only grow old.
        # The tokenizers come with the encoder and the decoder.
        shutil.rmtree(folder / "model" / "decoder_tokenizer")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / "model" / name).unlink(missing_ok=True)
        for name in ("metrics.json", "answers.csv"):
            shutil.copy(arguments.run / name, folder / name)
    megabytes = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file()) / 1e6
    print(f"{arguments.folder}: {megabytes:.1f} MB")


def leave_word_embeddings_out(model: ProtoGenForConditionalGeneration, encoder: str) -> None:
    """
    Raises:
        ValueError: if they are not those of the encoder that the training began with.
    """
    theirs = load_weights(AutoModel.from_pretrained, resolve(encoder)).get_input_embeddings().weight
    if not torch.equal(theirs, model.encoder.get_input_embeddings().weight):
        raise ValueError(f"the model's word embeddings are not those of {encoder}, which it would be packed without.")
    model.config.encoder_config._name_or_path = model.config.encoder_name_or_path = encoder
