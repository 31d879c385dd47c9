"""What the `evaluate` modules in metrics/ have in common: a prediction and a reference an answer."""

import datasets
import evaluate


def metric_info(description: str, citation: str, inputs: str, dtype: str = "float64") -> evaluate.MetricInfo:
    """Of a metric whose predictions and references are one value an answer, a number by default."""
    values = datasets.Value(dtype)
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description=inputs,
        features=datasets.Features({"predictions": values, "references": values}),
    )
