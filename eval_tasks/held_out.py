"""A trained model on held-out answers: it is calibrated on one half of them and measured on the other."""

from pathlib import Path

import numpy as np
import torch

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.configuration_protogen import UNCERTAINTY_SCORES, category_id
from modeling_protogen.proto_tokens import flatten_proto_tokens
from trainers.data import Example
from trainers.proto_bank import ProtoTokenBank, stack_entries

from .calibration import calibrate_length, calibrate_uncertainty, rank_correlations
from .length_calibration import constant_baseline, length_metrics, linear_baseline
from .one_step import one_step_records
from .report import write_csv, write_json


def calibrate(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    train_examples: list[Example],
    validation_examples: list[Example],
    bank: ProtoTokenBank | None,
    folder: Path,
) -> None:
    """
    Calibrates the model on every other validation example and measures it on the rest; too few are left alone. With a
    bank, the distance to its nearest text is measured as an uncertainty too; a checkpoint alone cannot have it.
    """
    calibration, test = validation_examples[::2], validation_examples[1::2]
    if len(test) < 2:
        print("too few validation examples to calibrate lengths and uncertainty on")
        return

    banked = None
    if bank is not None:
        banked = flatten_proto_tokens(*stack_entries([bank[example.id] for example in train_examples])).numpy()

    def records(examples):
        categories = model.config.categories
        category_ids = categories and torch.tensor([category_id(e.category, categories) for e in examples])
        texts = [e.instruction for e in examples], [e.context for e in examples], [e.target for e in examples]
        return one_step_records(model, processor, *texts, category_ids, banked).assign(id=[e.id for e in examples])

    calibrate_length(model.config, records(calibration))
    seen, found = records(calibration), records(test)
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
    metrics = length_metrics(predictions, found["length"].to_numpy())
    scores = UNCERTAINTY_SCORES if bank is None else (*UNCERTAINTY_SCORES, "bank_distance")
    metrics |= {f"rank_correlation_{name}": value for name, value in rank_correlations(found, scores).items()}
    write_json(folder / "calibration.json", {"uncertainty_score": model.config.uncertainty_score, "metrics": metrics})
    write_csv(folder / "answers.csv", [row for part in (seen, found) for row in part.to_dict("records")])
