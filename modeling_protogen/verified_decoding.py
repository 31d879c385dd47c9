"""Verified decoding: blocks drafted from proto-tokens, kept as far as the decoder's own greedy decoding agrees."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.utils import ModelOutput

from .proto_tokens import build_layout, fill_slots, position_ids

# Passes without a draft after a draft failed; doubled with each further failure, up to the second number.
FIRST_PAUSE, LONGEST_PAUSE = 1, 32


@dataclass
class ProtoGenVerifiedOutput(ModelOutput):
    """
    Output of `generate(mode="verified", return_dict_in_generate=True)`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`):
            The decoder's own greedy answers, up to and including EOS, then padding.
        lengths (`torch.LongTensor` of shape `(batch,)`): tokens in each answer, EOS included.
        accepted_lengths (`torch.FloatTensor` of shape `(batch,)`): drafted tokens that were kept, on average a draft.
        num_drafts (`int`): drafts that were made.
        num_passes (`int`): passes of the decoder, the prompt's included; greedy decoding takes one a token.
    """

    sequences: torch.LongTensor | None = None
    lengths: torch.LongTensor | None = None
    accepted_lengths: torch.FloatTensor | None = None
    num_drafts: int | None = None
    num_passes: int | None = None


class TextSoFar:
    """
    A batch of texts that the decoder has read: its keys and values, its last states `(batch, read, dim)`, and which of
    the positions count `(batch, read)`. What was read and turned out wrong is masked, so texts of a batch may grow at
    different paces.
    """

    def __init__(self, decoder, ids: torch.LongTensor, mask: torch.Tensor):
        self.decoder = decoder
        self.num_passes = 0
        self.cache: Cache | None = None
        self.mask = mask[:, :0].long()
        self.states = None
        embeds = decoder.get_input_embeddings()(ids)
        last = torch.zeros_like(mask, dtype=torch.bool)
        last[:, -1] = True
        self.next_logits = self.read(embeds, mask.long(), last)

    def read(self, embeds: torch.Tensor, mask: torch.LongTensor, predicts: torch.BoolTensor) -> torch.Tensor:
        """Reads on, `(batch, new, dim)`; returns logits `(positions, vocab)` where `predicts` `(batch, new)`."""
        whole = torch.cat([self.mask, mask], dim=1)
        output = self.decoder(
            inputs_embeds=embeds,
            attention_mask=whole,
            position_ids=position_ids(whole)[:, self.mask.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=True,
            logits_to_keep=predicts,
        )
        self.num_passes += 1
        self.cache, self.mask = output.past_key_values, whole
        new = output.hidden_states[-1]
        self.states = new if self.states is None else torch.cat([self.states, new], dim=1)
        return output.logits

    def keep(self, length: int) -> None:
        """Forgets all that was read after the first `length` positions."""
        if length < self.mask.shape[1]:
            self.cache.crop(length - self.mask.shape[1])
        self.mask, self.states = self.mask[:, :length], self.states[:, :length]


@torch.no_grad()
def verified_decoding(
    model,
    encoder_states: torch.Tensor | None,
    encoder_mask: torch.Tensor | None,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.Tensor,
    category_ids: torch.LongTensor | None,
    max_new_tokens: int,
    block_size: int,
) -> ProtoGenVerifiedOutput:
    """
    Each round reads the last token and a block of proto-tokens after it in one pass, which gives the next token for
    certain and drafts those that follow; a second pass verifies the drafts. Where all are wrong that is two passes for
    two tokens, as in greedy decoding, and drafts are made more and more rarely.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        encoder_states, encoder_mask: as of `ProtoTokenPredictor`.
        prompt_ids, prompt_mask (`torch.LongTensor` of shape `(batch, prompt)`): padded on the left.
        max_new_tokens (`int`): longest answer in tokens.
        block_size (`int`): tokens of a draft at most, the certain one included.
    """
    config, decoder = model.config, model.decoder
    embed = decoder.get_input_embeddings()
    batch, device = len(prompt_ids), prompt_ids.device
    text = TextSoFar(decoder, prompt_ids, prompt_mask)
    last = text.next_logits.max(-1).indices
    answers = [[token] for token in last.tolist()]
    kept, drafts_of, num_drafts = [0] * batch, [0] * batch, 0
    pause, waiting = FIRST_PAUSE, 0

    def is_done(answer):
        return len(answer) >= max_new_tokens or answer[-1] in config.eos_token_ids

    one = torch.ones(batch, 1, dtype=torch.long, device=device)
    while not all(map(is_done, answers)):
        room = max_new_tokens - min(len(answer) for answer in answers if not is_done(answer))
        size = 0 if waiting else min(block_size, room)
        if size < 2:
            waiting = max(0, waiting - 1)
            last = text.read(embed(last[:, None]), one, one.bool()).max(-1).indices
            for answer, token in zip(answers, last.tolist(), strict=True):
                if not is_done(answer):
                    answer.append(token)
            continue

        prediction = model.proto_predictor(encoder_states, encoder_mask, text.states, text.mask, category_ids)
        lengths = torch.full((batch,), size, device=device)
        layout = build_layout(lengths, config.arrangement, config.chunk_size, config.max_chunks, config.num_e_tokens)
        slots = fill_slots(layout, prediction.e, prediction.m, prediction.m_offsets)
        start = text.mask.shape[1]
        logits = text.read(
            torch.cat([embed(last[:, None]), slots.to(decoder.dtype)], dim=1),
            torch.cat([one, layout.mask.long()], dim=1),
            torch.cat([one.bool(), layout.predicts], dim=1),
        )
        text.keep(start + 1)
        # At the last token the certain next one; at the slots drafts of it and of those that follow.
        drafts = logits.max(-1).indices.view(batch, 1 + size)
        block = torch.cat([drafts[:, :1], drafts[:, 2:]], dim=1)
        verified = text.read(embed(block), one.expand(-1, size), one.expand(-1, size).bool())
        verified = verified.max(-1).indices.view(batch, size)
        right = (block[:, 1:] == verified[:, :-1]).long().cumprod(1)
        accepted = right.sum(1)
        num_drafts += 1
        longest = accepted.max().item()
        text.keep(start + 2 + longest)
        text.mask[:, start + 2 :] = right[:, :longest]
        last = verified.gather(1, accepted[:, None])[:, 0]
        for row, count in enumerate(accepted.tolist()):
            if not is_done(answers[row]):
                kept[row], drafts_of[row] = kept[row] + count, drafts_of[row] + 1
            for token in (*block[row, : 1 + count].tolist(), last[row].item()):
                if not is_done(answers[row]):
                    answers[row].append(token)
        if longest == 0:
            waiting, pause = pause, min(2 * pause, LONGEST_PAUSE)
        else:
            pause = FIRST_PAUSE

    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    sequences = torch.full((batch, lengths.max().item()), config.answer_pad_token_id, device=device)
    for row, answer in enumerate(answers):
        sequences[row, : len(answer)] = torch.tensor(answer, device=device)
    return ProtoGenVerifiedOutput(
        sequences=sequences,
        lengths=lengths,
        accepted_lengths=torch.tensor(kept, device=device) / torch.tensor(drafts_of, device=device).clamp_min(1),
        num_drafts=num_drafts,
        num_passes=text.num_passes,
    )
