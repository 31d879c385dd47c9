"""What the `evaluate` modules in metrics/ have in common: two numbers an answer."""

import datasets
import evaluate


def metric_info(description: str, citation: str, inputs: str) -> evaluate.MetricInfo:
    """Of a metric whose predictions and references are one number an answer."""
    numbers = datasets.Value("float64")
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=datasets.Features({"predictions": numbers, "references": numbers}),
    )
