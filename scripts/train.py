"""
Fits proto-tokens (`--stage fit`) or trains the encoder that predicts them (`--stage train`).

    accelerate launch scripts/train.py --config scripts/recipes/embedded.yaml --stage fit
    accelerate launch scripts/train.py --config scripts/recipes/embedded.yaml --stage train --max_steps 1000

Run the same command again after an interruption: it goes on where it was.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cli
import torch
from embedded import resolve
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from eval_tasks.report import write_json
from eval_tasks.text_metrics import one_step_metrics
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.data import DataArguments, ProtoGenCollator, fitting_targets, load_examples, split_by_instruction
from trainers.fitting import FittingArguments, ProtoTokenFitter
from trainers.proto_bank import BankInfo, ProtoTokenBank, decoder_fingerprint
from trainers.protogen_trainer import ProtoGenTrainer, last_complete_checkpoint
from trainers.training_args import ProtoGenTrainingArguments


@dataclass
class RunArguments:
    """What to do."""

    stage: str = field(default="train", metadata={"help": "fit or train.", "choices": ["fit", "train"]})
    bank: str | None = field(default=None, metadata={"help": "Folder of the bank; OUTPUT_DIR/bank by default."})


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


def fit(run: RunArguments, model_args: ModelArguments, data_args, fit_args: FittingArguments, args) -> None:
    """Fits the training split's answers into the bank, but for those that are there; sums up in OUTPUT_DIR/fit.json."""
    if args.world_size > 1:
        raise ValueError("fitting runs in one process: accelerate launch --num_processes 1.")
    path = resolve(model_args.decoder)
    tokenizer = AutoTokenizer.from_pretrained(path, revision=model_args.decoder_revision)
    decoder = AutoModelForCausalLM.from_pretrained(
        path, revision=model_args.decoder_revision, dtype=getattr(torch, model_args.decoder_dtype)
    ).to(args.device)
    info = bank_info(model_args, decoder)
    fitter = ProtoTokenFitter(decoder, info, fit_args)
    examples, _ = split_by_instruction(load_examples(data_args), data_args.validation_share)
    bank = ProtoTokenBank(run.bank, info)

    texts = fitting_targets(tokenizer, examples[: fit_args.fit_num_texts], fit_args.fit_max_length)
    pending = sorted((id for id in texts if id not in bank), key=lambda id: len(texts[id]))
    print(f"fitting {len(pending)} texts; {len(texts) - len(pending)} are in the bank already")
    with cli.lock(bank.folder), tqdm(total=len(pending), desc="fit", unit="text") as bar:
        for start in range(0, len(pending), fit_args.fit_batch_size):
            batch = pending[start : start + fit_args.fit_batch_size]

            def show(step, perfect, accuracy, start=start):
                bar.n = start + perfect
                bar.set_postfix(step=step, accuracy=f"{accuracy:.3f}")

            bank.append(fitter.fit([(id, texts[id]) for id in batch], on_step=show))
            bar.n = start + len(batch)
    rows = [bank.row(id) for id in texts]
    summary = {
        "texts": len(rows),
        "perfect_texts": sum(row["accuracy"] == 1 for row in rows),
        "reconstruction_accuracy": sum(row["accuracy"] for row in rows) / len(rows),
        "mean_steps_to_best": sum(row["steps"] for row in rows) / len(rows),
        "arrangement": asdict(info),
        "settings": asdict(fit_args),
    }
    write_json(Path(args.output_dir) / "fit.json", summary)
    print(
        f"mean reconstruction accuracy {summary['reconstruction_accuracy']:.4f}, "
        f"{summary['perfect_texts']} of {summary['texts']} texts perfect; bank in {run.bank}"
    )


def train(run: RunArguments, model_args: ModelArguments, data_args, args: ProtoGenTrainingArguments) -> None:
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
    windows = {name: fields.pop(name) for name in ("max_input_length", "max_prompt_length")}

    train_examples, validation_examples = split_by_instruction(load_examples(data_args), data_args.validation_share)
    categories = None
    if model_args.m_scope == "per_category":
        categories = sorted({example.category for example in train_examples})
    model = ProtoGenForConditionalGeneration.from_encoder_decoder_pretrained(
        encoder, decoder, decoder_dtype=decoder_dtype, categories=categories, **revisions, **fields
    )
    config = model.config
    processor = ProtoGenProcessor.from_encoder_decoder_pretrained(
        encoder,
        decoder,
        max_answer_length=config.max_answer_length,
        **windows,
        **revisions,
    )
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
    bank = None
    if args.needs_bank:
        bank = ProtoTokenBank(run.bank, bank_info(model_args, model.decoder))
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
    with cli.lock(output_dir) if trainer.is_world_process_zero() else nullcontext():
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
    parser = cli.RecipeParser(RunArguments, ModelArguments, DataArguments, FittingArguments, ProtoGenTrainingArguments)
    run, model_args, data_args, fit_args, args = parser.parse(arguments)
    run.bank = run.bank or str(Path(args.output_dir) / "bank")
    if run.stage == "fit":
        fit(run, model_args, data_args, fit_args, args)
    else:
        train(run, model_args, data_args, args)


if __name__ == "__main__":
    cli.run(main)
