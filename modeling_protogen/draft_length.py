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
# Tokens written without a draft once drafts do not pay; doubled each time they still do not, up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 4, 64


class PassCosts(NamedTuple):
    """
    Time of passes of the decoder, in passes over one position.

    Args:
        position (`float`): of each position more.
        slots (`float`): what proto-tokens take beyond their positions, as slot adapters do.
    """

    position: float
    slots: float

    def __call__(self, positions: int, has_slots: bool) -> float:
        return 1 + self.position * (positions - 1) + self.slots * has_slots

    def relative(self, batch: int, num_drafted: int, num_slots: int, later: int) -> float:
        """
        Time of a pass that verifies drafts with so many slots behind each token, and of `later` positions of another
        pass, in passes without these slots and positions.
        """
        read = batch * (1 + num_drafted)
        return self(read * (1 + num_slots) + batch * later, num_slots > 0) / self(read, False)


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
    Chooses the length of drafts that writes the most tokens in a time, by how often the token at each place was kept
    where those before it were; none while drafts do not pay.

    Args:
        longest (`int`): tokens of a draft at most.
        expected (`float`): share of right tokens at each place that is expected before any draft.
    """

    def __init__(self, longest: int, expected: float):
        self.rates, self.num_noted = [expected] * longest, [0] * longest
        self.pause, self.waiting = FIRST_PAUSE, 0

    def kept(self, size: int) -> float:
        """Tokens of a draft of this size that are expected to be kept."""
        return sum(accumulate(self.rates[:size], mul))

    def best(self, costs: list[float]) -> int:
        """
        The size from 0 on that writes the most tokens in a time.

        Args:
            costs (`list[float]`): time with a draft of 1, 2, ... tokens, in times without.
        """
        gains = [1.0, *((1 + self.kept(size)) / cost for size, cost in enumerate(costs, start=1))]
        return gains.index(max(gains))

    def next(self, costs: list[float]) -> int:
        """As `best`, but after pauses, in which there are no drafts, one is tried, however little is expected of it."""
        if self.waiting:
            self.waiting -= 1
            return 0
        size = self.best(costs)
        if not size and costs:
            # Later another place of the text may be easier.
            self.waiting, self.pause = self.pause - 1, min(2 * self.pause, LONGEST_PAUSE)
            self.rates[0] = max(self.rates[0], 1.001 * costs[0] - 1)
        return size

    def note(self, size: int, kept: float) -> None:
        """Counts a draft of `size` tokens of which the first `kept` were kept, on average where there are several."""
        if kept:
            self.pause = FIRST_PAUSE
        for place in range(min(size, int(kept) + 1)):
            self.num_noted[place] += 1
            share = 1 / min(MEMORY, PRIOR + self.num_noted[place])
            self.rates[place] += share * (min(1.0, kept - place) - self.rates[place])
