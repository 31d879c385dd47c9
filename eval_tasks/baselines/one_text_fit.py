"""Fitting as the paper and the public peers do it: one text at a time."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel


@dataclass
class OneTextFit:
    """
    Args:
        e, m (`torch.FloatTensor` of shape `(dim,)`): the proto-tokens with the best accuracy.
        accuracy (`float`): their reconstruction accuracy.
        steps (`int`): optimisation steps that were made.
    """

    e: torch.Tensor
    m: torch.Tensor
    accuracy: float
    steps: int


def fit_one_text(
    decoder: PreTrainedModel, token_ids: list[int], sink_id: int | None, max_steps: int = 5000, seed: int = 0
) -> OneTextFit:
    """
    Fits `[sink][e][m]...[m]` to one text by the recipe of Mezentsev & Oseledets (arXiv:2505.21189, section 3): both
    vectors from N(0, 1), AdamW at 0.01, betas 0.9 and 0.9, weight decay 0.01, until every token is right.

    Args:
        decoder (`PreTrainedModel`): is frozen here.
        token_ids (`list[int]`): the text; each of its tokens is predicted by an `m`.
        sink_id (`int`, *optional*): a real token before `e`; the paper has none.
        max_steps (`int`), seed (`int`)
    """
    decoder.requires_grad_(False).eval()
    device, length = decoder.device, len(token_ids)
    generator = torch.Generator().manual_seed(seed)
    dim = decoder.get_input_embeddings().embedding_dim
    e, m = (nn.Parameter(torch.randn(dim, generator=generator).to(device)) for _ in range(2))
    optimizer = torch.optim.AdamW([e, m], lr=0.01, betas=(0.9, 0.9), weight_decay=0.01)
    targets = torch.tensor(token_ids, device=device)
    sink = decoder.get_input_embeddings()(torch.tensor([] if sink_id is None else [sink_id], device=device).long())
    best = OneTextFit(e.detach().clone(), m.detach().clone(), 0.0, 0)
    for step in range(max_steps + 1):
        inputs = torch.cat([sink, torch.stack([e, *[m] * length]).to(decoder.dtype)])
        logits = decoder(inputs_embeds=inputs[None], use_cache=False).logits[0, -length:]
        accuracy = (logits.argmax(-1) == targets).float().mean().item()
        if accuracy > best.accuracy:
            best = OneTextFit(e.detach().clone(), m.detach().clone(), accuracy, step)
        if accuracy == 1 or step == max_steps:
            break
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
    return OneTextFit(best.e, best.m, best.accuracy, step)
