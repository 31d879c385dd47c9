"""
Trees of drafted tokens: beside the most likely draft others, all of which one pass of the decoder verifies (Miao et
al., 2024, https://arxiv.org/abs/2305.09781). A tree is a list of parents: token `i` follows from token
`parents[i - 1]`, which comes before it, and token 0 is the last certain one.
"""

import heapq
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import torch

# Tokens beside the most likely draft, and candidates for each place, at most.
NUM_BESIDE, NUM_CANDIDATES = 16, 8


class Node(NamedTuple):
    """
    A drafted token.

    Args:
        parent (`int`): the token that it follows from.
        depth (`int`): drafted tokens before it.
        rank (`int`): how many tokens at its place are more likely.
        chance (`float`): that it is kept, and with it all that it follows from.
    """

    parent: int
    depth: int
    rank: int
    chance: float


def chain(size: int) -> list[int]:
    """The parents of a draft of one branch."""
    return list(range(size))


def ancestors(parents: Sequence[int]) -> torch.BoolTensor:
    """Which tokens each follows from, itself among them: `(1 + drafted, 1 + drafted)`."""
    follows = torch.eye(1 + len(parents), dtype=torch.bool)
    for token, parent in enumerate(parents, start=1):
        follows[token] |= follows[parent]
    return follows


def grow(probabilities: torch.Tensor, num_rows: int, price: float, price_beside: float, largest: int) -> list[Node]:
    """
    The tree of the tokens that are worth their price, the likeliest first.

    Args:
        probabilities (`torch.Tensor` of shape `(drafts, size, candidates)`): of the most likely tokens at each place of
            some texts' drafts. All texts get the same tree.
        num_rows (`int`): texts that it is verified for.
        price (`float`): of a token of the most likely draft.
        price_beside (`float`): of one beside it.
        largest (`int`): tokens of a tree at most.
    """
    tree, (_, size, num_candidates) = [], probabilities.shape
    # Tokens that may come next: minus their chance, a number that no other has, and what they are.
    frontier, numbers = [], count()

    def consider(parent, depth, rank, is_beside, before):
        if depth < size and rank < num_candidates:
            chances = before * probabilities[:, depth, rank]
            entry = -chances.sum().item() / num_rows, next(numbers), parent, depth, rank, is_beside, before, chances
            heapq.heappush(frontier, entry)

    consider(0, 0, 0, False, probabilities.new_ones(len(probabilities)))
    while frontier and len(tree) < largest:
        minus, _, parent, depth, rank, is_beside, before, chances = heapq.heappop(frontier)
        if -minus <= (price_beside if is_beside else price):
            continue
        tree.append(Node(parent, depth, rank, -minus))
        consider(parent, depth, rank + 1, True, before)
        consider(len(tree), depth + 1, 0, is_beside, chances)
    return tree


def walk(
    tokens: torch.LongTensor, parents: Sequence[int], own: torch.LongTensor
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    From token 0 of each text as far as drafted tokens are the decoder's own.

    Args:
        tokens (`torch.LongTensor` of shape `(batch, drafted)`): no two alike that follow from the same.
        own (`torch.LongTensor` of shape `(batch, 1 + drafted)`): what the decoder says after each.

    Returns:
        The tokens passed, by number, `(batch, 1 + depth)`, the last one again where the walk ends before, and how many
        of them are drafted ones `(batch,)`.
    """
    comes_from = torch.tensor(parents, dtype=torch.long, device=tokens.device)
    depth = int(ancestors(parents).sum(1).max()) - 1
    passed = [torch.zeros_like(own[:, 0])]
    for _ in range(depth):
        here = passed[-1][:, None]
        is_next = (comes_from == here) & (tokens == own.gather(1, here))
        passed.append(torch.where(is_next.any(1), 1 + is_next.long().argmax(1), passed[-1]))
    branches = torch.stack(passed, dim=1)
    return branches, (branches.diff(dim=1) > 0).sum(1)
