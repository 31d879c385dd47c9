"""
Verified decoding: drafts are kept as far as the decoder would have written them itself, token by token: greedily, or,
by speculative sampling (Leviathan et al., 2023, https://arxiv.org/abs/2211.17192), with its own probabilities.
"""

import torch
import torch.nn.functional as F

from .anchors import longest_pair_masked
from .autoregressive import DecoderState
from .block_decoding import Drafter, GenerationBuffer
from .draft_length import DraftLength, PassCosts
from .frozen_decoder import logits_of
from .prompt_lookup import continuations
from .sampling import Sampling, log_probability

# Tokens of a draft from the text itself at most.
LONGEST_LOOKUP = 10
# The logit of a drafted token that was not drawn.
CERTAIN = 1e4
# Share of right tokens at each place of a draft that is expected before any.
EXPECTED = 0.5


def accept(
    drafts: torch.LongTensor, draft_logits: torch.Tensor, target_logits: torch.Tensor, sampling: Sampling
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Algorithm 1 of Leviathan et al.: what is kept of a draft and the token after that have the decoder's distribution.

    Args:
        drafts (`torch.LongTensor` of shape `(batch, size)`), draft_logits (`torch.Tensor` of shape `(batch, size,
            vocab)`): drafted tokens, maybe none, and what they were drawn from.
        target_logits (`torch.Tensor` of shape `(batch, size + 1, vocab)`): the decoder's own, before and after each.

    Returns:
        Drafted tokens that are kept, and the decoder's token after them, each `(batch,)`.
    """
    if sampling.is_greedy or not drafts.shape[1]:
        own = sampling.pick(target_logits)
        kept = (drafts == own[:, :-1]).long().cumprod(1).sum(1)
        return kept, own.gather(1, kept[:, None])[:, 0]
    ratio = sampling.probability(target_logits[:, :-1], drafts) / sampling.probability(draft_logits, drafts)
    kept = (torch.rand_like(ratio) < ratio).long().cumprod(1).sum(1)
    rows, size = torch.arange(len(drafts), device=drafts.device), drafts.shape[1]
    p = sampling.probabilities(target_logits[rows, kept])
    q = sampling.probabilities(draft_logits[rows, kept.clamp_max(size - 1)])
    # Nothing was drafted after the last: there the decoder's own distribution is left whole.
    left = (p - q * (kept < size)[:, None]).clamp_min(0)
    return kept, torch.multinomial(left, 1)[:, 0]


def lookup_that_pays(
    texts: list[list[int]], longest: int, by_lookup: DraftLength, pass_costs: PassCosts, least_gain: float
) -> torch.LongTensor:
    """
    Drafts `(batch, tokens)` from the texts themselves; without tokens where more than `least_gain` tokens in the time
    of a pass are not expected of them.
    """
    found = continuations(texts, min(longest, LONGEST_LOOKUP))
    costs = [pass_costs.relative(len(texts), 0, 0, later) for later in range(1, found.shape[1] + 1)]
    size = by_lookup.best(costs)
    pays = size and (1 + by_lookup.kept(size)) / costs[size - 1] > least_gain
    return found[:, : size if pays else 0]


def worth_verifying(confidences: torch.Tensor, batch: int, num_slots: int, pass_costs: PassCosts) -> int:
    """
    How many of the drafted tokens add more to what the next pass writes than to its time. Whether one is among them
    does not depend on which token it is, so that samples keep the decoder's distribution.

    Args:
        confidences (`torch.Tensor` of shape `(size,)`): probability that each token is right, and those before it.
        batch, num_slots (`int`): texts, and slots behind each token.
    """

    def time(size):
        return pass_costs(batch * (1 + size) * (1 + num_slots), True)

    written = 1.0
    for size, confidence in enumerate(confidences.tolist()):
        if (written + confidence) / time(size + 1) <= written / time(size):
            return size
        written += confidence
    return len(confidences)


def verified_decoding(
    model,
    answers: GenerationBuffer,
    drafter: Drafter,
    prompt: tuple[torch.LongTensor, torch.LongTensor],
    block_size: int,
    options,
) -> int:
    """
    Each pass reads the token that is certain and a draft after it, with slots behind each of them: it says how much of
    the draft is kept and what follows that for certain, and the slots behind the last kept token draft on, as far as
    they are sure. Where more is expected of how the text has gone on from its last tokens before, that is the draft.
    Where a decoder takes no masks of pairs, passes that verify and passes that draft take turns.

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
    decoder, sampling, costs = model.decoder, options.sampling, options.pass_costs
    rows = torch.arange(len(prompt[0]), device=model.device)
    text, longest_masked = DecoderState(decoder, len(rows)), longest_pair_masked(decoder)
    num_slots = [drafter.num_slots(size) for size in range(1, block_size)]
    by_slots, by_lookup = DraftLength(block_size - 1, EXPECTED), DraftLength(LONGEST_LOOKUP, EXPECTED)
    beginnings = [ids[is_text.bool()].tolist() for ids, is_text in zip(*prompt, strict=True)]
    (tokens, mask), source, drafts, drafted_from, noted = prompt, by_slots, prompt[0][:, :0], None, 0
    while answers.unfinished:
        num_drafted, size = drafts.shape[1], 0
        if not num_drafted or text.ids.shape[1] + num_drafted + block_size < longest_masked:
            # This pass and the next write a token each without drafts.
            wanted = enumerate(num_slots[: max(answers.room - 2, 0)], start=1)
            size = by_slots.next([costs.relative(len(rows), num_drafted, slots, later) for later, slots in wanted])
        states, behind = text.read(tokens, mask, 1 + num_drafted, drafter.slots(size))
        if size:
            behind = behind[:, :, drafter.places(size)]
            states = torch.cat([states, behind.flatten(1, 2)], dim=1)
        logits = logits_of(decoder, states)
        own, of_slots = logits[:, : 1 + num_drafted], logits[:, 1 + num_drafted :]
        kept, certain = accept(drafts, drafted_from, own, sampling)
        if noted:
            source.note(noted, kept[answers.unfinished].float().mean().item())
        if num_drafted:
            answers.note_draft(kept, answers.unfinished)
        certain = certain[:, None]
        written = torch.cat([drafts, certain], dim=1).scatter(1, kept[:, None], certain)
        answers.extend(written, log_probability(own, written), kept + 1)
        text.forget(num_drafted - kept, answers.is_done)
        longest = min(answers.room, text.num_free) - 1 if answers.unfinished else 0
        source, drafts, noted = by_slots, certain[:, :0], min(size, longest)
        if noted:
            of_slots = of_slots.unflatten(1, behind.shape[1:3])[rows, kept]
            drafts, drafted_from = drafter.draft(behind[rows, kept], of_slots, certain, sampling)
            drafts, drafted_from = drafts[:, :longest], drafted_from[:, :longest]
            likeliest = log_probability(drafted_from, drafted_from.max(-1).indices)
            confidences = likeliest.cumsum(1).exp()[answers.unfinished].mean(0)
            number = worth_verifying(confidences, len(rows), num_slots[size - 1], costs)
            # What is not verified counts as wrong.
            drafts, drafted_from = drafts[:, :number], drafted_from[:, :number]
        if longest:
            # By earlier drafts alone: were it by these tokens, the samples that are verified would be chosen ones.
            least = (1 + by_slots.kept(noted)) / costs.relative(len(rows), 0, 0, noted)
            texts = [a + b for a, b in zip(beginnings, answers.tokens, strict=True)]
            looked_up = lookup_that_pays(texts, longest, by_lookup, costs, least).to(rows.device)
            if looked_up.shape[1]:
                source, drafts, noted = by_lookup, looked_up, looked_up.shape[1]
                if not sampling.is_greedy:
                    drafted_from = CERTAIN * F.one_hot(drafts, own.shape[-1]).to(own.dtype)
        tokens = torch.cat([certain, drafts], dim=1)
        mask = torch.ones_like(tokens)
    return text.num_passes
