"""What the YAML here names; lm-eval looks for it beside the file."""

from eval_tasks.benchmark_data import gsm8k

__all__ = ["gsm8k"]
