"""
Adaptive decoding: drafts are kept as long as they are confident, and are not verified (ConfAdapt,
https://arxiv.org/abs/2602.06019).
"""

from collections.abc import Callable

import torch

from .autoregressive import DecoderState
from .block_decoding import GenerationBuffer, PredictorInputs, largest_blocks, read_and_draft
from .draft_length import DraftLength
from .sampling import log_probability

# Least mean accepted length at which a draft pays for its extra positions in a pass that is made anyway.
BREAK_EVEN = 0.25


def adaptive_decoding(
    model,
    answers: GenerationBuffer,
    instruction: Callable[[], PredictorInputs],
    text: DecoderState,
    block_size: int,
    options,
) -> None:
    """
    Each pass reads the tokens that the last one wrote, and proto-tokens after them; it writes the decoder's own next
    token and the drafted ones as long as each has the probability `confidence_threshold`. The first draft is a whole
    block; how long the next ones are is each answer's own matter, so that answers do not depend on the batch.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        answers (`GenerationBuffer`): empty; they are complete when this returns.
        text (`DecoderState`): the prompts.
        block_size (`int`): tokens that a pass writes at most.
        options (`ProtoGenGenerationConfig`)
    """
    sampling = options.sampling
    tokens = sampling.pick(text.next_logits)
    mask = torch.ones_like(tokens)
    answers.extend(tokens, log_probability(text.next_logits, tokens), mask[:, 0])
    draft_lengths = [DraftLength(block_size / 2, BREAK_EVEN) for _ in tokens]
    while answers.unfinished:
        largest = largest_blocks(model, text, mask).tolist()
        wanted = [
            0 if done else min(length.next(), most - 1)
            for done, length, most in zip(answers.is_done, draft_lengths, largest, strict=True)
        ]
        size = min(block_size, answers.room, 1 + max(wanted))
        logits = read_and_draft(model, text, tokens, mask, size, instruction)
        tokens = sampling.pick(logits)
        log_p = log_probability(logits, tokens)
        places = torch.arange(size, device=tokens.device)
        is_drafted = places <= torch.tensor(wanted, device=tokens.device)[:, None]
        # The decoder's own token stays, however sure.
        is_kept = (places == 0) | is_drafted & (log_p.exp() >= options.confidence_threshold)
        num_kept = is_kept.long().cumprod(1).sum(1)
        drafted = [row for row, length in enumerate(wanted) if length and size > 1]
        answers.note_draft(num_kept - 1, drafted)
        for row in drafted:
            draft_lengths[row].note(num_kept[row].item() - 1)
        answers.extend(tokens, log_p, num_kept)
        text.forget(torch.zeros_like(num_kept), answers.is_done)
        # What follows the end of an answer is of no use and need not be read in step.
        num_kept[answers.is_done] = num_kept.max()
        source = places - size + num_kept[:, None]
        tokens = tokens.gather(1, source.clamp_min(0))[:, -num_kept.max() :]
        mask = (source >= 0).long()[:, -num_kept.max() :]
