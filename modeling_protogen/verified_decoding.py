"""
Verified decoding: drafts are kept as far as the decoder would have written them itself, token by token: greedily, or,
by speculative sampling (Leviathan et al., 2023, https://arxiv.org/abs/2211.17192), with its own probabilities.
"""

from collections.abc import Callable

import torch

from .autoregressive import DecoderState
from .block_decoding import GenerationBuffer, PredictorInputs, largest_blocks, read_and_draft
from .draft_length import DraftLength
from .sampling import Sampling, log_probability

# Least mean accepted length at which a draft and its verification pay for their extra positions.
BREAK_EVEN = 0.4
# What the first draft is expected to keep.
EXPECTED = 2.0


def accept(
    drafts: torch.LongTensor, draft_logits: torch.Tensor, target_logits: torch.Tensor, sampling: Sampling
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Algorithm 1 of Leviathan et al.: what is kept of a draft and the token after that have the decoder's distribution.

    Args:
        drafts (`torch.LongTensor` of shape `(batch, size)`), draft_logits (`torch.Tensor` of shape `(batch, size,
            vocab)`): drafted tokens, and what they were drawn from.
        target_logits (`torch.Tensor` of shape `(batch, size + 1, vocab)`): the decoder's own, before and after each.

    Returns:
        Drafted tokens that are kept, and the decoder's token after them, each `(batch,)`.
    """
    if sampling.is_greedy:
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
    instruction: Callable[[], PredictorInputs],
    text: DecoderState,
    block_size: int,
    options,
) -> None:
    """
    Each round reads the last token and proto-tokens after it in one pass, which gives the next token for certain and
    drafts those that follow; a second pass verifies the drafts. Where all are wrong that is two passes for two tokens,
    as without drafts.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        answers (`GenerationBuffer`): empty; they are complete when this returns.
        text (`DecoderState`): the prompts.
        block_size (`int`): tokens of a draft at most, the certain one included.
        options (`ProtoGenGenerationConfig`)
    """
    sampling = options.sampling
    draft_length = DraftLength(EXPECTED, BREAK_EVEN)
    last = sampling.pick(text.next_logits)
    one = torch.ones_like(last)
    answers.extend(last, log_probability(text.next_logits, last), one[:, 0])
    while answers.unfinished:
        largest = largest_blocks(model, text, one)[answers.unfinished].min().item()
        size = max(1, min(block_size, answers.room - 1, 1 + draft_length.next(), largest))
        logits = read_and_draft(model, text, last, one, size, instruction)
        block = sampling.pick(logits)
        next_log_p = log_probability(logits[:, :1], block[:, :1])
        if size < 2:
            last = block
            answers.extend(last, next_log_p, one[:, 0])
            text.forget(torch.zeros_like(last[:, 0]), answers.is_done)
            continue

        whole = one.expand(-1, size)
        own = text.read(block, whole, whole.bool()).view(logits.shape)
        kept, last = accept(block[:, 1:], logits[:, 1:], own, sampling)
        written = torch.cat([block, last[:, None]], dim=1).scatter(1, 1 + kept[:, None], last[:, None])
        log_p = log_probability(own, written[:, 1:])
        draft_length.note(kept[answers.unfinished].float().mean().item())
        answers.note_draft(kept, answers.unfinished)
        answers.extend(written, torch.cat([next_log_p, log_p], dim=1), kept + 2)
        text.forget(size - 1 - kept, answers.is_done)
        last = last[:, None]
