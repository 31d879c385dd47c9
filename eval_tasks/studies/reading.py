"""Fitted texts, and what the frozen decoder reads from their proto-tokens in one pass."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from modeling_protogen.frozen_decoder import joined_inputs, logits_of, sink_ids
from modeling_protogen.proto_tokens import build_layout, fill_slots

BATCH_TOKENS = 1024


@dataclass
class FittedTexts:
    """
    Texts with their proto-tokens, one chunk each.

    Args:
        token_ids (`list[list[int]]`): in the decoder's vocabulary; lengths may differ.
        e (`torch.FloatTensor` of shape `(texts, num_e_tokens, dim)`), m (`torch.FloatTensor` of shape `(texts, dim)`)
        texts (`list[str]`): decoded.
        categories (`list[str]`): empty strings where there are none.
    """

    token_ids: list[list[int]]
    e: torch.Tensor
    m: torch.Tensor
    texts: list[str]
    categories: list[str]

    def __len__(self) -> int:
        return len(self.token_ids)


class Reconstructor:
    """
    Reads texts from proto-tokens.

    Args:
        decoder (`PreTrainedModel`): the frozen causal language model.
        arrangement, sink (`str`): as the proto-tokens were fitted.
    """

    def __init__(self, decoder: PreTrainedModel, arrangement: str, sink: str):
        self.decoder = decoder.eval()
        self.arrangement = arrangement
        self.sink = sink

    def inputs(self, e: torch.Tensor, m: torch.Tensor, lengths: list[int]) -> tuple[dict, torch.BoolTensor]:
        """
        The decoder's inputs for `e` `(batch, num_e_tokens, dim)` and `m` `(batch, dim)`, and which of their positions
        `(batch, positions)` predict a token.
        """
        device = self.decoder.device
        tensor = torch.tensor(lengths, device=device)
        layout = build_layout(tensor, self.arrangement, max(lengths), 1, e.shape[1])
        slots = fill_slots(layout, e[:, None].to(device), m[:, None].to(device))
        sink = sink_ids(self.decoder.config, self.sink, len(lengths), device)
        return joined_inputs(self.decoder, slots, layout, sink)

    def logits(self, e: torch.Tensor, m: torch.Tensor, lengths: list[int]) -> Iterator[torch.Tensor]:
        """The one-step logits `(length, vocab)` of each text, float32, text after text."""
        size = max(1, BATCH_TOKENS // max(lengths))
        for first in range(0, len(lengths), size):
            part = slice(first, first + size)
            inputs, predicts = self.inputs(e[part], m[part], lengths[part])
            with torch.no_grad():
                states = self.decoder.base_model(use_cache=False, **inputs).last_hidden_state[predicts]
            for state in states.split(lengths[part]):
                with torch.no_grad():
                    yield logits_of(self.decoder, state).float()

    def read(self, e: torch.Tensor, m: torch.Tensor, lengths: list[int]) -> list[list[int]]:
        """The most likely token at each position of each text."""
        return [logits.argmax(-1).tolist() for logits in self.logits(e, m, lengths)]

    def accuracies(self, e: torch.Tensor, m: torch.Tensor, token_ids: list[list[int]]) -> list[float]:
        """The reconstruction accuracy of each text."""
        return [share_equal(a, b) for a, b in zip(self.read(e, m, [len(t) for t in token_ids]), token_ids, strict=True)]


def share_equal(a: list[int], b: list[int]) -> float:
    """Share of positions with equal tokens, over the shorter of the two."""
    pairs = list(zip(a, b, strict=False))
    return sum(x == y for x, y in pairs) / len(pairs)
