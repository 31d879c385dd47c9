"""`--stage anatomy`: studies of what proto-tokens carry."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from arguments import ModelArguments, bank_info, open_accelerator
from decoders import load_decoder
from embedded import decoder_revision
from studies import STUDIES, Setting, StudyArguments

from eval_tasks.report import result, write_csv, write_result
from trainers.text_sources import load_sources


def anatomy(run, model_args: ModelArguments, data_args, fit_args, study_args: StudyArguments, args) -> None:
    """Makes a study; leaves its figures in OUTPUT_DIR/anatomy.json, rows in anatomy.csv, and pictures beside them."""
    accelerator = open_accelerator(args)
    if accelerator.num_processes > 1:
        raise ValueError("a study takes one process.")
    sources = load_sources(study_args.study_sources, data_args)
    tokenizer, decoder = load_decoder(
        model_args.decoder, model_args.decoder_revision, model_args.decoder_dtype, accelerator.device
    )
    info, output = replace(bank_info(model_args, decoder), chunk_size=study_args.study_length), Path(args.output_dir)
    setting = Setting(decoder, tokenizer, sources, info, fit_args, study_args, accelerator, output)
    findings = STUDIES[study_args.study](setting)
    accelerator.end_training()
    content = result(
        command=f"python scripts/train.py {shlex.join(sys.argv[1:])}",
        model=f"{model_args.decoder}, {model_args.decoder_dtype}",
        revision=decoder_revision(model_args.decoder, model_args.decoder_revision),
        data=f"{study_args.study_texts} texts of up to {study_args.study_length} tokens from {', '.join(sources)} of "
        f"{data_args.data}",
        seed=fit_args.fit_seed,
        figures=findings.figures,
    )
    write_csv(output / "anatomy.csv", findings.rows.to_dict("records"))
    if findings.html:
        (output / "examples.html").write_text(findings.html)
    write_result(output / "anatomy.json", content, beside=", .csv and pictures beside it")
