"""`--stage capacity`: how long a text a pair of proto-tokens holds."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from arguments import ModelArguments, bank_info, open_accelerator
from decoders import load_decoder
from embedded import decoder_revision

from eval_tasks.capacity import capacity_figures, capacity_picture
from eval_tasks.report import result, write_csv, write_result
from eval_tasks.text_metrics import information_bits
from trainers.capacity import measure_capacity
from trainers.text_sources import load_sources


def capacity(run, model_args: ModelArguments, data_args, fit_args, capacity_args, args) -> None:
    """
    Measures how long a text is held; leaves capacity.json, .csv and .png in OUTPUT_DIR, and in OUTPUT_DIR/banks what an
    interrupted run goes on from.
    """
    accelerator = open_accelerator(args)
    sources = load_sources(capacity_args.capacity_sources, data_args)
    output, rows = Path(args.output_dir), []
    for name in run.decoders or [model_args.decoder]:
        decoder_args = replace(model_args, decoder=name)
        tokenizer, decoder = load_decoder(
            name, model_args.decoder_revision, model_args.decoder_dtype, accelerator.device
        )
        info, banks = bank_info(decoder_args, decoder), output / "banks" / re.sub(r"\W+", "-", name)
        accelerator.print(f"decoder {name}")
        cells = measure_capacity(decoder, tokenizer, sources, info, fit_args, capacity_args, accelerator, banks)
        for row in cells:
            bits = information_bits(decoder, row.pop("token_ids"))
            rows.append({"decoder": name} | row | {"bits": bits})
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    threshold = capacity_args.capacity_threshold
    content = result(
        command=f"python scripts/train.py {shlex.join(sys.argv[1:])}",
        model=f"{', '.join(run.decoders or [model_args.decoder])}, {model_args.decoder_dtype}",
        revision=decoder_revision(model_args.decoder, model_args.decoder_revision),
        data=f"{capacity_args.capacity_texts} texts of each length from {data_args.data}",
        seed=fit_args.fit_seed,
        figures=capacity_figures(rows, threshold),
    )
    write_csv(output / "capacity.csv", rows)
    shown = model_args.decoder if not run.decoders else f"{len(run.decoders)} decoders"
    title = f"{shown}, {model_args.decoder_dtype}: {capacity_args.capacity_texts} texts of each length"
    capacity_picture(rows, threshold, title, output / "capacity.png")
    write_result(output / "capacity.json", content, ["C_tokens", "H_LM_bits"], ", .csv and .png beside it")
