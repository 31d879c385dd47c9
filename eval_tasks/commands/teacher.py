"""The frozen decoder answers instructions, and writes some itself where asked: what an encoder learns from."""

from pathlib import Path

from eval_tasks.recipes import SHARED, RecipeParser
from modeling_protogen import ProtoGenProcessor
from modeling_protogen.frozen_decoder import decoder_fingerprint
from modeling_protogen.key_value_lines import to_lines
from trainers.arguments import ModelArguments, TargetArguments, load_processor, open_accelerator
from trainers.data import DataArguments, Example, load_examples, split_by_instruction
from trainers.decoders import load_decoder
from trainers.synthetic_instructions import INSTRUCTIONS_NAME, normalized, synthetic_examples, write_instructions
from trainers.teacher import TeacherInfo, prompt_template, write_teacher_answers
from trainers.training_args import ProtoGenTrainingArguments

ARGUMENTS = (ModelArguments, TargetArguments, DataArguments, ProtoGenTrainingArguments)


def main(argv: list[str]) -> None:
    teacher(*RecipeParser(*ARGUMENTS, passed_over=SHARED).parse(argv))


def teacher_folder(target_args: TargetArguments, args: ProtoGenTrainingArguments) -> Path:
    return Path(target_args.teacher_answers or Path(args.output_dir) / "teacher")


def teacher(
    model_args: ModelArguments,
    target_args: TargetArguments,
    data_args: DataArguments,
    args: ProtoGenTrainingArguments,
) -> None:
    """Lets the decoder write instructions, where asked, and answer all of them, into the folder of teacher answers."""
    accelerator = open_accelerator(args)
    tokenizer, decoder = load_decoder(
        model_args.decoder,
        model_args.decoder_revision,
        model_args.decoder_dtype,
        accelerator.device,
        model_args.trust_remote_code,
    )
    processor = load_processor(model_args, target_args.teacher_max_length)
    folder = teacher_folder(target_args, args)
    if target_args.instructions != "data":
        with accelerator.main_process_first():
            if accelerator.is_main_process:
                write_instructions(decoder, tokenizer, folder / INSTRUCTIONS_NAME, target_args.num_synthetic, args.seed)
    train_examples, validation_examples = instructions_to_learn(data_args, target_args, processor, folder)
    info = teacher_info(model_args, target_args, decoder, processor)
    answers = write_teacher_answers(
        decoder,
        processor,
        validation_examples + train_examples,
        folder,
        info,
        accelerator,
        target_args.teacher_batch_size,
    )
    accelerator.end_training()
    accelerator.print(f"{len(answers)} answers in {folder}")


def instructions_to_learn(
    data_args: DataArguments, target_args: TargetArguments, processor: ProtoGenProcessor, folder: Path
) -> tuple[list[Example], list[Example]]:
    """
    Examples to train on and to validate with: the data's, split, and the synthetic ones where asked; as many as are
    wanted of each, but for those whose instruction does not fit. The teacher's `folder` has the synthetic ones.

    Raises:
        ValueError: if none are left for training or for validation.
    """
    train_examples, validation_examples = split_by_instruction(load_examples(data_args), data_args.validation_share)
    train_examples = train_examples[: data_args.max_train_examples]
    validation_examples = validation_examples[: data_args.max_validation_examples]
    if target_args.instructions != "data":
        synthetic = synthetic_examples(folder, target_args.num_synthetic)
        held_out = {normalized(example.instruction) for example in validation_examples}
        synthetic = [example for example in synthetic if normalized(example.instruction) not in held_out]
        train_examples = synthetic + (train_examples if target_args.instructions == "both" else [])
    # What does not fit one processor is no reason to take others instead: another run may leave out less.
    wanted = train_examples, validation_examples
    train_examples, validation_examples = ([e for e in part if processor.fits(e.instruction)] for part in wanted)
    lost = sum(map(len, wanted)) - len(train_examples) - len(validation_examples)
    if lost:
        print(f"leaving out {lost} examples whose instruction is longer than max_input_length or max_prompt_length")
    if not train_examples or not validation_examples:
        raise ValueError(
            f"{len(train_examples)} training and {len(validation_examples)} validation examples are too few; "
            "change validation_share or give more data."
        )
    if processor.answer_format == "key_value_lines" and target_args.targets == "human":
        for example in train_examples + validation_examples:
            check_lines(example)
    return train_examples, validation_examples


def check_lines(example: Example) -> None:
    """
    Raises:
        ValueError: if the answer cannot be written as lines.
    """
    try:
        to_lines(example.answer)
    except ValueError as error:
        raise ValueError(
            f"the instruction {example.instruction[:60]!r} has an answer that answer_format=key_value_lines does not "
            f"take: {error}"
        ) from None


def teacher_info(model_args: ModelArguments, target_args: TargetArguments, decoder, processor) -> TeacherInfo:
    return TeacherInfo(
        decoder=model_args.decoder,
        decoder_revision=model_args.decoder_revision,
        decoder_fingerprint=decoder_fingerprint(decoder),
        template=prompt_template(processor),
        max_prompt_length=processor.max_prompt_length,
        max_length=target_args.teacher_max_length,
    )
