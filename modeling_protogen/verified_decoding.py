"""
Verified decoding: drafts are kept as far as the decoder would have written them itself, token by token: greedily, or,
by speculative sampling (Leviathan et al., 2023, https://arxiv.org/abs/2211.17192), with its own probabilities.
"""

import math
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .autoregressive import DecoderState
from .block_decoding import Drafter, GenerationBuffer
from .draft_length import DraftLength, PassCosts
from .draft_tree import NUM_BESIDE, NUM_CANDIDATES, chain, grow, walk
from .frozen_decoder import longest_pair_masked
from .prompt_lookup import continuation
from .sampling import Sampling, log_normalizer, log_probability

# Tokens of a draft from the text itself at most.
LONGEST_LOOKUP = 10
# The logit of a drafted token that was not drawn.
CERTAIN = 1e4
# Share of right tokens at each place that is expected before any draft: from slots, where a token of the draft before
# was wrong and where none was; and from the text, by whether its first token is the most likely one at the slots too,
# None where no slots lie.
EXPECTED_OF_SLOTS = {False: 0.4, True: 0.6}
EXPECTED_OF_LOOKUP = {True: 0.8, False: 0.5, None: 0.7}


def accept(
    drafts: torch.LongTensor, draft_logits: torch.Tensor | None, target_logits: torch.Tensor, sampling: Sampling
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Algorithm 1 of Leviathan et al.: what is kept of a draft and the token after that have the decoder's distribution,
    where tokens are drawn.

    Args:
        drafts (`torch.LongTensor` of shape `(batch, size)`), draft_logits (`torch.Tensor` of shape `(batch, size,
            vocab)`, *optional*): drafted tokens, maybe none, and what they were drawn from; None for tokens that were
            not drawn.
        target_logits (`torch.Tensor` of shape `(batch, size + 1, vocab)`): the decoder's own, before and after each.

    Returns:
        Drafted tokens that are kept, and the decoder's token after them, each `(batch,)`.
    """
    if not drafts.shape[1]:
        return torch.zeros(len(drafts), dtype=torch.long, device=drafts.device), sampling.pick(target_logits)[:, 0]
    if draft_logits is None:
        draft_logits = CERTAIN * F.one_hot(drafts, target_logits.shape[-1]).to(target_logits.dtype)
    ratio = sampling.probability(target_logits[:, :-1], drafts) / sampling.probability(draft_logits, drafts)
    kept = (torch.rand_like(ratio) < ratio).long().cumprod(1).sum(1)
    rows, size = torch.arange(len(drafts), device=drafts.device), drafts.shape[1]
    p = sampling.probabilities(target_logits[rows, kept])
    q = sampling.probabilities(draft_logits[rows, kept.clamp_max(size - 1)])
    # Nothing was drafted after the last: there the decoder's own distribution is left whole.
    left = (p - q * (kept < size)[:, None]).clamp_min(0)
    return kept, torch.multinomial(left, 1)[:, 0]


class Draft(NamedTuple):
    """
    Tokens that the next pass verifies, maybe none.

    Args:
        tokens (`torch.LongTensor` of shape `(batch, size)`)
        parents (`list[int]`): which token each follows from, as in [`draft_tree`].
        logits (`torch.Tensor` of shape `(batch, size, vocab)`, *optional*): what they were drawn from; None for tokens
            that were not drawn.
        chances (`list[float]`): that each is kept, and with it all that it follows from.
        gain (`float`): tokens of each text that are expected of it, less what they cost.
        noted (`int`): tokens that are noted.
        sources (`list[tuple[DraftLength, list[int]]]`): what learns how many of them are kept, of which texts. What the
            draft holds for others is of no use.
    """

    tokens: torch.LongTensor
    parents: list[int]
    logits: torch.Tensor | None
    chances: list[float]
    gain: float
    noted: int
    sources: list[tuple[DraftLength, list[int]]]


def sources_of(
    keys: dict[int, bool | None], lengths: dict[bool | None, DraftLength]
) -> list[tuple[DraftLength, list[int]]]:
    """Sources as in [`Draft`], of rows by their keys."""
    sources = [(length, [row for row, own in keys.items() if own is key]) for key, length in lengths.items()]
    return [(length, rows) for length, rows in sources if rows]


def rows_of(sources: list[tuple[DraftLength, list[int]]]) -> list[int]:
    return [row for _, rows in sources for row in rows]


def shares_kept(sources: list[tuple[DraftLength, list[int]]], size: int, num_rows: int) -> list[float]:
    """Expected shares of the texts whose drafts, as in [`Draft`], are kept up to the first, second, ... token."""
    by_source = [(len(rows), source.chances(size)) for source, rows in sources]
    return [sum(number * chances[place] for number, chances in by_source) / num_rows for place in range(size)]


def worth_verifying(chances: list[float], price: float) -> list[float]:
    """
    Of the chances that a draft is kept up to its first, second, ... token, those of tokens that are worth their price.
    Whether one is among them does not depend on which token it is, so that samples keep the decoder's distribution.
    """
    return list(takewhile(lambda chance: chance > price, chances))


def gain_of(chances: list[float], price: float) -> float:
    """Tokens that are expected of a draft, less the price of those that are verified."""
    return sum(chance - price for chance in worth_verifying(chances, price))


def kept_branches(
    draft: Draft, own: torch.Tensor, sampling: Sampling
) -> tuple[torch.LongTensor, torch.LongTensor, torch.LongTensor]:
    """
    The branch of each text that is kept the furthest.

    Args:
        own (`torch.Tensor` of shape `(batch, 1 + size, vocab)`): the decoder's logits, at the certain token and at each
            of the draft.

    Returns:
        The numbers of its tokens `(batch, 1 + depth)`, from the certain one on, how many drafted ones are kept, and the
        decoder's token after them, each `(batch,)`.
    """
    if sampling.is_greedy:
        picked = sampling.pick(own)
        branches, kept = walk(draft.tokens, draft.parents, picked)
        return branches, kept, picked.gather(1, branches[:, -1:])[:, 0]
    kept, certain = accept(draft.tokens, draft.logits, own, sampling)
    return torch.arange(own.shape[1], device=own.device).expand(len(own), -1), kept, certain


def slots_that_pay(
    chances: list[float],
    parents: list[int],
    by_slots: dict[bool, DraftLength],
    num_slots: list[int],
    batch: int,
    costs: PassCosts,
) -> tuple[int, list[int]]:
    """
    How long the next drafts are to be, and the places of tokens, from the certain one on, that their slots are worth
    laying behind.

    Args:
        chances (`list[float]`), parents (`list[int]`): of the draft that is verified in the same pass, as in [`Draft`].
        by_slots (`dict[bool, DraftLength]`): what is expected of the next one, by whether no token of this draft is
            wrong.
        num_slots (`list[int]`): slots that drafts of 1, 2, ... tokens take.
        batch (`int`): texts.
        costs (`PassCosts`)
    """
    is_last = [1.0, *chances]
    for chance, parent in zip(chances, parents, strict=True):
        is_last[parent] -= chance
    expected = [by_slots[token not in parents] for token in range(len(is_last))]
    gains, ends = [], []
    for size, number in enumerate(num_slots, start=1):
        to_verify, price = costs.price(batch, size), costs.price(batch, number)
        gained = [p * (source.kept(size) - to_verify) for p, source in zip(is_last, expected, strict=True)]
        # One at least.
        ends.append([place for place, gain in enumerate(gained) if gain > price or gain == max(gained)])
        gains.append(sum(gained[place] - price for place in ends[-1]) - costs.price(batch, 0, True))
    # Where something is drafted already, nothing else is tried.
    size = by_slots[True].next(gains) if not chances or max(gains, default=0) > 0 else 0
    return size, ends[size - 1] if size else []


def drafted_by_slots(
    drafter: Drafter,
    states: torch.Tensor,
    logits: torch.Tensor,
    certain: torch.LongTensor,
    sources: list[tuple[DraftLength, list[int]]],
    num_rows: int,
    limits: tuple[float, float, int],
    sampling: Sampling,
) -> tuple[Draft, list[int]]:
    """
    A draft from states and logits at slots, as in [`Drafter.draft`], which lie behind some of the `num_rows` unfinished
    texts, with tokens beside it where none are drawn; and the most likely first token of each text. Its limits are the
    price of a token, that of a token beside the most likely draft, and its size, as in [`grow`].
    """
    tokens, logits = drafter.draft(states, logits, certain, sampling)
    noted, price = tokens.shape[1], limits[0]
    likeliest = logits.topk(min(NUM_CANDIDATES, logits.shape[-1]) if sampling.is_greedy else 1)
    normalizer = log_normalizer(logits.flatten(end_dim=-2)).view(*tokens.shape, 1)
    probabilities = (likeliest.values.float() - normalizer).exp()[rows_of(sources)].cpu()
    tree = grow(probabilities, num_rows, *limits)
    chances = [node.chance for node in tree]
    if sampling.is_greedy:
        depths, ranks = [node.depth for node in tree], [node.rank for node in tree]
        tokens, logits = likeliest.indices[:, depths, ranks], None
    else:
        tokens, logits = tokens[:, : len(tree)], logits[:, : len(tree)]
    # By earlier drafts where tokens are drawn: were it by these, the samples that are verified would be chosen ones.
    gain = gain_of(chances if sampling.is_greedy else shares_kept(sources, noted, num_rows), price)
    # What is not verified counts as wrong.
    draft = Draft(tokens, [node.parent for node in tree], logits, chances, gain, noted, sources)
    return draft, likeliest.indices[:, 0, 0].tolist()


def drafted_by_lookup(
    texts: dict[int, list[int]],
    first_tokens: dict[int, int],
    longest: int,
    by_lookup: dict[bool | None, DraftLength],
    price: float,
    like: torch.LongTensor,
) -> Draft:
    """
    A draft of how the unfinished texts have gone on from their last tokens before.

    Args:
        texts (`dict[int, list[int]]`), first_tokens (`dict[int, int]`): by row; tokens so far, and the next one by
            slots, where some lie behind the text.
        longest (`int`): tokens of it at most.
        by_lookup (`dict[bool | None, DraftLength]`): by whether the first token is that of the slots; None where no
            slots lie.
        price (`float`): of a token.
        like (`torch.LongTensor` of shape `(batch, any)`): ids of the batch.
    """
    found = {row: continuation(ids, min(longest, LONGEST_LOOKUP)) for row, ids in texts.items()}
    is_same = {row: first_tokens[row] == ids[0] if row in first_tokens else None for row, ids in found.items() if ids}
    sources = sources_of(is_same, by_lookup)
    chances = worth_verifying(shares_kept(sources, max(map(len, found.values())), len(texts)), price)
    size = len(chances)
    tokens = like.new_zeros(len(like), size)
    for row, ids in found.items():
        tokens[row, : len(ids)] = tokens.new_tensor(ids[:size])
    return Draft(tokens, chain(size), None, chances, gain_of(chances, price), size, sources)


def verified_decoding(
    model,
    answers: GenerationBuffer,
    drafter: Drafter,
    prompt: tuple[torch.LongTensor, torch.LongTensor],
    block_size: int,
    options,
) -> int:
    """
    Each pass reads the last certain token and a draft, with slots behind the tokens where they pay. It verifies the
    draft, gives the next certain token, and drafts on from the slots behind the last token kept: a tree, where tokens
    beside the most likely ones pay. Where more is expected of how the text went on from its last tokens before, that is
    the draft. Where a decoder takes no masks of pairs, passes that verify and passes that draft take turns.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        answers (`GenerationBuffer`): empty; they are complete when this returns.
        drafter (`Drafter`)
        prompt: ids and mask `(batch, prompt)`, padded on the left.
        block_size (`int`): tokens of a draft from slots at most, the certain one included.
        options (`ProtoGenGenerationConfig`)

    Returns:
        The passes of the decoder that it took.
    """
    sampling, costs, batch = options.sampling, options.pass_costs, len(prompt[0])
    all_rows, price = torch.arange(batch, device=model.device), costs.price(batch, 1)
    text, longest_masked = DecoderState(model.decoder, batch), longest_pair_masked(model.decoder)
    num_slots = [drafter.num_slots(size) for size in range(1, block_size)]
    by_slots = {right: DraftLength(block_size - 1, expected) for right, expected in EXPECTED_OF_SLOTS.items()}
    by_lookup = {same: DraftLength(LONGEST_LOOKUP, expected) for same, expected in EXPECTED_OF_LOOKUP.items()}
    beginnings = [ids[is_text.bool()].tolist() for ids, is_text in zip(*prompt, strict=True)]
    # A token beside the most likely draft is to pay for slots behind it, too.
    price_beside = costs.price(batch, 1 + max(num_slots, default=0))
    nothing = Draft(prompt[0][:, :0], [], None, [], 0.0, 0, [])
    (tokens, mask), draft = prompt, nothing
    while answers.unfinished:
        num_drafted, size, ends = draft.tokens.shape[1], 0, []
        if not num_drafted or text.ids.shape[1] + num_drafted + block_size < longest_masked:
            # This pass and the next write a token each without drafts.
            wanted = num_slots[: max(answers.room - 2, 0)]
            size, ends = slots_that_pay(draft.chances, draft.parents, by_slots, wanted, batch, costs)
        parents = None if draft.parents == chain(num_drafted) else draft.parents
        own, behind, of_slots = drafter.read(text, tokens, mask, size, 1 + num_drafted, ends, parents)
        branches, kept, certain = kept_branches(draft, own, sampling)
        last = branches.gather(1, kept[:, None])[:, 0].tolist()
        is_right = [token not in draft.parents for token in last]
        own, drafted = own[all_rows[:, None], branches], draft.tokens.gather(1, (branches[:, 1:] - 1).clamp_min(0))
        if parents is not None:
            text.follow(branches, 1 + num_drafted)
        for source, of_source in draft.sources:
            source.note(draft.noted, kept[of_source].float().mean().item())
        certain = certain[:, None]
        written = torch.cat([drafted, certain], dim=1).scatter(1, kept[:, None], certain)
        added = answers.extend(written, log_probability(own, written), kept + 1)
        if num_drafted:
            answers.note_draft(kept.cpu().minimum(added), rows_of(draft.sources))
        text.forget(num_drafted - kept, answers.is_done)
        rows, draft, first_tokens = answers.unfinished, nothing, {}
        longest = min(answers.room, text.num_free) - 1 if rows else 0
        places = [ends.index(token) if token in ends else None for token in last]
        behind_slots = [row for row in rows if places[row] is not None]
        if longest and behind_slots:
            at = all_rows, torch.tensor([place or 0 for place in places], device=kept.device), slice(longest)
            sources = sources_of({row: is_right[row] for row in behind_slots}, by_slots)
            has_room = text.ids.shape[1] + NUM_BESIDE + 2 * block_size < longest_masked
            limits = price, price_beside if has_room else math.inf, min(NUM_BESIDE + block_size, text.num_free - 1)
            draft, most_likely = drafted_by_slots(
                drafter, behind[at], of_slots[at], certain, sources, len(rows), limits, sampling
            )
            first_tokens = {row: most_likely[row] for row in behind_slots}
        if longest:
            texts = {row: beginnings[row] + answers.tokens[row] for row in rows}
            looked_up = drafted_by_lookup(texts, first_tokens, longest, by_lookup, price, certain)
            draft = max(draft, looked_up, key=lambda each: each.gain)
        tokens = torch.cat([certain, draft.tokens], dim=1)
        mask = torch.ones_like(tokens)
    return text.num_passes
