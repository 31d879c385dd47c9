"""
Adaptive decoding: drafts are kept as long as they are confident, and are not verified (ConfAdapt,
https://arxiv.org/abs/2602.06019).
"""

import torch

from .autoregressive import DecoderState
from .block_decoding import Drafter, GenerationBuffer
from .draft_length import DraftLength
from .sampling import log_probability

# Share of sure tokens at each place of a draft that is expected before any: the first draft is a whole block.
EXPECTED = 0.95


def adaptive_decoding(
    model,
    answers: GenerationBuffer,
    drafter: Drafter,
    prompt: tuple[torch.LongTensor, torch.LongTensor],
    block_size: int,
    options,
) -> int:
    """
    Each pass reads the tokens that the last one wrote, and proto-tokens after them; it writes the decoder's own next
    token and the drafted ones as long as each has the probability `confidence_threshold`. A draft's length is chosen
    for each answer, so that answers do not depend on the batch.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        answers (`GenerationBuffer`): empty; they are complete when this returns.
        drafter (`Drafter`)
        prompt: ids and mask `(batch, prompt)`, padded on the left.
        block_size (`int`): tokens that a pass writes at most.
        options (`ProtoGenGenerationConfig`)

    Returns:
        The passes of the decoder that it took.
    """
    sampling, text = options.sampling, DecoderState(model.decoder, len(prompt[0]))
    prices = [options.pass_costs.price(1, drafter.num_slots(size), True) for size in range(1, block_size)]
    draft_lengths = [DraftLength(len(prices), EXPECTED) for _ in prompt[0]]
    tokens, mask = prompt
    while answers.unfinished:
        # Slots beyond the decoder's last position would write anything.
        free = model.longest_answers(text.mask.sum(1) + mask.sum(1)).sub(1).clamp_min(0)
        wanted = [
            0 if done else min(length.next([length.kept(size) - price for size, price in enumerate(prices, 1)]), most)
            for done, length, most in zip(answers.is_done, draft_lengths, free.tolist(), strict=True)
        ]
        drafted = min(max(wanted), answers.room - 1)
        logits, behind, of_slots = drafter.read(text, tokens, mask, drafted)
        tokens = sampling.pick(logits)
        if drafted:
            drafts, drafted_from = drafter.draft(behind[:, 0], of_slots[:, 0], tokens, sampling)
            tokens, logits = torch.cat([tokens, drafts], dim=1), torch.cat([logits, drafted_from], dim=1)
        log_p = log_probability(logits, tokens)
        places = torch.arange(1 + drafted, device=tokens.device)
        is_drafted = places <= torch.tensor(wanted, device=tokens.device)[:, None]
        # The decoder's own token stays, however sure.
        is_kept = (places == 0) | is_drafted & (log_p.exp() >= options.confidence_threshold)
        num_kept = is_kept.long().cumprod(1).sum(1)
        drafting = [row for row, length in enumerate(wanted) if length and drafted]
        for row in drafting:
            draft_lengths[row].note(min(wanted[row], drafted), num_kept[row].item() - 1)
        added = answers.extend(tokens, log_p, num_kept)
        answers.note_draft(added - 1, drafting)
        text.forget(torch.zeros_like(num_kept), answers.is_done)
        # What follows the end of an answer is of no use and need not be read in step.
        num_kept[answers.is_done] = num_kept.max()
        source = places - 1 - drafted + num_kept[:, None]
        tokens = tokens.gather(1, source.clamp_min(0))[:, -num_kept.max() :]
        mask = (source >= 0).long()[:, -num_kept.max() :]
    return text.num_passes
