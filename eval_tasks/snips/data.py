"""What the YAML here names; lm-eval looks for it beside the file."""

from eval_tasks.benchmark_data import snips
from eval_tasks.slot_filling import exact_match, intent_accuracy, micro_f1, slot_counts, valid_json
from modeling_protogen.processing_protogen import user_message

__all__ = ["micro_f1", "process_results", "prompt", "snips"]


def prompt(doc: dict) -> str:
    return user_message(doc["instruction"].strip(), doc["context"].strip())


def process_results(doc: dict, results: list[str]) -> dict[str, float | tuple[int, ...]]:
    """Of one answer; `slot_f1` is what `micro_f1` makes of all answers' counts."""
    answers, references = [results[0]], [doc["response"]]
    return {
        "exact_match": exact_match(answers, references)[0],
        "intent_accuracy": intent_accuracy(answers, references)[0],
        "slot_f1": tuple(slot_counts(answers, references)[0].tolist()),
        "valid_json": valid_json(answers)[0],
    }
