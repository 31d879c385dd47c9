"""Makes the controlled world: a language in which every instruction has one right answer, and a decoder for it."""

import json
from pathlib import Path

from eval_tasks.recipes import SHARED, RecipeParser
from eval_tasks.studies.controlled_world import WorldArguments, pretrain_decoder, save_encoder, world_rows
from trainers.data import DataArguments, load_examples, split_by_instruction
from trainers.files import write_atomically
from trainers.training_args import ProtoGenTrainingArguments

ARGUMENTS = (DataArguments, WorldArguments, ProtoGenTrainingArguments)


def main(argv: list[str]) -> None:
    world(*RecipeParser(*ARGUMENTS, passed_over=SHARED).parse(argv))


def world(data_args: DataArguments, world_args: WorldArguments, args: ProtoGenTrainingArguments) -> None:
    """Makes the controlled world in OUTPUT_DIR: its data, an untrained encoder, a decoder that speaks its language."""
    output = Path(args.output_dir)
    if not Path(data_args.data).is_file():
        text = "".join(json.dumps(row) + "\n" for row in world_rows(world_args.world_rows, args.seed))
        Path(data_args.data).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(data_args.data), lambda path: path.write_text(text))
    examples, held_out = split_by_instruction(load_examples(data_args), data_args.validation_share)
    save_encoder(output / "encoder", world_args, args.seed)
    if not (output / "decoder").is_dir():
        pretrain_decoder(output / "decoder", examples, world_args, args.seed)
    print(f"a world of {len(examples)} instructions, {len(held_out)} more held out, in {output}")
