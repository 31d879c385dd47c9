"""The decoder itself learns to answer, token by token, as the rival of one step."""

from pathlib import Path

from transformers import IntervalStrategy

from eval_tasks.recipes import SHARED, RecipeParser
from trainers.arguments import ModelArguments, TargetArguments, load_processor
from trainers.data import DataArguments
from trainers.decoders import load_decoder
from trainers.files import locked, written_aside
from trainers.finetuning import fine_tune
from trainers.training_args import ProtoGenTrainingArguments

from .teacher import instructions_to_learn, teacher_folder

ARGUMENTS = (ModelArguments, TargetArguments, DataArguments, ProtoGenTrainingArguments)


def main(argv: list[str]) -> None:
    finetune(*RecipeParser(*ARGUMENTS, passed_over=SHARED).parse(argv))


def finetune(
    model_args: ModelArguments,
    target_args: TargetArguments,
    data_args: DataArguments,
    args: ProtoGenTrainingArguments,
) -> None:
    """Fine-tunes the decoder on the answers of the data; leaves the merged model in OUTPUT_DIR/model."""
    folder = Path(args.output_dir) / "model"
    if folder.is_dir():
        print(f"already trained: {folder}; remove it to train again")
        return
    _, decoder = load_decoder(
        model_args.decoder,
        model_args.decoder_revision,
        model_args.decoder_dtype,
        args.device,
        model_args.trust_remote_code,
    )
    longest = model_args.max_answer_length or model_args.chunk_size * model_args.max_chunks
    processor = load_processor(model_args, longest)
    examples, _ = instructions_to_learn(data_args, target_args, processor, teacher_folder(target_args, args))
    # The benchmark measures it once, on the test.
    args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    with locked(Path(args.output_dir) / ".lock"):
        model = fine_tune(decoder, processor, examples, args, model_args.slot_adapter_rank)
        with written_aside(folder) as aside:
            model.save_pretrained(aside)
            processor.save_pretrained(aside)
    print(f"model in {folder}")
