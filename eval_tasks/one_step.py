"""One-step answers to held-out instructions, and how they compare with what was to be said."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.objectives import IGNORE_INDEX, argmax_tokens
from modeling_protogen.proto_tokens import flatten_proto_tokens

from .retrieval import nearest_rows
from .text_metrics import share_of_equal


def one_step_records(
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    instructions: list[str],
    contexts: list[str],
    targets: list[str | list[int]],
    category_ids: torch.LongTensor | None = None,
    banked: np.ndarray | None = None,
    batch_size: int = 16,
) -> pd.DataFrame:
    """
    Answers every instruction once.

    Args:
        instructions, contexts (`list[str]`)
        targets (`list[str | list[int]]`): the answers to compare with, as text or tokens: human or the teacher's.
        category_ids (`torch.LongTensor` of shape `(texts,)`, *optional*): as in the model's `forward`.
        banked (`np.ndarray` of shape `(bank, dim)`, *optional*): known texts' proto-tokens, from
            `flatten_proto_tokens`; adds `bank_distance`, the cosine distance of the predicted ones to the nearest.

    Returns:
        A row for each instruction: `answer` and `target` (texts), `agreement` and `accepted_length` with the target at
        its own length, `exact_match` and `wrong_share` of the target's tokens in the answer at its predicted length,
        `length` of the target in tokens before any cut, `log_length_mean`, `log_length_variance`, and all of
        `UNCERTAINTY_SCORES`.
    """
    model.eval()
    rows = []
    with torch.no_grad():
        for first in tqdm(range(0, len(instructions), batch_size), desc="answer", leave=False):
            part = slice(first, first + batch_size)
            inputs = processor(instructions[part], contexts[part], targets[part]).to(model.device)
            if category_ids is not None:
                inputs["category_ids"] = category_ids[part].to(model.device)
            rows += _rows(model, processor, inputs, banked)
    return pd.DataFrame(rows)


def _rows(model, processor, inputs, banked) -> Iterator[dict]:
    labels, lengths = inputs.pop("labels"), inputs.pop("length_labels")
    forced = model(**inputs, labels=labels, return_loss=False)
    is_token = labels != IGNORE_INDEX
    agree = (argmax_tokens(forced.answer_logits, labels) == labels) & is_token
    num_tokens = is_token.sum(-1)
    output = model.generate(**inputs, return_dict_in_generate=True, output_uncertainty_scores=True)
    answers = processor.batch_decode(output.sequences)
    references = processor.batch_decode(labels.masked_fill(~is_token, model.config.answer_pad_token_id))
    distances = None
    if banked is not None:
        distances = nearest_rows(flatten_proto_tokens(forced.e, forced.m).cpu().numpy(), banked)[1][:, 0]
    for row, answer in enumerate(answers):
        written, target = output.sequences[row, : output.lengths[row]], labels[row, : num_tokens[row]]
        yield {
            "answer": answer,
            "target": references[row],
            "agreement": (agree[row].sum() / num_tokens[row]).item(),
            "accepted_length": agree[row].int().cumprod(-1).sum().item(),
            "exact_match": float(answer.strip() == references[row].strip()),
            "wrong_share": 1 - share_of_equal(written.tolist(), target.tolist()),
            "length": lengths[row].item(),
            "log_length_mean": forced.log_length_mean[row].item(),
            "log_length_variance": forced.log_length_variance[row].item(),
            **{name: values[row].item() for name, values in output.uncertainty_scores.items()},
            **({} if distances is None else {"bank_distance": float(distances[row])}),
        }
