"""Tokens from logits, the most likely or drawn, and how probable they are."""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# Rows of a vocabulary's width that are in float32 at once.
ROWS = 128


@dataclass
class Sampling:
    """
    Args:
        temperature (`float`): 0 takes the most likely token; above, tokens are drawn with logits divided by it.
        top_p (`float`): draws among the most likely tokens only, which together have this probability
            (Holtzman et al., 2020, https://arxiv.org/abs/1904.09751).
        top_k (`int`): draws among this many of the most likely tokens only; 0 for all.

    Raises:
        ValueError: if the temperature or `top_k` is negative, or `top_p` is outside of (0, 1] or has nothing to draw.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative; got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1]; got {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative; got {self.top_k}.")
        if self.is_greedy and self.top_p < 1:
            raise ValueError("top_p needs a temperature above 0: at 0 the most likely token is taken.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What is drawn from, `(..., vocab)` in float32; not for a temperature of 0."""
        warpers = LogitsProcessorList([TemperatureLogitsWarper(self.temperature)])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers(None, logits.flatten(end_dim=-2).float()).softmax(-1).view(logits.shape)

    def probability(self, logits: torch.Tensor, tokens: torch.LongTensor, rows: int = ROWS) -> torch.Tensor:
        """Of tokens `(...)` where they are drawn from `(..., vocab)`, a few rows at a time: `(...)`."""
        blocks = zip(logits.flatten(end_dim=-2).split(rows), tokens.flatten().split(rows), strict=True)
        found = [self.probabilities(block).gather(-1, drawn[:, None])[:, 0] for block, drawn in blocks]
        return torch.cat(found).view(tokens.shape)

    def pick(self, logits: torch.Tensor, rows: int = ROWS) -> torch.LongTensor:
        """
        A token from each `(..., vocab)`, drawn a few rows at a time: `(...)`.

        Raises:
            ValueError: if the logits are not finite.
        """
        # `argmax` over bfloat16 is several times slower than `max` on CPUs. NaN is the largest of all.
        largest, tokens = logits.max(-1)
        if not largest.isfinite().all():
            raise ValueError(
                "the decoder's logits are not finite: the model's weights or the proto-tokens are damaged, or too "
                f"large for {logits.dtype}; load the model again, or in float32."
            )
        if self.is_greedy:
            return tokens
        blocks = logits.flatten(end_dim=-2).split(rows)
        return torch.cat([torch.multinomial(self.probabilities(block), 1) for block in blocks]).view(tokens.shape)


def log_normalizer(logits: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """`logsumexp` over the vocabulary in float32, a few rows at a time: `(tokens, vocab)` in, `(tokens,)` out."""
    return torch.cat([block.float().logsumexp(-1) for block in logits.split(rows)])


def log_probability(logits: torch.Tensor, tokens: torch.LongTensor) -> torch.Tensor:
    """Of tokens `(...)` at temperature 1, in float32: `(...)`; logits are `(..., vocab)`."""
    normalizer = log_normalizer(logits.flatten(end_dim=-2)).view(tokens.shape)
    return logits.gather(-1, tokens[..., None])[..., 0].float() - normalizer


def token_entropy(logits: torch.Tensor, rows: int = ROWS) -> torch.Tensor:
    """Entropy in nats of each row's distribution: `(tokens, vocab)` in, `(tokens,)` out."""
    entropies = []
    for block in logits.split(rows):
        log_p = block.float().log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(entropies)
