"""How long drafts are: as long as they pay."""

# The latest draft counts this much in the running mean of kept tokens.
LATEST = 0.5
# Tokens written without a draft once drafts do not pay; doubled each time they still do not, up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 4, 64


class DraftLength:
    """
    Adapts the draft length to about twice the recent accepted length, and pauses drafting while it does not pay.

    Args:
        expected (`float`): tokens that the first draft is expected to keep.
        break_even (`float`): tokens that have to be kept of a draft, on average, for the time that it takes.
    """

    def __init__(self, expected: float, break_even: float):
        self.usually_kept = expected
        self.break_even = break_even
        self.pause, self.waiting = FIRST_PAUSE, 0

    def next(self) -> int:
        """Tokens to draft now, maybe none."""
        if self.waiting:
            self.waiting -= 1
            return 0
        return 1 + round(2 * self.usually_kept)

    def note(self, kept: float) -> None:
        """Counts a draft of which `kept` tokens were kept."""
        self.usually_kept += LATEST * (kept - self.usually_kept)
        if self.usually_kept >= self.break_even:
            self.pause = FIRST_PAUSE
        else:
            self.waiting, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
