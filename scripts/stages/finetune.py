"""`--stage finetune`: the decoder itself learns to answer, token by token, as the rival of one step."""

from pathlib import Path

from arguments import ModelArguments, TargetArguments, load_processor
from decoders import load_decoder
from transformers import IntervalStrategy

from trainers.files import locked
from trainers.finetuning import fine_tune

from .teacher import instructions_to_learn


def finetune(model_args: ModelArguments, target_args: TargetArguments, data_args, args) -> None:
    """Fine-tunes the decoder on the answers of the data; leaves the merged model in OUTPUT_DIR/model."""
    folder = Path(args.output_dir) / "model"
    if folder.is_dir():
        print(f"already trained: {folder}; remove it to train again")
        return
    _, decoder = load_decoder(model_args.decoder, model_args.decoder_revision, model_args.decoder_dtype, args.device)
    longest = model_args.max_answer_length or model_args.chunk_size * model_args.max_chunks
    processor = load_processor(model_args, longest)
    examples, _ = instructions_to_learn(data_args, target_args, processor)
    # The benchmark measures it once, on the test.
    args.eval_strategy, args.eval_on_start = IntervalStrategy.NO, False
    with locked(Path(args.output_dir) / ".lock"):
        model = fine_tune(decoder, processor, examples, args, model_args.slot_adapter_rank)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"model in {folder}")
