"""`--stage world`: the controlled world."""

import json
from pathlib import Path

from trainers.controlled_world import WorldArguments, pretrain_decoder, save_encoder, world_rows
from trainers.data import load_examples, split_by_instruction
from trainers.files import write_atomically


def world(data_args, world_args: WorldArguments, args) -> None:
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
