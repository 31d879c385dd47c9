"""Imposing meaning: fitting texts under one more loss, which sees them all together."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from modeling_protogen.modeling_protogen import ProtoGenOutput

from .fitting import ProtoTokenFitter, Text, TextFit
from .proto_bank import BankEntry


def fit_with_meaning(
    fitter: ProtoTokenFitter,
    texts: list[Text],
    loss: Callable[[ProtoGenOutput, dict[str, torch.Tensor]], torch.Tensor],
    teacher_embeddings: torch.Tensor,
    weight: float,
    steps: int,
) -> list[BankEntry]:
    """
    Fits the texts for `steps` steps, all in each step, on the sum over texts of cross-entropy and `weight` times each
    one's share of the loss.

    Args:
        fitter (`ProtoTokenFitter`): gives the decoder, the starts and the optimiser's settings.
        texts (`list[Text]`): of one number of chunks.
        loss (`Callable`): one of `trainers.losses`; it sees `outputs.e` and `batch["teacher_embeddings"]`.
        teacher_embeddings (`torch.Tensor` of shape `(texts, teacher_dim)`)

    Returns:
        `list[BankEntry]`: where the texts are after the last step, not the best on the way: that would ignore the loss.
    """
    fits = [TextFit(text) for text in texts]
    for fit in fits:
        fitter.start(fit)
    batch = {"teacher_embeddings": teacher_embeddings.to(fitter.decoder.device)}
    for step in tqdm(range(steps), desc=f"weight {weight:g}", leave=False):
        fitter.backward(fits)
        if weight:
            outputs = ProtoGenOutput(e=torch.stack([fit.e for fit in fits]))
            (weight * len(fits) * loss(outputs, batch)).backward()
        for fit in fits:
            fitter.update([fit.e, fit.m], fit.optimizer, fitter.learning_rate(step, steps))
    entries = []
    for fit in fits:
        entry = BankEntry(fit.text.id, fit.text.token_ids, fit.e.detach().cpu(), fit.m.detach().cpu(), 0.0, steps)
        entry.accuracy = fitter.measure(entry)
        entries.append(entry)
    return entries
