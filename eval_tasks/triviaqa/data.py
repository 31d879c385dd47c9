"""What the YAML here names; lm-eval looks for it beside the file."""

from eval_tasks.benchmark_data import triviaqa

__all__ = ["triviaqa"]
