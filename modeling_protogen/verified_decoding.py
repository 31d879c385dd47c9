"""
Verified decoding: drafts are kept as far as the decoder would have written them itself, token by token: greedily, or,
by speculative sampling (Leviathan et al., 2023, https://arxiv.org/abs/2211.17192), with its own probabilities.
"""

from itertools import pairwise, takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .anchors import longest_pair_masked
from .autoregressive import DecoderState
from .block_decoding import Drafter, GenerationBuffer
from .draft_length import DraftLength, PassCosts
from .prompt_lookup import continuations
from .sampling import Sampling, log_probability

# Tokens of a draft from the text itself at most.
LONGEST_LOOKUP = 10
# The logit of a drafted token that was not drawn.
CERTAIN = 1e4
# Share of right tokens at each place of drafts from slots, and from the text, that is expected before any.
EXPECTED, EXPECTED_OF_LOOKUP = 0.5, 0.7


def accept(
    drafts: torch.LongTensor, draft_logits: torch.Tensor | None, target_logits: torch.Tensor, sampling: Sampling
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Algorithm 1 of Leviathan et al.: what is kept of a draft and the token after that have the decoder's distribution.

    Args:
        drafts (`torch.LongTensor` of shape `(batch, size)`), draft_logits (`torch.Tensor` of shape `(batch, size,
            vocab)`, *optional*): drafted tokens, maybe none, and what they were drawn from; None for tokens that were
            not drawn.
        target_logits (`torch.Tensor` of shape `(batch, size + 1, vocab)`): the decoder's own, before and after each.

    Returns:
        Drafted tokens that are kept, and the decoder's token after them, each `(batch,)`.
    """
    if sampling.is_greedy or not drafts.shape[1]:
        own = sampling.pick(target_logits)
        kept = (drafts == own[:, :-1]).long().cumprod(1).sum(1)
        return kept, own.gather(1, kept[:, None])[:, 0]
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
        logits (`torch.Tensor` of shape `(batch, size, vocab)`, *optional*): what they were drawn from; None for tokens
            that were not drawn.
        chances (`list[float]`): that they are kept up to the first, second, ... of them.
        gain (`float`): tokens of each text that are expected of it, less what they cost.
        source (`DraftLength`): learns what is kept of it.
        noted (`int`): tokens that are noted there.
        rows (`list[int]`): texts that it is a draft for; what it holds for others is of no use.
    """

    tokens: torch.LongTensor
    logits: torch.Tensor | None
    chances: list[float]
    gain: float
    source: DraftLength
    noted: int
    rows: list[int]


def worth_verifying(chances: list[float], price: float) -> list[float]:
    """
    Of the chances that a draft is kept up to its first, second, ... token, those of tokens that are worth their price.
    Whether one is among them does not depend on which token it is, so that samples keep the decoder's distribution.
    """
    return list(takewhile(lambda chance: chance > price, chances))


def gain_of(chances: list[float], price: float) -> float:
    """Tokens that are expected of a draft, less the price of those that are verified."""
    return sum(chance - price for chance in worth_verifying(chances, price))


def slots_that_pay(
    chances: list[float], by_slots: DraftLength, num_slots: list[int], batch: int, costs: PassCosts
) -> tuple[int, list[int]]:
    """
    How long the next drafts are to be, and the places of tokens, from the certain one on, that their slots are worth
    laying behind.

    Args:
        chances (`list[float]`): of the draft that is verified in the same pass, as in [`Draft`].
        by_slots (`DraftLength`): what is expected of the next one.
        num_slots (`list[int]`): slots that drafts of 1, 2, ... tokens take.
        batch (`int`): texts.
        costs (`PassCosts`)
    """
    is_last = [before - after for before, after in pairwise([1.0, *chances, 0.0])]
    gains, ends = [], []
    for size, number in enumerate(num_slots, start=1):
        gain, price = by_slots.kept(size) - costs.price(batch, size), costs.price(batch, number)
        # One at least.
        ends.append([place for place, p in enumerate(is_last) if p * gain > price or p == max(is_last)])
        gains.append(sum(is_last[place] * gain - price for place in ends[-1]) - costs.price(batch, 0, True))
    # Where something is drafted already, nothing else is tried.
    size = by_slots.next(gains) if not chances or max(gains, default=0) > 0 else 0
    return size, ends[size - 1] if size else []


def drafted_by_slots(
    drafter: Drafter,
    states: torch.Tensor,
    logits: torch.Tensor,
    certain: torch.LongTensor,
    rows: list[int],
    share: float,
    by_slots: DraftLength,
    price: float,
    sampling: Sampling,
) -> Draft:
    """
    A draft from states and logits at slots, as in [`Drafter.draft`], which lie behind the texts `rows`, a `share` of
    the unfinished ones.
    """
    tokens, logits = drafter.draft(states, logits, certain, sampling)
    likeliest = log_probability(logits, logits.max(-1).indices).cumsum(1).exp()
    chances = (share * likeliest[rows].mean(0)).tolist()
    # By earlier drafts where tokens are drawn: were it by these, the samples that are verified would be chosen ones.
    expected = chances if sampling.is_greedy else [share * chance for chance in by_slots.chances(len(chances))]
    verified = worth_verifying(chances, price)
    # What is not verified counts as wrong.
    noted, size = len(chances), len(verified)
    return Draft(tokens[:, :size], logits[:, :size], verified, gain_of(expected, price), by_slots, noted, rows)


def drafted_by_lookup(
    texts: list[list[int]], longest: int, rows: list[int], by_lookup: DraftLength, price: float, device: torch.device
) -> Draft:
    """A draft of how the texts have gone on from their last tokens before, for the unfinished ones, `rows`."""
    found = continuations(texts, min(longest, LONGEST_LOOKUP)).to(device)
    chances = worth_verifying(by_lookup.chances(found.shape[1]), price)
    size = len(chances)
    return Draft(found[:, :size], None, chances, gain_of(chances, price), by_lookup, size, rows)


def verified_decoding(
    model,
    answers: GenerationBuffer,
    drafter: Drafter,
    prompt: tuple[torch.LongTensor, torch.LongTensor],
    block_size: int,
    options,
) -> int:
    """
    Each pass reads the token that is certain and a draft after it, with slots behind those of them that may well be the
    last one kept: it says how much of the draft is kept and what follows that for certain, and the slots behind the
    last kept token draft on, as far as they are sure. Where more is expected of how the text has gone on from its last
    tokens before, that is the draft. Where a decoder takes no masks of pairs, passes that verify and passes that draft
    take turns.

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
    by_slots, by_lookup = DraftLength(block_size - 1, EXPECTED), DraftLength(LONGEST_LOOKUP, EXPECTED_OF_LOOKUP)
    beginnings = [ids[is_text.bool()].tolist() for ids, is_text in zip(*prompt, strict=True)]
    nothing = Draft(prompt[0][:, :0], None, [], 0.0, by_slots, 0, [])
    (tokens, mask), draft = prompt, nothing
    while answers.unfinished:
        num_drafted, size, ends = draft.tokens.shape[1], 0, []
        if not num_drafted or text.ids.shape[1] + num_drafted + block_size < longest_masked:
            # This pass and the next write a token each without drafts.
            wanted = num_slots[: max(answers.room - 2, 0)]
            size, ends = slots_that_pay(draft.chances, by_slots, wanted, batch, costs)
        own, behind, of_slots = drafter.read(text, tokens, mask, size, 1 + num_drafted, ends)
        kept, certain = accept(draft.tokens, draft.logits, own, sampling)
        if draft.noted:
            draft.source.note(draft.noted, kept[draft.rows].float().mean().item())
        certain = certain[:, None]
        written = torch.cat([draft.tokens, certain], dim=1).scatter(1, kept[:, None], certain)
        added = answers.extend(written, log_probability(own, written), kept + 1)
        if num_drafted:
            answers.note_draft(kept.cpu().minimum(added), draft.rows)
        text.forget(num_drafted - kept, answers.is_done)
        rows, draft = answers.unfinished, nothing
        longest = min(answers.room, text.num_free) - 1 if rows else 0
        places = [ends.index(number) if number in ends else None for number in kept.tolist()]
        behind_slots = [row for row in rows if places[row] is not None]
        if longest and behind_slots:
            at = all_rows, torch.tensor([place or 0 for place in places], device=kept.device), slice(longest)
            share = len(behind_slots) / len(rows)
            draft = drafted_by_slots(
                drafter, behind[at], of_slots[at], certain, behind_slots, share, by_slots, price, sampling
            )
        if longest:
            texts = [a + b for a, b in zip(beginnings, answers.tokens, strict=True)]
            looked_up = drafted_by_lookup(texts, longest, rows, by_lookup, price, kept.device)
            draft = max(draft, looked_up, key=lambda each: each.gain)
        tokens = torch.cat([certain, draft.tokens], dim=1)
        mask = torch.ones_like(tokens)
    return text.num_passes
