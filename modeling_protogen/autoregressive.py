"""Ordinary autoregressive use of the frozen decoder: teacher-forced scoring, and decoding with a KV cache."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from .anchors import pair_mask
from .draft_tree import ancestors
from .frozen_decoder import check_positions, crop_cache, logits_after, move_right, num_positions, slot_positions
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
        batch (`int`): texts, which are empty at the start.

    Attributes:
        ids, mask (`torch.LongTensor` of shape `(batch, read)`): what was read; padded on the left.
        num_passes (`int`): of the decoder.
    """

    def __init__(self, decoder: PreTrainedModel, batch: int):
        self.decoder = decoder
        self.num_passes = 0
        self.cache = DynamicCache()
        self.ids = self.mask = torch.empty(batch, 0, dtype=torch.long, device=decoder.device)

    @property
    def num_free(self) -> int:
        """Tokens that all texts may still get within the decoder's positions."""
        return num_positions(self.decoder) - self.mask.sum(1).max().item()

    def read(
        self,
        ids: torch.LongTensor,
        mask: torch.LongTensor,
        num_last: int = 1,
        slots: torch.Tensor | None = None,
        ends: Sequence[int] = (-1,),
        parents: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Reads on, with slots behind some of the last tokens, which are forgotten again.

        Args:
            ids, mask (`torch.LongTensor` of shape `(batch, new)`): padded on the left.
            num_last (`int`): tokens whose states are wanted, which are no padding then if it is more than one.
            slots (`torch.Tensor` of shape `(batch, size, dim)`, *optional*): the same behind each end.
            ends (`Sequence[int]`): places among the last tokens that slots lie behind; the last one by default, and
                with others the decoder must take masks of pairs ([`longest_pair_masked`]).
            parents (`Sequence[int]`, *optional*): which of the last tokens each of them but the first follows from
                ([`draft_tree`]), where that is not the one before it; the decoder must take masks of pairs.

        Returns:
            The decoder's last states at these tokens `(batch, num_last, dim)`, and at the slots behind each end
            `(batch, ends, size, dim)`.
        """
        crop_cache(self.cache, self.ids.shape[1])  # Slots of the last pass.
        missing = (mask == 0).sum(1)
        if len(self.cache.layers) and missing.any():
            # Padding between a text and what is new would count as distance: its last tokens are read again there.
            known, places = self.ids.shape[1], torch.arange(self.ids.shape[1] + ids.shape[1], device=ids.device)
            back = missing[:, None] * (places < known + missing[:, None])
            ids = torch.cat([self.ids, ids], dim=1).gather(1, (places - back).clamp_min(0))[:, known:]
            longest = (self.mask.sum(1) - missing).max().clamp_min(0).item()
            self.ids = move_right(self.cache, self.ids, missing, longest)
        num_tokens = self.mask.sum(1) + mask.sum(1)
        start, new = self.ids.shape[1], ids.shape[1]
        self.ids, self.mask = torch.cat([self.ids, ids], dim=1), torch.cat([self.mask, mask], dim=1)
        text = (torch.arange(self.ids.shape[1], 0, -1, device=ids.device) <= num_tokens[:, None]).long()
        check_positions(self.decoder, text)
        inputs = {
            "inputs_embeds": self.decoder.get_input_embeddings()(ids),
            "attention_mask": text,
            "position_ids": position_ids(text)[:, start:],
        }
        follows = None
        if parents is not None:
            follows = ancestors(parents).to(ids.device)
            # A token stands as far from the text as it has ancestors.
            surplus = torch.arange(1, 1 + num_last, device=ids.device) - follows.sum(1)
            inputs["position_ids"][:, new - num_last :] -= surplus
        if slots is not None or follows is not None:
            places = torch.arange(1 - num_last, 1)[list(ends)]
            inputs = self._with_slots(inputs, slots, places, follows)
        num_slots = 0 if slots is None else len(ends) * slots.shape[1]
        with slots_at_the_end(num_slots):
            output = self.decoder.base_model(**inputs, past_key_values=self.cache, use_cache=True)
        self.num_passes += 1
        states, of_slots = output.last_hidden_state[:, new - num_last : new], None
        if slots is not None:
            of_slots = output.last_hidden_state[:, new:].unflatten(1, (len(ends), -1))
        return states, of_slots

    def _with_slots(
        self,
        inputs: dict[str, torch.Tensor],
        slots: torch.Tensor | None,
        places: torch.LongTensor,
        follows: torch.BoolTensor | None,
    ) -> dict[str, torch.Tensor]:
        """With slots behind tokens at these places: 0 is the last, -1 the one before it."""
        text, embeds = inputs["attention_mask"], inputs["inputs_embeds"]
        if slots is None:
            slots, places = embeds[:, :0], places[:0]
        size = slots.shape[1]
        # What a decoder makes of a mask of texts is right for slots at its end too, and all families do.
        mask = F.pad(text, (0, size), value=1)
        if follows is not None or places.tolist() != [0]:
            ends = (text.shape[1] + places.to(text.device)).expand(len(text), -1)
            mask = pair_mask(text, ends, size, embeds.dtype, embeds.shape[1], follows)
        positions = slot_positions(self.decoder, 1 + inputs["position_ids"][:, places - 1], size)
        return {
            "inputs_embeds": torch.cat([embeds, slots.to(embeds.dtype).repeat(1, len(places), 1)], dim=1),
            "attention_mask": mask,
            "position_ids": torch.cat([inputs["position_ids"], positions], dim=1),
        }

    def follow(self, branches: torch.LongTensor, size: int) -> None:
        """
        Puts each text's branch of the tree that the last pass read next to each other, in the tree's place.

        Args:
            branches (`torch.LongTensor` of shape `(batch, tokens)`): numbers of their tokens.
            size (`int`): tokens of the tree.
        """
        start = self.ids.shape[1] - size
        rows, tokens = torch.arange(len(branches), device=branches.device)[:, None], start + branches
        places = slice(start, start + branches.shape[1])
        self.ids[:, places] = self.ids[rows, tokens]
        for layer in self.cache.layers:
            for part in (layer.keys, layer.values):
                there = rows.to(part.device), slice(None), tokens.to(part.device)
                part[:, :, places] = part[there].transpose(1, 2)

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
        self.ids = self.ids[:, : self.ids.shape[1] - fewest]
        crop_cache(self.cache, self.ids.shape[1])
        self.ids = move_right(self.cache, self.ids, surplus, self.mask.sum(1).max().item())
