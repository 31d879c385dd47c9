"""Ordinary autoregressive use of the frozen decoder: teacher-forced scoring, and decoding with a KV cache."""

import torch
from transformers import Cache, PreTrainedModel

from .frozen_decoder import crop_cache, logits_after, new_cache, states_of
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


class DecoderState:
    """
    A batch of texts that the decoder has read: its keys and values, its hidden states of the layers that are wanted
    `(batch, read, layers, dim)`, and which of the positions count `(batch, read)`. What was read and turned out wrong
    is masked, so texts of a batch may grow at different paces.

    Raises:
        ValueError: for a batch and a decoder with a sliding window, of which masked positions would take a part.
    """

    def __init__(self, decoder: PreTrainedModel, ids: torch.LongTensor, mask: torch.Tensor, layers: list[int]):
        self.decoder = decoder
        self.layers = layers
        self.num_passes = 0
        self.cache = new_cache(decoder)
        if len(ids) > 1 and any(self.cache.is_sliding):
            raise ValueError(
                "this decoder attends to a sliding window; texts that grow in blocks have to be decoded one by one."
            )
        self.mask = mask[:, :0].long()
        self.states = None
        embeds = decoder.get_input_embeddings()(ids)
        last = torch.zeros_like(mask, dtype=torch.bool)
        last[:, -1] = True
        # Of the next token, `(batch, 1, vocab)`.
        self.next_logits = self.read(embeds, mask.long(), last)[:, None]

    def read(
        self, embeds: torch.Tensor, mask: torch.LongTensor, predicts: torch.BoolTensor, num_slots: int = 0
    ) -> torch.Tensor:
        """
        Reads on, `(batch, new, dim)`, of which the last `num_slots` are slots; returns logits `(positions, vocab)`
        where `predicts` `(batch, new)`.
        """
        whole = torch.cat([self.mask, mask], dim=1)
        with slots_at_the_end(num_slots):
            output = self.decoder(
                inputs_embeds=embeds,
                attention_mask=whole,
                position_ids=position_ids(whole)[:, self.mask.shape[1] :],
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=bool(self.layers),
                logits_to_keep=predicts,
            )
        self.num_passes += 1
        self.mask = whole
        if self.layers:
            new = states_of(output, self.layers)
            self.states = new if self.states is None else torch.cat([self.states, new], dim=1)
        return output.logits

    def keep(self, length: int) -> None:
        """Forgets all that was read after the first `length` positions."""
        crop_cache(self.cache, length)
        self.mask = self.mask[:, :length]
        if self.states is not None:
            self.states = self.states[:, :length]
