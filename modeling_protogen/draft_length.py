"""How long drafts are: as long as they pay."""

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
        costs (`list[float]`): time of a round with drafts of 1, 2, ... tokens, in rounds without; up to the longest.
        expected (`float`): share of right tokens at each place that is expected before any draft.
    """

    def __init__(self, costs: list[float], expected: float):
        self.costs = costs
        self.rates, self.num_noted = [expected] * len(costs), [0] * len(costs)
        self.pause, self.waiting = FIRST_PAUSE, 0

    def next(self) -> int:
        """Tokens to draft now, maybe none."""
        if self.waiting:
            self.waiting -= 1
            return 0
        best, gain = 0, 1.0
        tokens = probability = 1.0
        for size, (rate, cost) in enumerate(zip(self.rates, self.costs, strict=True), start=1):
            probability *= rate
            tokens += probability
            if tokens / cost > gain:
                best, gain = size, tokens / cost
        if best:
            return best
        # Then another place of the text may be easier.
        self.waiting, self.pause = self.pause - 1, min(2 * self.pause, LONGEST_PAUSE)
        if self.costs:
            self.rates[0] = max(self.rates[0], 1.001 * self.costs[0] - 1)
        return 0

    def note(self, size: int, kept: float) -> None:
        """Counts a draft of `size` tokens of which the first `kept` were kept, on average where there are several."""
        if kept:
            self.pause = FIRST_PAUSE
        for place in range(min(size, int(kept) + 1)):
            # The first ones weigh as much as what was expected.
            self.num_noted[place] += 1
            share = 1 / min(MEMORY, 1 + self.num_noted[place])
            self.rates[place] += share * (min(1.0, kept - place) - self.rates[place])
