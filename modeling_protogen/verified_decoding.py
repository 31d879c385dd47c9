"""
Verified decoding: drafts are kept as far as the decoder would have written them itself, token by token: greedily, or,
by speculative sampling (Leviathan et al., 2023, https://arxiv.org/abs/2211.17192), with its own probabilities.
"""

import torch

from .anchors import longest_pair_masked
from .autoregressive import DecoderState
from .block_decoding import Drafter, GenerationBuffer
from .draft_length import DraftLength, pass_cost
from .frozen_decoder import logits_of
from .sampling import Sampling, log_probability

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
    the draft is kept and what follows that for certain, and the slots behind the last kept token draft on. Where a
    decoder takes no masks of pairs, passes that verify and passes that draft take turns.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        answers (`GenerationBuffer`): empty; they are complete when this returns.
        drafter (`Drafter`)
        prompt: ids and mask `(batch, prompt)`, padded on the left.
        block_size (`int`): tokens of a draft at most, the certain one included.
        options (`ProtoGenGenerationConfig`)

    Returns:
        The passes of the decoder that it took.
    """
    decoder, sampling, rows = model.decoder, options.sampling, torch.arange(len(prompt[0]), device=model.device)
    text, longest_masked = DecoderState(decoder, len(rows)), longest_pair_masked(decoder)
    sizes = [drafter.num_slots(size) for size in range(1, block_size)]
    costs = [pass_cost(len(rows) * (2 + place) * (1 + slots)) for place, slots in enumerate(sizes)]
    draft_length = DraftLength(costs, EXPECTED)
    (tokens, mask), num_drafted, drafted_from = prompt, 0, None
    while answers.unfinished:
        # One of them is the next for certain, and the slots behind that draft what is left.
        left = answers.room - 1 - num_drafted
        can_draft = not num_drafted or text.ids.shape[1] + 2 * block_size < longest_masked
        size = min(draft_length.next(), max(left - 1, 0)) if can_draft else 0
        states, behind = text.read(tokens, mask, 1 + num_drafted, drafter.slots(size))
        own = logits_of(decoder, states)
        drafts = tokens[:, tokens.shape[1] - num_drafted :]
        kept, certain = accept(drafts, drafted_from, own, sampling)
        written = torch.cat([drafts, certain[:, None]], dim=1).scatter(1, kept[:, None], certain[:, None])
        if num_drafted:
            draft_length.note(num_drafted, kept[answers.unfinished].float().mean().item())
            answers.note_draft(kept, answers.unfinished)
        answers.extend(written, log_probability(own, written), kept + 1)
        text.forget(num_drafted - kept, answers.is_done)
        tokens, num_drafted = certain[:, None], min(size, text.num_free - 1)
        if num_drafted > 0:
            drafted_from = drafter.logits(behind[rows, kept], size)[:, :num_drafted]
            tokens = torch.cat([tokens, sampling.pick(drafted_from)], dim=1)
        mask = torch.ones_like(tokens)
    return text.num_passes
