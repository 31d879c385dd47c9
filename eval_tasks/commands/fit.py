"""Fits proto-tokens to given texts, into a bank. Run the same command again after an interruption: it goes on."""

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from eval_tasks.recipes import SHARED, RecipeParser
from eval_tasks.report import write_json
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from trainers.arguments import BankArguments, FitInputArguments, ModelArguments, bank_info, open_accelerator
from trainers.data import DataArguments, Example, categories_of, fitting_targets, load_examples, split_by_instruction
from trainers.decoders import load_decoder
from trainers.fit_bank import fit_bank, with_predicted_starts
from trainers.fitting import FittingArguments, ProtoTokenFitter, Text
from trainers.proto_bank import ProtoTokenBank, remove_damaged, same_vectors
from trainers.training_args import ProtoGenTrainingArguments

ARGUMENTS = (
    FitInputArguments,
    BankArguments,
    ModelArguments,
    DataArguments,
    FittingArguments,
    ProtoGenTrainingArguments,
)


def main(argv: list[str]) -> None:
    fit(*RecipeParser(*ARGUMENTS, passed_over=SHARED).parse(argv))


def fit(
    inputs: FitInputArguments,
    bank_args: BankArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    fit_args: FittingArguments,
    args: ProtoGenTrainingArguments,
) -> None:
    """Fits the training split's answers into the bank, but for those that are there; sums up in OUTPUT_DIR/fit.json."""
    folder, accelerator = bank_args.folder(args.output_dir), open_accelerator(args)
    tokenizer, decoder = load_decoder(
        model_args.decoder,
        model_args.decoder_revision,
        model_args.decoder_dtype,
        accelerator.device,
        model_args.trust_remote_code,
    )
    info = bank_info(model_args, decoder)
    if inputs.refit_damaged and accelerator.is_main_process:
        for path in remove_damaged(folder, info):
            print(f"{path.name} was damaged, or rests on what was: it is made again")
    accelerator.wait_for_everyone()
    bank = ProtoTokenBank(folder, info)
    bank.verify()
    if model_args.m_scope == "fixed":
        fix_m(bank, inputs.fixed_m)
    examples, held_out = split_by_instruction(load_examples(data_args), data_args.validation_share)
    examples = examples[: fit_args.fit_num_texts] + held_out[: inputs.fit_num_validation]
    texts = texts_to_fit(inputs, model_args, fit_args, bank, tokenizer, examples, accelerator.device)
    check_same_texts(bank, texts)
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
        "data": data_args.data,
        "padding_share": fitter.num_padding / max(fitter.num_positions, 1),
        "arrangement": asdict(bank.info),
        "settings": asdict(fit_args),
    }
    write_json(Path(args.output_dir) / "fit.json", summary)
    print(
        f"mean reconstruction accuracy {summary['reconstruction_accuracy']:.4f}, "
        f"{summary['perfect_texts']} of {summary['texts']} texts perfect; bank in {folder}"
    )


def fix_m(bank: ProtoTokenBank, path: str | None) -> None:
    """
    Writes the vector that all of the bank's texts share, if it is not there yet.

    Raises:
        ValueError: if nothing says which one, or the bank has another one.
    """
    there = bank.shared_m()
    if path is None and there is None:
        raise ValueError("m_scope=fixed needs the vector: --fixed_m FILE.safetensors with a tensor m.")
    given = None if path is None else {"": load_file(path)["m"].view(1, bank.info.dim).float()}
    if there is None:
        bank.write_shared_m(given)
    elif given is not None and not same_vectors(there, given):
        raise ValueError(f"the bank in {bank.folder} was fitted with another m than {path}: use another bank folder.")


def check_same_texts(bank: ProtoTokenBank, texts: list[Text]) -> None:
    """
    Raises:
        ValueError: if the bank holds a text with other tokens than it has now.
    """
    other = [text for text in texts if text.id in bank and bank.row(text.id)["token_ids"] != text.token_ids]
    if other:
        there = bank.row(other[0].id)["token_ids"]
        raise ValueError(
            f"{len(other)} of {len(texts)} texts are in the bank in {bank.folder} with other tokens, text "
            f"{other[0].id} with {len(there)} where it has {len(other[0].token_ids)} now: use another bank folder, or "
            "the fit_max_length it was fitted with."
        )


def texts_to_fit(
    inputs: FitInputArguments,
    model_args: ModelArguments,
    fit_args: FittingArguments,
    bank: ProtoTokenBank,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    device: torch.device,
) -> list[Text]:
    targets = fitting_targets(tokenizer, examples, fit_args.fit_max_length)
    groups = {example.id: "" for example in examples}
    if model_args.m_scope == "per_category":
        categories_of(examples)
        groups = {example.id: example.category for example in examples}
    texts = [Text(id, token_ids, groups[id]) for id, token_ids in targets.items()]
    if inputs.warm_start:
        model = ProtoGenForConditionalGeneration.from_pretrained(inputs.warm_start).to(device)
        processor = ProtoGenProcessor.from_pretrained(inputs.warm_start)
        if inputs.warm_start_reads_text:
            # No more than is fitted of it, which fits the model's window.
            cut = tokenizer.batch_decode([text.token_ids for text in texts], skip_special_tokens=True)
            pairs = zip(examples, cut, strict=True)
            examples = [replace(example, instruction=text, context="") for example, text in pairs]
        texts = with_predicted_starts(texts, examples, model, processor, bank.info)
    return texts
