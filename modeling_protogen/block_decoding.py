"""Answers written block after block: proto-tokens draft what follows the text so far, and each mode keeps its part."""

from dataclasses import dataclass

import torch
from transformers.generation.streamers import BaseStreamer

from .autoregressive import TextSoFar
from .proto_tokens import build_layout, fill_slots


@dataclass
class Instruction:
    """
    What drafts are predicted from besides the text so far; as of `ProtoTokenPredictor`.

    Args:
        encoder_states (`torch.Tensor` of shape `(batch, source, encoder_dim)`, *optional*)
        encoder_mask (`torch.Tensor` of shape `(batch, source)`, *optional*)
        category_ids (`torch.LongTensor` of shape `(batch,)`, *optional*)
    """

    encoder_states: torch.Tensor | None
    encoder_mask: torch.Tensor | None
    category_ids: torch.LongTensor | None


class Answers:
    """
    A batch of growing answers, each until EOS or `max_new_tokens`; what comes after its end is dropped.

    Args:
        streamer (`BaseStreamer`, *optional*): gets the tokens of a single answer as they come.
    """

    def __init__(self, batch: int, max_new_tokens: int, eos_token_ids: list[int], streamer: BaseStreamer | None = None):
        self.max_new_tokens = max_new_tokens
        self.eos_token_ids = eos_token_ids
        self.streamer = streamer
        self.tokens = [[] for _ in range(batch)]
        self.log_confidences = [[] for _ in range(batch)]
        self.num_kept = [0] * batch
        self.num_drafts = [0] * batch

    def is_done(self, row: int) -> bool:
        answer = self.tokens[row]
        return len(answer) >= self.max_new_tokens or (bool(answer) and answer[-1] in self.eos_token_ids)

    @property
    def unfinished(self) -> list[int]:
        return [row for row in range(len(self.tokens)) if not self.is_done(row)]

    @property
    def room(self) -> int:
        """Tokens that the shortest unfinished answer may still get."""
        return self.max_new_tokens - min(len(self.tokens[row]) for row in self.unfinished)

    def note_draft(self, kept: torch.LongTensor) -> None:
        """Counts a draft for each unfinished answer, and the tokens `(batch,)` that are kept of it."""
        for row in self.unfinished:
            self.num_kept[row] += kept[row].item()
            self.num_drafts[row] += 1

    def extend(self, tokens: torch.LongTensor, log_confidences: torch.Tensor, counts: torch.LongTensor) -> None:
        """Adds the first `counts` `(batch,)` of `tokens` `(batch, new)`, with the logs of their probabilities."""
        rows = zip(tokens.tolist(), log_confidences.tolist(), counts.tolist(), strict=True)
        for row, (new, confidences, count) in enumerate(rows):
            before = len(self.tokens[row])
            for token, confidence in zip(new[:count], confidences, strict=False):
                if not self.is_done(row):
                    self.tokens[row].append(token)
                    self.log_confidences[row].append(confidence)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(self.tokens[row][before:]))

    def tables(
        self, pad_token_id: int, device: torch.device
    ) -> tuple[torch.LongTensor, torch.Tensor, torch.LongTensor]:
        """Tokens and the logs of their probabilities, 0 after the end, `(batch, length)`, and lengths `(batch,)`."""
        lengths = torch.tensor([len(answer) for answer in self.tokens], device=device)
        sequences = torch.full((len(lengths), lengths.max().item()), pad_token_id, device=device)
        log_confidences = torch.zeros(sequences.shape, device=device)
        for row, answer in enumerate(self.tokens):
            sequences[row, : len(answer)] = torch.tensor(answer, device=device)
            log_confidences[row, : len(answer)] = torch.tensor(self.log_confidences[row], device=device)
        return sequences, log_confidences, lengths


def read_and_draft(
    model,
    text: TextSoFar,
    new_tokens: torch.LongTensor,
    new_mask: torch.LongTensor,
    size: int,
    instruction: Instruction,
) -> torch.Tensor:
    """
    Reads new tokens of the text, and proto-tokens after them, in one pass.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        new_tokens, new_mask (`torch.LongTensor` of shape `(batch, new)`): padded on the left; the text so far holds
            them when this returns.
        size (`int`): tokens to predict. The first is the decoder's own prediction; a size of 1 has no draft.

    Returns:
        Logits `(batch, size, vocab)` of the tokens that follow.
    """
    config, embeds = model.config, model.decoder.get_input_embeddings()(new_tokens)
    mask, length = new_mask, text.mask.shape[1] + new_tokens.shape[1]
    predicts = torch.zeros_like(new_mask, dtype=torch.bool)
    predicts[:, -1] = True
    if size > 1:
        prediction = model.proto_predictor(
            instruction.encoder_states, instruction.encoder_mask, text.states, text.mask, instruction.category_ids
        )
        lengths = torch.full((len(new_tokens),), size, device=new_tokens.device)
        layout = build_layout(lengths, config.arrangement, config.chunk_size, config.max_chunks, config.num_e_tokens)
        slots = fill_slots(layout, prediction.e, prediction.m, prediction.m_offsets)
        embeds = torch.cat([embeds, slots.to(embeds.dtype)], dim=1)
        mask = torch.cat([mask, layout.mask.long()], dim=1)
        # The first slot that predicts drafts what the decoder's own prediction says better.
        drafts = layout.predicts & (layout.predicts.long().cumsum(1) > 1)
        predicts = torch.cat([predicts, drafts], dim=1)
    logits = text.read(embeds, mask, predicts)
    text.keep(length)
    return logits.view(len(new_tokens), size, -1)
