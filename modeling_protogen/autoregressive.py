"""Ordinary autoregressive use of the frozen decoder: teacher-forced scoring, and decoding with a KV cache."""

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from .frozen_decoder import check_positions, crop_cache, logits_after, move_right, states_of
from .proto_tokens import position_ids
from .slot_adapters import slots_at_the_end


@torch.no_grad()
def teacher_forced_logits(
    decoder: PreTrainedModel,
    prompt_ids: torch.LongTensor,
    prompt_mask: torch.Tensor,
    answers: torch.LongTensor,
    is_token: torch.BoolTensor,
    prompt_cache: Cache | None = None,
) -> torch.Tensor:
    """
    What the decoder says itself at each position of given answers, after the prompt and the answer's tokens before it.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(batch, prompt)`): padded on the left.
        answers (`torch.LongTensor` of shape `(batch, length)`): any valid ids after the end.
        is_token (`torch.BoolTensor` of shape `(batch, length)`): where the answers are.
        prompt_cache (`Cache`, *optional*): the prompt's keys and values, from [`read_prefix`].

    Returns:
        `torch.Tensor` of shape `(answer_tokens, vocab)`, answer after answer.
    """
    mask = torch.cat([prompt_mask.long(), is_token[:, :-1].long()], dim=1)
    check_positions(decoder, mask)
    # The prompt's last position predicts the first token, each token the next.
    predicts = torch.cat([torch.zeros_like(prompt_mask[:, :-1], dtype=torch.bool), is_token], dim=1)
    return logits_after(
        decoder,
        prompt_cache,
        prompt_ids.shape[1] - 1,
        attention_mask=mask,
        predicts=predicts,
        input_ids=torch.cat([prompt_ids, answers[:, :-1]], dim=1),
        position_ids=position_ids(mask),
    )


def up_to_eos(sequences: torch.LongTensor, eos_token_ids: list[int]) -> list[list[int]]:
    """Answers `(batch, length)`, each up to and including its first EOS."""
    rows = sequences.tolist()
    ends = [next((n for n, token in enumerate(row, 1) if token in eos_token_ids), None) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


class DecoderState:
    """
    A batch of texts that the decoder has read. Their keys and values all end at the cache's last position, with nothing
    between them but the texts' own: then decoders that count positions (`position_ids`), and those that count places in
    the cache (ALiBi in MPT, windows), agree, at whatever paces the texts grow.

    Args:
        decoder (`PreTrainedModel`)
        ids, mask (`torch.Tensor` of shape `(batch, length)`): the texts at the start, padded on the left.
        layers (`list[int]`): whose hidden states are kept.

    Attributes:
        next_logits (`torch.Tensor` of shape `(batch, 1, vocab)`): of the token after each text at the start.
        states (`torch.Tensor` of shape `(batch, read, layers, dim)`, *optional*): hidden states of all that was read.
        mask (`torch.LongTensor` of shape `(batch, read)`): which of them are of the texts.
    """

    def __init__(self, decoder: PreTrainedModel, ids: torch.LongTensor, mask: torch.Tensor, layers: list[int]):
        self.decoder = decoder
        self.layers = layers
        self.num_passes = 0
        self.cache = DynamicCache()
        # The tokens at the places of the cache; padded on the left.
        self.ids = ids[:, :0]
        self.mask = mask[:, :0].long()
        self.states = None
        last = torch.zeros_like(mask, dtype=torch.bool)
        last[:, -1] = True
        self.next_logits = self.read(ids, mask.long(), last)[:, None]

    def read(
        self,
        ids: torch.LongTensor,
        mask: torch.LongTensor,
        predicts: torch.BoolTensor,
        slots: torch.Tensor | None = None,
        slot_mask: torch.BoolTensor | None = None,
    ) -> torch.Tensor:
        """
        Reads on, and slots after that, which are forgotten again.

        Args:
            ids, mask (`torch.LongTensor` of shape `(batch, new)`): padded on the left.
            predicts (`torch.BoolTensor` of shape `(batch, new + slots)`): where logits are wanted.
            slots (`torch.Tensor` of shape `(batch, slots, dim)`), slot_mask (`torch.BoolTensor` of shape `(batch,
                slots)`): padded on the right.

        Returns:
            Logits `(positions, vocab)`.
        """
        missing = (mask == 0).sum(1)
        if len(self.cache.layers) and missing.any():
            # Padding between a text and what is new would count as distance: its last tokens are read again there.
            known, places = self.ids.shape[1], torch.arange(self.ids.shape[1] + ids.shape[1], device=ids.device)
            back = missing[:, None] * (places < known + missing[:, None])
            ids = torch.cat([self.ids, ids], dim=1).gather(1, (places - back).clamp_min(0))[:, known:]
            longest = (self.mask.sum(1) - missing).max().clamp_min(0).item()
            self.ids = move_right(self.cache, self.ids, missing, longest)
        num_tokens = self.mask.sum(1) + mask.sum(1)
        start, embeds, num_slots = self.ids.shape[1], self.decoder.get_input_embeddings()(ids), 0
        self.ids, self.mask = torch.cat([self.ids, ids], dim=1), torch.cat([self.mask, mask], dim=1)
        whole = (torch.arange(self.ids.shape[1], 0, -1, device=ids.device) <= num_tokens[:, None]).long()
        if slots is not None:
            num_slots = slots.shape[1]
            embeds = torch.cat([embeds, slots.to(embeds.dtype)], dim=1)
            whole = torch.cat([whole, slot_mask.long()], dim=1)
        check_positions(self.decoder, whole)
        with slots_at_the_end(num_slots):
            output = self.decoder(
                inputs_embeds=embeds,
                attention_mask=whole,
                position_ids=position_ids(whole)[:, start:],
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=bool(self.layers),
                logits_to_keep=predicts,
            )
        self.num_passes += 1
        crop_cache(self.cache, self.ids.shape[1])
        if self.layers:
            new = states_of(output, self.layers)[:, : mask.shape[1]]
            self.states = new if self.states is None else torch.cat([self.states, new], dim=1)
        return output.logits

    def forget(self, surplus: torch.LongTensor, is_done: list[bool]) -> None:
        """
        Takes back each text's last tokens, of those that the last pass read.

        Args:
            surplus (`torch.LongTensor` of shape `(batch,)`): how many.
            is_done (`list[bool]`): texts that are not read on, of which one token stays.
        """
        if all(is_done):
            return
        done = torch.tensor(is_done, device=surplus.device)
        fewest = surplus[~done].min().item()
        # What is of no use need not move.
        surplus = (surplus - fewest).masked_fill(done, 0)
        length = self.mask.shape[1] - fewest
        self.mask = self.mask[:, :length] * (torch.arange(length, 0, -1, device=done.device) > surplus[:, None])
        self.mask[done] = F.one_hot(torch.tensor(length - 1), length).to(done.device)
        if self.states is not None:
            self.states = self.states[:, :length]
        self.ids = self.ids[:, : self.ids.shape[1] - fewest]
        crop_cache(self.cache, self.ids.shape[1])
        self.ids = move_right(self.cache, self.ids, surplus, self.mask.sum(1).max().item())
