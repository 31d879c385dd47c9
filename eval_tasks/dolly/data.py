"""What the YAML here names; lm-eval looks for it beside the file."""

from eval_tasks.benchmark_data import dolly, dolly_german
from eval_tasks.text_metrics import bleu, chrf, is_degenerate, rouge_l, token_f1
from modeling_protogen.processing_protogen import user_message

__all__ = ["dolly", "dolly_german", "process_results", "prompt"]


def prompt(doc: dict) -> str:
    return user_message(doc["instruction"].strip(), doc["context"].strip())


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    answers, references = [results[0].strip()], [doc["response"].strip()]
    functions = {"rouge_l": rouge_l, "bleu": bleu, "chrf": chrf, "token_f1": token_f1}
    metrics = {name: function(answers, references)[0] for name, function in functions.items()}
    return metrics | {"degenerate": float(is_degenerate(answers)[0])}
