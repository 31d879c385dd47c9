"""How much the answer's positions attend to `e` while they are read."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from eval_tasks.plots import heatmaps
from eval_tasks.statistics import mean_with_interval

from .reading import BATCH_TOKENS, FittedTexts, Reconstructor
from .study import NoArguments, StudyContext, StudyResult


def attention_to_e(reader: Reconstructor, fitted: FittedTexts) -> torch.Tensor:
    """
    Attention that each predicting position pays to the e-tokens (their weights summed).

    Args:
        reader (`Reconstructor`): its decoder is switched to eager attention, the only one that gives its weights.
        fitted (`FittedTexts`): texts of one length, laid out as `e_mN` or `e_m`.

    Returns:
        `torch.Tensor` of shape `(texts, layers, heads, length)`.

    Raises:
        ValueError: if the lengths differ, or `e` does not only stand at the front.
    """
    lengths = [len(ids) for ids in fitted.token_ids]
    if len(set(lengths)) > 1 or reader.arrangement not in ("e_m", "e_mN"):
        raise ValueError("attention to e needs texts of one length, fitted as e_mN or e_m.")
    reader.decoder.set_attn_implementation("eager")
    sink, num_e = int(reader.sink != "none"), fitted.e.shape[1]
    size, parts = max(1, BATCH_TOKENS // lengths[0]), []
    for first in range(0, len(fitted), size):
        part = slice(first, first + size)
        inputs, predicts = reader.inputs(fitted.e[part], fitted.m[part], lengths[part])
        with torch.no_grad():
            weights = reader.decoder.base_model(**inputs, output_attentions=True).attentions
        to_e = torch.stack([layer[..., sink : sink + num_e].float().sum(-1) for layer in weights], dim=1)
        # The same positions in every text.
        parts.append(to_e[..., predicts[0]].cpu())
    return torch.cat(parts)


def measure(reader: Reconstructor, fitted: FittedTexts, title: str, folder: Path) -> StudyResult:
    """Attention to `e` by layer and head, and by layer and position; and what it were if all places got the same."""
    by_text = attention_to_e(reader, fitted).numpy()
    weights = by_text.mean(0)
    layer, head = np.unravel_index(weights.mean(-1).argmax(), weights.shape[:2])
    first = int(reader.sink != "none") + fitted.e.shape[1] + (reader.arrangement == "e_mN")
    evenly = fitted.e.shape[1] / np.arange(first, first + weights.shape[-1])
    metrics = {
        "attention_to_e": mean_with_interval(by_text.mean((1, 2, 3))),
        "attention_to_e_if_even": float(evenly.mean()),
        "attention_to_e_strongest_head": mean_with_interval(by_text[:, layer, head].mean(-1)),
    }
    thirds = np.array_split(np.arange(weights.shape[-1]), 3)
    for name, places in zip(("first", "middle", "last"), thirds, strict=True):
        metrics[f"attention_to_e_{name}_third"] = mean_with_interval(by_text[..., places].mean((1, 2, 3)))
        metrics[f"attention_to_e_{name}_third_if_even"] = float(evenly[places].mean())
    for layer in range(len(weights)):
        metrics[f"attention_to_e_layer_{layer}"] = mean_with_interval(by_text[:, layer].mean((1, 2)))
    maps = {"mean over positions": weights.mean(2)}, {"mean over heads": weights.mean(1)}
    for values, label in zip(maps, ("head", "position"), strict=True):
        heatmaps(values, ("layer", label), title, folder / f"attention_{label}.png")
    index = pd.MultiIndex.from_product(map(range, weights.shape), names=["layer", "head", "position"])
    return StudyResult(metrics, pd.DataFrame({"attention": weights.ravel()}, index=index).reset_index())


Arguments = NoArguments


def study(context: StudyContext, _: NoArguments) -> StudyResult:
    """Attention to `e` while texts of one length are read."""
    return measure(context.reader, context.fitted(context.source), context.title, context.folder)
