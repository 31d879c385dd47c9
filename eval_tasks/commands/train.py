"""Trains the encoder that predicts proto-tokens. Run the same command again after an interruption: it goes on."""

import shlex
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import set_seed

from eval_tasks.held_out import calibrate
from eval_tasks.recipes import SHARED, RecipeParser
from eval_tasks.report import write_json
from eval_tasks.sentence_encoder import sentence_embeddings
from eval_tasks.text_metrics import draft_metrics, one_step_metrics
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.arguments import (
    BankArguments,
    ModelArguments,
    TargetArguments,
    TrainInputArguments,
    bank_info,
    load_processor,
)
from trainers.building import build_model, start_deepspeed_on_cpus, start_from, whole_model
from trainers.data import (
    DataArguments,
    Example,
    ProtoGenCollator,
    categories_of,
    load_examples,
    split_by_instruction,
    with_own_texts,
    with_teacher_answers,
)
from trainers.embedded import resolve
from trainers.exchanged_values import with_exchanged_values
from trainers.files import full_disk_named, locked, written_aside
from trainers.lora import add_lora, merge_lora
from trainers.prompt_store import PromptStore
from trainers.proto_bank import ProtoTokenBank
from trainers.protogen_trainer import ProtoGenTrainer, resolve_losses, settings_of
from trainers.resuming import checkpoint_to_resume, run_info
from trainers.teacher import read_teacher_answers
from trainers.training_args import ProtoGenTrainingArguments

from .teacher import instructions_to_learn, teacher_folder, teacher_info

ARGUMENTS = (
    TrainInputArguments,
    BankArguments,
    ModelArguments,
    TargetArguments,
    DataArguments,
    ProtoGenTrainingArguments,
)


def main(argv: list[str]) -> None:
    train(f"protogen train {shlex.join(argv)}", *RecipeParser(*ARGUMENTS, passed_over=SHARED).parse(argv))


def train(
    command: str,
    inputs: TrainInputArguments,
    bank_args: BankArguments,
    model_args: ModelArguments,
    target_args: TargetArguments,
    data_args: DataArguments,
    args: ProtoGenTrainingArguments,
) -> None:
    """
    Trains the encoder; leaves in OUTPUT_DIR the calibrated model (model/), its metrics (metrics.json), the held-out
    instructions (validation.json) and the answers to them (answers.csv), and what the calibration is worth on others
    than it was made on (calibration.json).
    """
    output_dir = Path(args.output_dir)
    metrics_path = output_dir / "metrics.json"
    if metrics_path.is_file():
        print(f"already trained: {output_dir / 'model'}; remove {output_dir} to train again")
        return
    if model_args.first_tokens is None:
        model_args.first_tokens = first_tokens_for(target_args, args)
    resolve_losses(model_args, args)
    bank_folder, bank = bank_args.folder(output_dir), None
    check(model_args, args, bank_folder)
    if args.deepspeed_plugin and args.use_cpu:
        start_deepspeed_on_cpus()
    set_seed(args.seed)
    model = prepared_model(inputs, model_args, target_args, data_args)
    categories = model.config.categories
    processor = reader = load_processor(model_args, model.config.max_answer_length)
    if args.num_anchors:  # Drafts are short, what they go on from is not.
        reader = load_processor(model_args, target_args.teacher_max_length)
    train_examples, validation_examples = examples_to_learn(model, processor, model_args, target_args, data_args, args)
    if "bank" in args.needs:
        bank = ProtoTokenBank(bank_folder, bank_info(model_args, model.decoder))
        train_examples = banked(train_examples, bank)
    trainer = ProtoGenTrainer(
        model=model,
        args=args,
        train_dataset=train_examples,
        eval_dataset=validation_examples,
        data_collator=collator_for(reader, categories, bank, train_examples, inputs, args),
        processing_class=processor,
        compute_metrics=draft_metrics(model.config.draft_length) if args.num_anchors else one_step_metrics(processor),
    )
    # Instructions that the decoder wrote itself are in no data to be asked.
    model.config.validation_share = data_args.validation_share
    with locked(output_dir / ".lock") if trainer.is_world_process_zero() else nullcontext():
        run = run_info(model, processor, train_examples, validation_examples)
        log = train_or_go_on(trainer, output_dir, run | {"encoder_lora_rank": model_args.encoder_lora_rank})
        before = next((entry for entry in log if "eval_loss" in entry and entry["step"] == 0), None)
        made_with = {"command": command} | made_of(model_args, data_args, args) | settings_of(trainer)
        metrics = {"run": made_with, "before": before, "after": trainer.evaluate(), "log": log}
        if trainer.is_deepspeed_enabled:
            model = whole_model(trainer, model_args, categories)
        if trainer.is_world_process_zero():
            if model_args.encoder_lora_rank:
                merge_lora(model)
            # Without that the decoder cannot write whole answers from its proto-tokens.
            if not (args.trains_token_head_alone or args.num_anchors):
                with full_disk_named(output_dir):
                    calibrate(model, processor, train_examples, validation_examples, bank, output_dir)
            save(output_dir, model, processor, validation_examples)
            write_json(metrics_path, metrics)
            print(f"model in {output_dir / 'model'}, metrics in {metrics_path}")


def train_or_go_on(trainer: ProtoGenTrainer, output_dir: Path, run: dict) -> list[dict]:
    """
    Trains, from the newest checkpoint on if there is one. Returns the log, which is that of an uninterrupted run: with
    one evaluation at the start, and without the mean loss of what this call has trained.
    """
    checkpoint = checkpoint_to_resume(output_dir, run, trainer.accelerator)
    trainer.args.eval_on_start = trainer.args.eval_on_start and checkpoint is None
    trainer.train(resume_from_checkpoint=checkpoint)
    log = trainer.state.log_history
    log[-1].pop("train_loss", None)
    return log


def save(
    output_dir: Path,
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    validation_examples: list[Example],
) -> None:
    """Writes the model, and the instructions that it has not seen."""
    with written_aside(output_dir / "model") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    held_out = [{"instruction": e.instruction, "context": e.context} for e in validation_examples]
    write_json(output_dir / "validation.json", held_out)


def banked(examples: list[Example], bank: ProtoTokenBank) -> list[Example]:
    """The examples that are in the bank, whose shards are verified first."""
    bank.verify()
    found = [example for example in examples if example.id in bank]
    if not found:
        raise ValueError(f"no training example is in the bank in {bank.folder}; fit them first (protogen fit).")
    return found


def made_of(model_args: ModelArguments, data_args: DataArguments, args: ProtoGenTrainingArguments) -> dict:
    return {
        "encoder": model_args.encoder if model_args.uses_encoder else None,
        "decoder": model_args.decoder,
        "decoder_dtype": model_args.decoder_dtype,
        "data": data_args.data,
        "examples_a_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
    }


def prepared_model(
    inputs: TrainInputArguments, model_args: ModelArguments, target_args: TargetArguments, data_args: DataArguments
) -> ProtoGenForConditionalGeneration:
    """A new model, with the weights of an earlier one, a store of prompts and adapters where they are asked for."""
    categories = None
    if model_args.m_scope == "per_category":
        categories = categories_of(load_examples(data_args))
    model = build_model(model_args, categories)
    if inputs.start_from:
        start_from(model, inputs.start_from)
    if inputs.prompt_store:
        model.prompt_store = PromptStore(inputs.prompt_store, model.decoder, model.config.layers_read)
    if model_args.encoder_lora_rank:
        add_lora(model, model_args.encoder_lora_rank)
    return model


def examples_to_learn(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    model_args: ModelArguments,
    target_args: TargetArguments,
    data_args: DataArguments,
    args: ProtoGenTrainingArguments,
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples with the answers that `targets` asks for."""
    folder = teacher_folder(target_args, args)
    train_examples, validation_examples = instructions_to_learn(data_args, target_args, processor, folder)
    if target_args.targets == "self":
        return with_own_texts(train_examples), with_own_texts(validation_examples)
    if target_args.targets == "human":
        copies = with_exchanged_values(train_examples, data_args.exchanged_copies)[len(train_examples) :]
        # A copy may have become one of the held-out instructions, or too long.
        copies, _ = split_by_instruction(copies, data_args.validation_share)
        return train_examples + [e for e in copies if processor.fits(e.instruction)], validation_examples
    info = teacher_info(model_args, target_args, model.decoder, processor)
    answers = read_teacher_answers(folder, info)
    return (
        with_teacher_answers(train_examples, answers, target_args.targets),
        with_teacher_answers(validation_examples, answers, "teacher"),
    )


def first_tokens_for(target_args: TargetArguments, args: ProtoGenTrainingArguments) -> str:
    if args.num_anchors:
        return "drafts"
    return "decoder" if target_args.targets == "teacher" else "slots"


def collator_for(
    processor: ProtoGenProcessor,
    categories: list[str] | None,
    bank: ProtoTokenBank | None,
    train_examples: list[Example],
    inputs: TrainInputArguments,
    args: ProtoGenTrainingArguments,
) -> ProtoGenCollator:
    """With what the losses need."""
    embeddings = None
    if "embeddings" in args.needs:
        embeddings = answer_embeddings(train_examples, processor, inputs.sentence_encoder)
    return ProtoGenCollator(processor, categories, bank, embeddings, finds_durations="durations" in args.needs)


def answer_embeddings(
    examples: list[Example], processor: ProtoGenProcessor, sentence_encoder: str
) -> dict[str, torch.Tensor]:
    """What the answers mean, by example id."""
    texts = [e.answer if e.answer_ids is None else processor.decode(e.answer_ids) for e in examples]
    vectors = torch.from_numpy(sentence_embeddings(resolve(sentence_encoder), texts))
    return {example.id: vector for example, vector in zip(examples, vectors, strict=True)}


def check(model_args: ModelArguments, args: ProtoGenTrainingArguments, bank: Path) -> None:
    """
    Raises:
        ValueError: if the arguments contradict each other.
        FileNotFoundError: if the losses need a bank and there is none.
    """
    if "bank" not in args.needs:
        return
    if model_args.decoder_sees_prompt:
        raise ValueError(
            "banked proto-tokens were fitted without a prompt before them: compare with them under "
            "decoder_sees_prompt: false, or leave out the losses that need a bank."
        )
    if not bank.is_dir():
        raise FileNotFoundError(f"the losses need a bank and there is none in {bank}; fit it first (protogen fit).")
