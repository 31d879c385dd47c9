"""How long drafts are: as long as they pay."""

import time
from itertools import accumulate
from operator import mul
from statistics import median
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from .autoregressive import DecoderState
from .frozen_decoder import logits_of

# Drafts that the share of right tokens at a place is remembered over, about, and as how many what is expected counts.
MEMORY, PRIOR = 32, 4
# Tokens written without a draft before one is tried that is not expected to pay; doubled each time none of it is kept,
# up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 4, 64
# Tokens that a text gets in the time of a pass over one position, about: what longer passes have to bring.
SPEED = 1.5


class PassCosts(NamedTuple):
    """
    Time of passes of the decoder, in passes over one position.

    Args:
        position (`float`): of each position more.
        slots (`float`): what proto-tokens take beyond their positions, as slot adapters do.
    """

    position: float
    slots: float

    def price(self, batch: int, positions: int, has_slots: bool = False) -> float:
        """Tokens that each text of a batch gets in the time of so many positions more of each, and of slots."""
        seconds = self.position * batch * positions + self.slots * has_slots
        return SPEED * seconds / (1 + self.position * (batch - 1))


@torch.no_grad()
def measured_costs(decoder: PreTrainedModel, num_tokens: int = 64, num_slots: int = 16, rounds: int = 7) -> PassCosts:
    """What passes cost on the machine that the decoder is on, behind `num_tokens` tokens; medians of some rounds."""
    embeddings = decoder.get_input_embeddings()
    text = torch.arange(num_tokens + num_slots, device=decoder.device)[None] % embeddings.num_embeddings
    first, slots = text[:, :num_tokens], embeddings(text[:, num_tokens:])
    passes = {"one": (text[:, :1], None), "more": (text[:, : 1 + num_slots], None), "slots": (text[:, :1], slots)}
    seconds = {name: [] for name in passes}
    for _ in range(rounds):
        for name, (tokens, behind) in passes.items():
            state = DecoderState(decoder, 1)
            state.read(first, torch.ones_like(first))
            begin = time.perf_counter()
            states, of_slots = state.read(tokens, torch.ones_like(tokens), tokens.shape[1], behind)
            states = states if behind is None else torch.cat([states, of_slots[:, 0]], dim=1)
            logits_of(decoder, states).sum().item()
            seconds[name].append(time.perf_counter() - begin)
    one, more, with_slots = (median(seconds[name]) for name in passes)
    return PassCosts(max(0.0, (more - one) / num_slots / one), max(0.0, (with_slots - more) / one))


class DraftLength:
    """
    Chooses the length of drafts by how often the token at each place was kept where those before it were; none while
    drafts do not pay.

    Args:
        longest (`int`): tokens of a draft at most.
        expected (`float`): share of right tokens at each place that is expected before any draft.
    """

    def __init__(self, longest: int, expected: float):
        self.rates, self.num_noted = [expected] * longest, [0] * longest
        self.waiting, self.pause = FIRST_PAUSE, 2 * FIRST_PAUSE

    def chances(self, size: int) -> list[float]:
        """Expected shares of drafts that are kept up to the first, second, ... of `size` tokens."""
        return list(accumulate(self.rates[:size], mul))

    def kept(self, size: int) -> float:
        """Tokens of a draft of this size that are expected to be kept."""
        return sum(self.chances(size))

    def next(self, gains: list[float]) -> int:
        """
        The size that gains the most. Where none does, 0, but after pauses one is tried all the same: later another
        place of the text may be easier.

        Args:
            gains (`list[float]`): expected of drafts of 1, 2, ... tokens, in tokens.
        """
        if not gains:
            return 0
        size = 1 + gains.index(max(gains))
        if gains[size - 1] > 0:
            return size
        if self.waiting:
            self.waiting -= 1
            return 0
        self.waiting, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        return size

    def note(self, size: int, kept: float) -> None:
        """Counts a draft of `size` tokens of which the first `kept` were kept, on average where there are several."""
        if kept:
            self.waiting, self.pause = FIRST_PAUSE, 2 * FIRST_PAUSE
        for place in range(min(size, int(kept) + 1)):
            self.num_noted[place] += 1
            share = 1 / min(MEMORY, PRIOR + self.num_noted[place])
            self.rates[place] += share * (min(1.0, kept - place) - self.rates[place])
