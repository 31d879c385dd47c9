"""Trains the encoder that predicts proto-tokens. Run the same command again after an interruption: it goes on."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils import SAFE_WEIGHTS_NAME

from eval_tasks.calibration import calibrate_length, calibrate_uncertainty, rank_correlations
from eval_tasks.length_calibration import constant_baseline, length_figures, linear_baseline
from eval_tasks.one_step import one_step_records
from eval_tasks.recipes import SHARED, RecipeParser
from eval_tasks.report import write_csv, write_json
from eval_tasks.sentence_encoder import sentence_embeddings
from eval_tasks.text_metrics import one_step_metrics
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.configuration_protogen import FITTED_SIZE, UNCERTAINTY_SCORES
from modeling_protogen.frozen_decoder import embedding_std
from modeling_protogen.proto_tokens import flatten_proto_tokens
from trainers.arguments import (
    BankArguments,
    ModelArguments,
    TargetArguments,
    TrainInputArguments,
    bank_info,
    load_processor,
)
from trainers.data import (
    DataArguments,
    Example,
    ProtoGenCollator,
    category_id,
    load_examples,
    with_continuations,
    with_own_texts,
    with_teacher_answers,
)
from trainers.embedded import resolve
from trainers.files import locked
from trainers.lora import add_lora, merge_lora
from trainers.prompt_store import PromptStore
from trainers.proto_bank import ProtoTokenBank, stack_entries
from trainers.protogen_trainer import ProtoGenTrainer, last_complete_checkpoint, settle_losses
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
    train(*RecipeParser(*ARGUMENTS, passed_over=SHARED).parse(argv))


def train(
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
    settle_losses(model_args, args)
    bank_folder = Path(bank_args.bank or output_dir / "bank")
    if "bank" in args.needs:
        check_bank(bank_folder, model_args)
    check_continuations(model_args, target_args)
    if args.deepspeed_plugin and args.use_cpu:
        start_deepspeed_on_cpus()
    set_seed(args.seed)
    if model_args.first_tokens is None:
        model_args.first_tokens = "decoder" if target_args.targets == "teacher" else "slots"
    model = prepared_model(inputs, model_args, data_args)
    categories = model.config.categories
    processor = load_processor(model_args, model.config.max_answer_length)
    answers_folder = teacher_folder(target_args, args)
    train_examples, validation_examples = examples_to_learn(
        model, processor, model_args, target_args, data_args, answers_folder
    )
    bank = None
    if "bank" in args.needs:
        bank = ProtoTokenBank(bank_folder, bank_info(model_args, model.decoder))
        train_examples = banked(train_examples, bank)
    train_examples = with_continuations(train_examples, target_args.continuations)
    embeddings = answer_embeddings(train_examples, processor, inputs.teacher) if "embeddings" in args.needs else None
    trainer = ProtoGenTrainer(
        model=model,
        args=args,
        train_dataset=train_examples,
        eval_dataset=validation_examples,
        data_collator=ProtoGenCollator(processor, categories, bank, embeddings, "durations" in args.needs),
        processing_class=processor,
        compute_metrics=one_step_metrics(processor),
    )
    with locked(output_dir / ".lock") if trainer.is_world_process_zero() else nullcontext():
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
        log = trainer.state.log_history
        before = next((entry for entry in log if "eval_loss" in entry and entry["step"] == 0), None)
        made_with = made_of(model_args, data_args, args) | {"train_examples": len(train_examples)}
        metrics = {"run": made_with, "before": before, "after": trainer.evaluate(), "log": log}
        if trainer.is_deepspeed_enabled:
            model = whole_model(trainer, model_args, categories)
        if trainer.is_world_process_zero():
            if model_args.encoder_lora_rank:
                merge_lora(model)
            measured = with_continuations(validation_examples, target_args.validation_continuations)
            calibrate(model, processor, train_examples, measured, bank, output_dir)
            model.save_pretrained(output_dir / "model")
            processor.save_pretrained(output_dir / "model")
            held_out = [{"instruction": e.instruction, "context": e.context} for e in validation_examples]
            write_json(output_dir / "validation.json", held_out)
            write_json(metrics_path, metrics)
            print(f"model in {output_dir / 'model'}, metrics in {metrics_path}")


def banked(examples: list[Example], bank: ProtoTokenBank) -> list[Example]:
    """The examples that are in the bank, whose shards are verified first."""
    bank.verify()
    found = [example for example in examples if example.id in bank]
    if not found:
        raise ValueError(f"no training example is in the bank in {bank.folder}; fit them first (protogen fit).")
    return found


def made_of(model_args: ModelArguments, data_args: DataArguments, args: ProtoGenTrainingArguments) -> dict:
    return {
        "encoder": model_args.encoder if model_args.has_encoder else None,
        "decoder": model_args.decoder,
        "decoder_dtype": model_args.decoder_dtype,
        "data": data_args.data,
        "examples_a_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed,
    }


def prepared_model(
    inputs: TrainInputArguments, model_args: ModelArguments, data_args: DataArguments
) -> ProtoGenForConditionalGeneration:
    """A new model, with the weights of an earlier one, a store of prompts and adapters where they are asked for."""
    categories = None
    if model_args.m_scope == "per_category":
        categories = sorted({example.category for example in load_examples(data_args)})
    model = build_model(model_args, categories)
    model.config.validation_share = data_args.validation_share
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
    folder: Path,
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples with the answers that `targets` asks for; the teacher's are in the folder."""
    train_examples, validation_examples = instructions_to_learn(data_args, target_args, processor, folder)
    if target_args.targets == "self":
        return with_own_texts(train_examples), with_own_texts(validation_examples)
    if target_args.targets == "human":
        return train_examples, validation_examples
    info = teacher_info(model_args, target_args, model.decoder, processor)
    answers = read_teacher_answers(folder, info)
    return (
        with_teacher_answers(train_examples, answers, target_args.targets),
        with_teacher_answers(validation_examples, answers, "teacher"),
    )


def start_from(model: ProtoGenForConditionalGeneration, folder: str) -> None:
    """Takes over the trained weights of another run's model; slot adapters that it lacks stay fresh."""
    weights = load_file(Path(folder) / SAFE_WEIGHTS_NAME)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    lacking = [name for name in missing if not name.startswith(("decoder.", "slot_adapters."))]
    if lacking or unexpected:
        raise ValueError(
            f"{folder} has other weights than this recipe's model, {(lacking + unexpected)[0]} for one: start_from "
            "needs a model of the same shape."
        )


def start_deepspeed_on_cpus() -> None:
    """Before a model is built, which ZeRO-3 spreads over the processes at once; by itself it would look for MPI."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def check_continuations(model_args: ModelArguments, target_args: TargetArguments) -> None:
    goes_on = target_args.continuations or target_args.validation_continuations
    if goes_on and not model_args.decoder_sees_prompt:
        raise ValueError("the decoder reads what an answer goes on from: continuations need decoder_sees_prompt: true.")
    if model_args.encoder_reads_answer and not (target_args.continuations and model_args.has_encoder):
        raise ValueError("encoder_reads_answer needs an encoder, and continuations for it to read.")


def check_bank(folder: Path, model_args: ModelArguments) -> None:
    if model_args.decoder_sees_prompt:
        raise ValueError(
            "banked proto-tokens were fitted without a prompt before them: compare with them under "
            "decoder_sees_prompt: false, or leave out the losses that need a bank."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"the losses need a bank and there is none in {folder}; fit it first (protogen fit).")


def build_model(model_args: ModelArguments, categories: list[str] | None) -> ProtoGenForConditionalGeneration:
    fields = asdict(model_args)
    encoder, decoder = (
        resolve(fields.pop("encoder")) if model_args.has_encoder else None,
        resolve(fields.pop("decoder")),
    )
    dtype = getattr(torch, fields.pop("decoder_dtype"))
    of_processor = ("max_input_length", "max_prompt_length", "prompt_template", "answer_format", "encoder_reads_answer")
    for name in (*of_processor, "encoder_lora_rank"):
        fields.pop(name)
    if is_deepspeed_zero3_enabled():
        fields["proto_token_std"] = FITTED_SIZE * spread_embedding_std(decoder, model_args.decoder_revision)
    return ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder, decoder, decoder_dtype=dtype, categories=categories, **fields
    )


def spread_embedding_std(decoder: str, revision: str | None) -> float:
    """Standard deviation of the decoder's input embeddings, which ZeRO-3 spreads over the processes."""
    import deepspeed

    model = AutoModelForCausalLM.from_pretrained(decoder, revision=revision)
    with deepspeed.zero.GatheredParameters(model.get_input_embeddings().weight):
        return embedding_std(model)


def whole_model(
    trainer: ProtoGenTrainer, model_args: ModelArguments, categories: list[str] | None
) -> ProtoGenForConditionalGeneration | None:
    """On the main process, all of the weights that DeepSpeed has spread over the processes."""
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()
    if not trainer.is_world_process_zero():
        return None
    model = build_model(model_args, categories)
    if model_args.encoder_lora_rank:
        add_lora(model, model_args.encoder_lora_rank)
    model.load_state_dict(weights)
    return model


def answer_embeddings(examples: list[Example], processor: ProtoGenProcessor, teacher: str) -> dict[str, torch.Tensor]:
    """What the answers mean, by example id."""
    texts = [e.answer if e.answer_ids is None else processor.decode(e.answer_ids) for e in examples]
    vectors = torch.from_numpy(sentence_embeddings(resolve(teacher), texts))
    return {example.id: vector for example, vector in zip(examples, vectors, strict=True)}


def calibrate(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    train_examples: list[Example],
    validation_examples: list[Example],
    bank: ProtoTokenBank | None,
    folder: Path,
) -> None:
    """
    Calibrates the model on every other validation example and measures it on the rest, and on those that go on from
    the middle of an answer; too few are left alone. With a bank, the distance to its nearest text is measured as an
    uncertainty too; a checkpoint alone cannot have it.
    """
    beginnings = [example for example in validation_examples if not example.answer_start]
    later = [example for example in validation_examples if example.answer_start]
    calibration, test = beginnings[::2], beginnings[1::2]
    if len(test) < 2:
        print("too few validation examples to calibrate lengths and uncertainty on")
        return

    banked = None
    if bank is not None:
        banked = flatten_proto_tokens(*stack_entries([bank[example.id] for example in train_examples])).numpy()

    def records(examples):
        categories = model.config.categories
        category_ids = categories and torch.tensor([category_id(e.category, categories) for e in examples])
        starts = [e.answer_start for e in examples]
        texts = [e.instruction for e in examples], [e.context for e in examples], [e.target for e in examples]
        rows = one_step_records(model, processor, *texts, starts, category_ids, banked)
        return rows.assign(id=[e.id for e in examples], answer_start=list(map(len, starts)))

    calibrate_length(model.config, records(calibration))
    seen, found, goes_on = records(calibration), records(test), records(later)
    calibrate_uncertainty(model.config, seen)

    def prompt_lengths(examples):
        return np.array([processor.decoder_prompt_length(e.instruction, e.context) for e in examples])

    train_lengths = processor.encode_answers([e.target for e in train_examples])["length_labels"].numpy()
    own = found["log_length_mean"].to_numpy(), found["log_length_variance"].to_numpy()
    predictions = {
        "": own,
        "constant": constant_baseline(train_lengths, len(test)),
        "linear": linear_baseline(prompt_lengths(train_examples), train_lengths, prompt_lengths(test)),
    }
    figures = length_figures(predictions, found["length"].to_numpy())
    scores = UNCERTAINTY_SCORES if bank is None else (*UNCERTAINTY_SCORES, "bank_distance")
    figures |= {f"rank_correlation_{name}": value for name, value in rank_correlations(found, scores).items()}
    write_json(folder / "calibration.json", {"uncertainty_score": model.config.uncertainty_score, "figures": figures})
    rows = [row for part in (seen, found, goes_on) for row in part.to_dict("records")]
    write_csv(folder / "answers.csv", rows)
