"""Bézier curves between two solutions of the same texts."""

import torch
from torch import nn
from tqdm import tqdm

from .fitting import ProtoTokenFitter, Text, TextFit
from .proto_bank import BankEntry


def bezier(start: torch.Tensor, control: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """The quadratic Bézier curve `(1-t)^2 start + 2 t (1-t) control + t^2 end`."""
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end


def fit_bezier_controls(
    fitter: ProtoTokenFitter, starts: list[BankEntry], ends: list[BankEntry], steps: int, seed: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Learns the control points of curves along which texts stay reconstructed: they minimise the texts' cross-entropy at
    a point of the curve that is drawn again in each step (Mezentsev & Oseledets, arXiv:2505.21189, equation 4; Garipov
    et al., 2018, arXiv:1802.10026).

    Args:
        fitter (`ProtoTokenFitter`): gives the decoder and the optimiser's settings.
        starts, ends (`list[BankEntry]`): two solutions of each text.
        steps (`int`): optimisation steps.

    Returns:
        The control points of `e` `(chunks, num_e_tokens, dim)` and `m` `(chunks, dim)`, a pair for each text.
    """
    device, generator = fitter.decoder.device, torch.Generator().manual_seed(seed)
    ends_of = [
        [(a.e.to(device), b.e.to(device)), (a.m.to(device), b.m.to(device))] for a, b in zip(starts, ends, strict=True)
    ]
    controls = [[nn.Parameter((a + b) / 2) for a, b in pairs] for pairs in ends_of]
    texts = [Text(entry.id, entry.token_ids) for entry in starts]
    optimizers = [fitter.optimizer(pair) for pair in controls]
    for step in tqdm(range(steps), desc="curves", leave=False):
        where = torch.rand(len(texts), generator=generator).tolist()
        fits = []
        for text, pairs, control, t in zip(texts, ends_of, controls, where, strict=True):
            e, m = (bezier(a, c, b, t) for (a, b), c in zip(pairs, control, strict=True))
            fits.append(TextFit(text, e, m))
        fitter.backward(fits)
        for pair, optimizer in zip(controls, optimizers, strict=True):
            fitter.update(pair, optimizer, fitter.learning_rate(step, steps))
    return [tuple(c.detach().cpu() for c in pair) for pair in controls]
