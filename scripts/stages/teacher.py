"""`--stage teacher`: the frozen decoder writes instructions, where asked, and answers them."""

from pathlib import Path

from arguments import ModelArguments, TargetArguments, load_processor, open_accelerator
from decoders import load_decoder

from trainers.data import load_examples
from trainers.proto_bank import decoder_fingerprint
from trainers.synthetic_instructions import INSTRUCTIONS_NAME, synthetic_examples, write_instructions
from trainers.teacher import TeacherInfo, prompt_template, write_teacher_answers


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


def teacher_info(model_args: ModelArguments, target_args: TargetArguments, decoder, processor) -> TeacherInfo:
    return TeacherInfo(
        decoder=model_args.decoder,
        decoder_revision=model_args.decoder_revision,
        decoder_fingerprint=decoder_fingerprint(decoder),
        template=prompt_template(processor),
        max_prompt_length=processor.max_prompt_length,
        max_length=target_args.teacher_max_length,
    )
