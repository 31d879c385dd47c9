"""
Fits proto-tokens (`--stage fit`), lets the decoder answer instructions (`--stage teacher`), trains the encoder that
predicts proto-tokens (`--stage train`), measures how long a text they hold (`--stage capacity`), or studies what they
carry (`--stage anatomy`).

    accelerate launch scripts/train.py --config scripts/recipes/embedded.yaml --stage fit
    accelerate launch scripts/train.py --config scripts/recipes/embedded.yaml --stage train --max_steps 1000

Run the same command again after an interruption: it goes on where it was.
"""

import json
import re
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cli
import torch
from accelerate import Accelerator
from decoders import load_decoder
from embedded import resolve
from safetensors.torch import load_file
from studies import STUDIES, Setting, StudyArguments
from transformers import set_seed

from eval_tasks.capacity import capacity_figures, capacity_picture
from eval_tasks.report import markdown_table, result, write_csv, write_json
from eval_tasks.text_metrics import information_bits, one_step_metrics
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.capacity import CapacityArguments, measure_capacity
from trainers.controlled_world import WorldArguments, pretrain_decoder, save_encoder, world_rows
from trainers.data import (
    DataArguments,
    ProtoGenCollator,
    fitting_targets,
    load_examples,
    split_by_instruction,
    with_teacher_answers,
)
from trainers.files import locked, write_atomically
from trainers.fit_bank import fit_bank, with_predicted_starts
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.proto_bank import BankInfo, ProtoTokenBank, decoder_fingerprint, remove_damaged_shards
from trainers.protogen_trainer import ProtoGenTrainer, last_complete_checkpoint
from trainers.synthetic_instructions import (
    INSTRUCTIONS_NAME,
    normalized,
    synthetic_examples,
    write_instructions,
)
from trainers.teacher import TeacherInfo, prompt_template, read_teacher_answers, write_teacher_answers
from trainers.text_sources import load_sources
from trainers.training_args import ProtoGenTrainingArguments


@dataclass
class RunArguments:
    """What to do."""

    stage: str = field(
        default="train",
        metadata={"help": "What to do.", "choices": ["fit", "teacher", "train", "capacity", "anatomy", "world"]},
    )
    bank: str | None = field(default=None, metadata={"help": "Folder of the bank; OUTPUT_DIR/bank by default."})
    refit_damaged: bool = field(default=False, metadata={"help": "Remove damaged shards and fit their texts again."})
    warm_start: str | None = field(
        default=None, metadata={"help": "Trained model whose predictions the fit starts from; random by default."}
    )
    decoders: list[str] = field(
        default_factory=list,
        metadata={"help": "Decoders that --stage capacity compares, with variants (scripts/decoders.py)."},
    )
    smoke: bool = field(
        default=False,
        metadata={"help": "The whole recipe in seconds: few tokens, few texts, few steps, no real figures."},
    )
    fixed_m: str | None = field(
        default=None, metadata={"help": "Safetensors file with the vector `m` (dim,) for m_scope=fixed."}
    )


@dataclass
class TargetArguments:
    """What the encoder learns to answer, and to which instructions."""

    targets: str = field(
        default="human",
        metadata={
            "help": "Answers: the data's, the frozen decoder's, or both.",
            "choices": ["human", "teacher", "both"],
        },
    )
    instructions: str = field(
        default="data",
        metadata={
            "help": "Instructions to train on: the data's, those that the decoder writes itself, or both. Validation "
            "instructions are always the data's.",
            "choices": ["data", "synthetic", "both"],
        },
    )
    num_synthetic: int = field(default=10_000, metadata={"help": "Instructions that the decoder writes."})
    teacher_answers: str | None = field(
        default=None, metadata={"help": "Folder of the teacher's answers; OUTPUT_DIR/teacher by default."}
    )
    teacher_max_length: int = field(default=64, metadata={"help": "Tokens at which the teacher's answers are cut."})
    teacher_batch_size: int = field(default=32, metadata={"help": "Instructions that the teacher answers at once."})

    def __post_init__(self):
        if self.instructions != "data" and self.targets == "human":
            raise ValueError(
                "nobody has answered synthetic instructions but the teacher: set targets to teacher or both."
            )


@dataclass
class ModelArguments:
    """The model; names are Hub ids, folders or `embedded:` names. Fields as in `ProtoGenConfig`."""

    encoder: str = field(default="roberta-base", metadata={"help": "Encoder."})
    encoder_revision: str | None = field(default=None, metadata={"help": "Hub revision of the encoder."})
    decoder: str = field(default="EleutherAI/pythia-160m", metadata={"help": "Frozen decoder."})
    decoder_revision: str | None = field(default=None, metadata={"help": "Hub revision of the decoder."})
    decoder_dtype: str = field(
        default="bfloat16",
        metadata={"help": "dtype of the decoder's weights.", "choices": ["bfloat16", "float16", "float32"]},
    )
    arrangement: str = field(default="e_mN", metadata={"help": "e_m, e_mN, interleaved, halves or e_only."})
    num_e_tokens: int = field(default=1, metadata={"help": "e-tokens that open a chunk."})
    chunk_size: int = field(default=64, metadata={"help": "Answer tokens governed by one (e, m) pair."})
    max_chunks: int = field(default=1, metadata={"help": "Chunks laid end to end."})
    max_answer_length: int | None = field(default=None, metadata={"help": "chunk_size * max_chunks by default."})
    m_scope: str = field(default="per_example", metadata={"help": "per_example, per_category, shared or fixed."})
    m_position_offsets: bool = field(default=False, metadata={"help": "Trained offset of m for each position."})
    sink: str = field(default="bos", metadata={"help": "bos or none."})
    decoder_sees_prompt: bool = field(default=False, metadata={"help": "Prompt before the proto-tokens."})
    max_input_length: int | None = field(default=None, metadata={"help": "The encoder's window in tokens."})
    max_prompt_length: int = field(default=1024, metadata={"help": "Longest prompt in decoder tokens."})
    thin: bool = field(default=True, metadata={"help": "Save checkpoints without the frozen decoder."})


ARGUMENTS = (
    RunArguments,
    ModelArguments,
    TargetArguments,
    DataArguments,
    FittingArguments,
    CapacityArguments,
    StudyArguments,
    WorldArguments,
    ProtoGenTrainingArguments,
)


SMOKE = """
    --fit_num_texts 4 --fit_max_length 4 --fit_max_steps 2 --fit_attempts 1 --fit_settle_steps 2
    --capacity_texts 2 --capacity_lengths 3 4
    --study_texts 10 --study_length 4 --study_min_length 4 --study_seeds 2 --study_noise 0 0.5 --study_curve_steps 2
    --study_weights 0 1 --max_steps 2
""".split()


def bank_info(model_args: ModelArguments, decoder) -> BankInfo:
    return BankInfo(
        decoder=model_args.decoder,
        decoder_revision=model_args.decoder_revision,
        decoder_fingerprint=decoder_fingerprint(decoder),
        arrangement=model_args.arrangement,
        chunk_size=model_args.chunk_size,
        num_e_tokens=model_args.num_e_tokens,
        m_scope=model_args.m_scope,
        sink=model_args.sink,
        dim=decoder.get_input_embeddings().embedding_dim,
    )


def open_accelerator(args: ProtoGenTrainingArguments) -> Accelerator:
    """The processes, and where asked a tracker that writes to OUTPUT_DIR."""
    accelerator = Accelerator(cpu=args.use_cpu, log_with=args.report_to or None, project_dir=args.output_dir)
    accelerator.init_trackers("fit")
    return accelerator


def texts_to_fit(run, model_args, fit_args, bank, tokenizer, examples, device) -> list[Text]:
    targets = fitting_targets(tokenizer, examples, fit_args.fit_max_length)
    groups = {example.id: "" for example in examples}
    if model_args.m_scope == "per_category":
        missing = [example.id for example in examples if example.category is None]
        if missing:
            raise ValueError(f"m_scope=per_category needs a category; example {missing[0]} has none.")
        groups = {example.id: example.category for example in examples}
    texts = [Text(id, token_ids, groups[id]) for id, token_ids in targets.items()]
    if run.warm_start:
        model = ProtoGenForConditionalGeneration.from_pretrained(run.warm_start).to(device)
        processor = ProtoGenProcessor.from_pretrained(run.warm_start)
        texts = with_predicted_starts(texts, examples, model, processor, bank.info)
    return texts


def fit(run: RunArguments, model_args: ModelArguments, data_args, fit_args: FittingArguments, args) -> None:
    """Fits the training split's answers into the bank, but for those that are there; sums up in OUTPUT_DIR/fit.json."""
    accelerator = open_accelerator(args)
    if run.refit_damaged and accelerator.is_main_process:
        for path in remove_damaged_shards(run.bank):
            print(f"removed damaged shard {path.stem}; its texts are fitted again")
    accelerator.wait_for_everyone()
    tokenizer, decoder = load_decoder(
        model_args.decoder, model_args.decoder_revision, model_args.decoder_dtype, accelerator.device
    )
    bank = ProtoTokenBank(run.bank, bank_info(model_args, decoder))
    bank.verify()
    if model_args.m_scope == "fixed" and bank.shared_m() is None:
        if run.fixed_m is None:
            raise ValueError("m_scope=fixed needs the vector: --fixed_m FILE.safetensors with a tensor m.")
        bank.write_shared_m({"": load_file(run.fixed_m)["m"].view(1, bank.info.dim)})
    examples, _ = split_by_instruction(load_examples(data_args), data_args.validation_share)
    examples = examples[: fit_args.fit_num_texts]
    texts = texts_to_fit(run, model_args, fit_args, bank, tokenizer, examples, accelerator.device)
    there = sum(text.id in bank for text in texts)
    accelerator.print(f"fitting {len(texts) - there} texts; {there} are in the bank already")
    fitter = ProtoTokenFitter(decoder, bank.info, fit_args)
    seconds = time.perf_counter()
    fitted = fit_bank(fitter, bank, texts, accelerator)
    seconds = time.perf_counter() - seconds
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    rows = [bank.row(text.id) for text in texts]
    summary = {
        "texts": len(rows),
        "perfect_texts": sum(row["accuracy"] == 1 for row in rows),
        "reconstruction_accuracy": sum(row["accuracy"] for row in rows) / len(rows),
        "mean_steps_to_best": sum(row["steps"] for row in rows) / len(rows),
        # Of this call, which may have found texts in the bank already.
        "texts_fitted": fitted,
        "seconds": seconds,
        "padding_share": fitter.num_padding / max(fitter.num_positions, 1),
        "arrangement": asdict(bank.info),
        "settings": asdict(fit_args),
    }
    write_json(Path(args.output_dir) / "fit.json", summary)
    print(
        f"mean reconstruction accuracy {summary['reconstruction_accuracy']:.4f}, "
        f"{summary['perfect_texts']} of {summary['texts']} texts perfect; bank in {run.bank}"
    )


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
        revision=model_args.decoder_revision,
        data=f"{capacity_args.capacity_texts} texts of each length from {data_args.data}",
        seed=fit_args.fit_seed,
        figures=capacity_figures(rows, threshold),
    )
    write_json(output / "capacity.json", content)
    write_csv(output / "capacity.csv", rows)
    title = f"{content['model']}: {capacity_args.capacity_texts} texts of each length"
    capacity_picture(rows, threshold, title, output / "capacity.png")
    print(f"{markdown_table(content, ['C_tokens', 'H_LM_bits'])}\n\nwritten to {output}: capacity.json, .csv and .png")


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
        revision=model_args.decoder_revision,
        data=f"{study_args.study_texts} texts of up to {study_args.study_length} tokens from {', '.join(sources)} of "
        f"{data_args.data}",
        seed=fit_args.fit_seed,
        figures=findings.figures,
    )
    write_json(output / "anatomy.json", content)
    write_csv(output / "anatomy.csv", findings.rows.to_dict("records"))
    if findings.html:
        (output / "examples.html").write_text(findings.html)
    print(f"{markdown_table(content)}\n\nwritten to {output}: anatomy.json, anatomy.csv and pictures")


def load_processor(model_args: ModelArguments, max_answer_length: int) -> ProtoGenProcessor:
    return ProtoGenProcessor.from_encoder_decoder_pretrained(
        resolve(model_args.encoder),
        resolve(model_args.decoder),
        encoder_revision=model_args.encoder_revision,
        decoder_revision=model_args.decoder_revision,
        max_input_length=model_args.max_input_length,
        max_prompt_length=model_args.max_prompt_length,
        max_answer_length=max_answer_length,
    )


def teacher_info(model_args: ModelArguments, target_args: TargetArguments, decoder, processor) -> TeacherInfo:
    return TeacherInfo(
        decoder=model_args.decoder,
        decoder_revision=model_args.decoder_revision,
        decoder_fingerprint=decoder_fingerprint(decoder),
        template=prompt_template(processor),
        max_length=target_args.teacher_max_length,
    )


def teacher(model_args: ModelArguments, target_args: TargetArguments, data_args, args) -> None:
    """Lets the decoder write instructions, where asked, and answer all of them, into the folder of teacher answers."""
    accelerator = open_accelerator(args)
    tokenizer, decoder = load_decoder(
        model_args.decoder, model_args.decoder_revision, model_args.decoder_dtype, accelerator.device
    )
    processor = load_processor(model_args, target_args.teacher_max_length)
    folder, examples = Path(target_args.teacher_answers), load_examples(data_args)
    if target_args.instructions != "data":
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                write_instructions(decoder, tokenizer, folder / INSTRUCTIONS_NAME, target_args.num_synthetic, args.seed)
        examples += synthetic_examples(folder, target_args.num_synthetic)
    examples = [example for example in examples if processor.fits(example.instruction)]
    info = teacher_info(model_args, target_args, decoder, processor)
    answers = write_teacher_answers(
        decoder, processor, examples, folder, info, accelerator, target_args.teacher_batch_size
    )
    accelerator.end_training()
    accelerator.print(f"{len(answers)} answers in {folder}")


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


def train(
    run: RunArguments,
    model_args: ModelArguments,
    target_args: TargetArguments,
    data_args,
    args: ProtoGenTrainingArguments,
) -> None:
    """
    Trains the encoder; leaves the model in OUTPUT_DIR/model, its metrics in OUTPUT_DIR/metrics.json and the held-out
    instructions in OUTPUT_DIR/validation.json.
    """
    output_dir = Path(args.output_dir)
    metrics_path = output_dir / "metrics.json"
    if metrics_path.is_file():
        print(f"already trained: {output_dir / 'model'}; remove {output_dir} to train again")
        return
    if args.needs_bank:
        if model_args.decoder_sees_prompt:
            raise ValueError(
                "banked proto-tokens were fitted without a prompt before them: compare with them under "
                "decoder_sees_prompt: false, or leave out the losses that need a bank."
            )
        if not Path(run.bank).is_dir():
            raise FileNotFoundError(
                f"the losses need a bank and there is none in {run.bank}; fit it first (--stage fit)."
            )
    set_seed(args.seed)
    fields = asdict(model_args)
    encoder, decoder = resolve(fields.pop("encoder")), resolve(fields.pop("decoder"))
    revisions = {name: fields.pop(name) for name in ("encoder_revision", "decoder_revision")}
    decoder_dtype = getattr(torch, fields.pop("decoder_dtype"))
    for name in ("max_input_length", "max_prompt_length"):
        fields.pop(name)

    train_examples, validation_examples = split_by_instruction(load_examples(data_args), data_args.validation_share)
    categories = None
    if model_args.m_scope == "per_category":
        categories = sorted({example.category for example in train_examples})
    model = ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder, decoder, decoder_dtype=decoder_dtype, categories=categories, **revisions, **fields
    )
    config = model.config
    processor = load_processor(model_args, config.max_answer_length)
    if target_args.instructions != "data":
        synthetic = synthetic_examples(target_args.teacher_answers, target_args.num_synthetic)
        held_out = {normalized(example.instruction) for example in validation_examples}
        synthetic = [example for example in synthetic if normalized(example.instruction) not in held_out]
        train_examples = synthetic + (train_examples if target_args.instructions == "both" else [])
    lost = len(train_examples) + len(validation_examples)
    train_examples = [example for example in train_examples if processor.fits(example.instruction)]
    validation_examples = [example for example in validation_examples if processor.fits(example.instruction)]
    lost -= len(train_examples) + len(validation_examples)
    if lost:
        print(f"leaving out {lost} examples whose instruction is longer than max_input_length or max_prompt_length")
    if not train_examples or not validation_examples:
        raise ValueError(
            f"{len(train_examples)} training and {len(validation_examples)} validation examples are too few; "
            "change validation_share or give more data."
        )
    if target_args.targets != "human":
        info = teacher_info(model_args, target_args, model.decoder, processor)
        answers = read_teacher_answers(target_args.teacher_answers, info)
        train_examples = with_teacher_answers(train_examples, answers, target_args.targets)
        validation_examples = with_teacher_answers(validation_examples, answers, "teacher")
    bank = None
    if args.needs_bank:
        bank = ProtoTokenBank(run.bank, bank_info(model_args, model.decoder))
        bank.verify()
        train_examples = [example for example in train_examples if example.id in bank]
        if not train_examples:
            raise ValueError(f"no training example is in the bank in {run.bank}; fit them first (--stage fit).")
    trainer = ProtoGenTrainer(
        model=model,
        args=args,
        train_dataset=train_examples[: data_args.max_train_examples],
        eval_dataset=validation_examples[: data_args.max_validation_examples],
        data_collator=ProtoGenCollator(processor, categories, bank),
        processing_class=processor,
        compute_metrics=one_step_metrics(processor),
    )
    with locked(output_dir / ".lock") if trainer.is_world_process_zero() else nullcontext():
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
        log = trainer.state.log_history
        before = next((entry for entry in log if "eval_loss" in entry and entry["step"] == 0), None)
        metrics = {"before": before, "after": trainer.evaluate(), "log": log}
        if trainer.is_world_process_zero():
            model.save_pretrained(output_dir / "model")
            processor.save_pretrained(output_dir / "model")
            held_out = [{"instruction": e.instruction, "context": e.context} for e in validation_examples]
            write_json(output_dir / "validation.json", held_out)
            write_json(metrics_path, metrics)
            print(f"model in {output_dir / 'model'}, metrics in {metrics_path}")


def main(arguments: list[str]) -> None:
    parser = cli.RecipeParser(*ARGUMENTS)
    if parser.parse(arguments)[0].smoke:
        arguments = arguments + SMOKE
    parsed = parser.parse(arguments)
    run, model_args, target_args, data_args, fit_args, capacity_args, study_args, world_args, args = parsed
    target_args.teacher_answers = target_args.teacher_answers or str(Path(args.output_dir) / "teacher")
    run.bank = run.bank or str(Path(args.output_dir) / "bank")
    if run.stage == "fit":
        fit(run, model_args, data_args, fit_args, args)
    elif run.stage == "capacity":
        capacity(run, model_args, data_args, fit_args, capacity_args, args)
    elif run.stage == "anatomy":
        anatomy(run, model_args, data_args, fit_args, study_args, args)
    elif run.stage == "world":
        world(data_args, world_args, args)
    elif run.stage == "teacher":
        teacher(model_args, target_args, data_args, args)
    else:
        train(run, model_args, target_args, data_args, args)


if __name__ == "__main__":
    cli.run(main)
