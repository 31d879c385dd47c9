"""
Adaptive decoding: drafts are kept as long as they are confident, and are not verified (ConfAdapt,
https://arxiv.org/abs/2602.06019).
"""

from collections.abc import Callable

import torch

from .autoregressive import TextSoFar
from .block_decoding import Answers, Instruction, read_and_draft
from .sampling import Sampling, log_probability


def adaptive_decoding(
    model,
    answers: Answers,
    instruction: Callable[[], Instruction],
    text: TextSoFar,
    block_size: int,
    confidence_threshold: float,
    sampling: Sampling,
) -> None:
    """
    Each pass reads the tokens that the last one wrote, and proto-tokens after them; it writes the decoder's own next
    token and the drafted ones as long as each has the probability `confidence_threshold`.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        answers (`Answers`): empty; they are complete when this returns.
        text (`TextSoFar`): the prompts.
        block_size (`int`): tokens that a pass writes at most.
    """
    tokens = sampling.pick(text.next_logits)
    mask = torch.ones_like(tokens)
    answers.extend(tokens, log_probability(text.next_logits, tokens), mask[:, 0])
    while answers.unfinished:
        size = min(block_size, answers.room)
        logits = read_and_draft(model, text, tokens, mask, size, instruction)
        tokens = sampling.pick(logits)
        log_p = log_probability(logits, tokens)
        is_kept = log_p.exp() >= confidence_threshold
        # The decoder's own token stays, however sure.
        is_kept[:, 0] = True
        num_kept = is_kept.long().cumprod(1).sum(1)
        if size > 1:
            answers.note_draft(num_kept - 1)
        answers.extend(tokens, log_p, num_kept)
        source = torch.arange(size, device=tokens.device) - size + num_kept[:, None]
        tokens = tokens.gather(1, source.clamp_min(0))[:, -num_kept.max() :]
        mask = (source >= 0).long()[:, -num_kept.max() :]
