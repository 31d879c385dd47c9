"""What the YAML here names; lm-eval looks for it beside the file."""

from eval_tasks.benchmark_data import mmlu

__all__ = ["mmlu"]
