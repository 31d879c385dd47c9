"""How long drafts are: as long as they pay."""

from itertools import accumulate
from operator import mul

# Time that one more position takes, in passes over one: measured for 135M parameters in bfloat16 on two cores.
POSITION_COST = 0.015
# Drafts that the share of right tokens at a place is remembered over, about.
MEMORY = 8
# Tokens written without a draft once drafts do not pay; doubled each time they still do not, up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 4, 64


def pass_cost(positions: int) -> float:
    """Time of a pass over so many positions, in passes over one."""
    return 1 + POSITION_COST * (positions - 1)


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
            # The first ones weigh as much as what was expected.
            self.num_noted[place] += 1
            share = 1 / min(MEMORY, 1 + self.num_noted[place])
            self.rates[place] += share * (min(1.0, kept - place) - self.rates[place])
