"""Blockwise decoding: proto-tokens draft the next block, and each mode decides how much of the draft to accept."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .autoregressive import DecoderState
from .frozen_decoder import num_positions
from .proto_tokens import fill_slots, predicting_positions


@dataclass
class PredictorInputs:
    """
    Inputs of the predictor that do not depend on the partial answer.

    Args:
        encoder_states (`torch.Tensor` of shape `(batch, source, encoder_dim)`, *optional*)
        encoder_mask (`torch.Tensor` of shape `(batch, source)`, *optional*)
        category_ids (`torch.LongTensor` of shape `(batch,)`, *optional*)
    """

    encoder_states: torch.Tensor | None
    encoder_mask: torch.Tensor | None
    category_ids: torch.LongTensor | None


def stops_at(
    eos_token_ids: list[int], stop_strings: list[str] = (), tokenizer: PreTrainedTokenizerBase | None = None
) -> Callable[[list[int]], bool]:
    """Whether tokens end with EOS, or their last one completes one of some strings."""
    # A token has a byte at least.
    window = max((len(string.encode()) for string in stop_strings), default=0)

    def is_stopped(tokens: list[int]) -> bool:
        if tokens[-1] in eos_token_ids:
            return True
        if not window:
            return False
        tail = tokenizer.decode(tokens[-window:])
        return any(string in tail for string in stop_strings)

    return is_stopped


class GenerationBuffer:
    """
    Answers of a batch while they are written. Each ends at EOS, a stop string or `max_new_tokens`; later tokens are
    dropped.

    Args:
        is_stopped (`Callable`): whether an answer, a list of tokens, has ended by its last one.
        streamer (`BaseStreamer`, *optional*): gets the tokens of a single answer as they come.
    """

    def __init__(
        self,
        batch: int,
        max_new_tokens: int,
        is_stopped: Callable[[list[int]], bool],
        streamer: BaseStreamer | None = None,
    ):
        self.max_new_tokens = max_new_tokens
        self.is_stopped = is_stopped
        self.streamer = streamer
        self.tokens = [[] for _ in range(batch)]
        self.log_confidences = [[] for _ in range(batch)]
        self.is_done = [False] * batch
        self.num_kept = [0] * batch
        self.num_drafts = [0] * batch

    @property
    def unfinished(self) -> list[int]:
        return [row for row, done in enumerate(self.is_done) if not done]

    @property
    def room(self) -> int:
        """Tokens that the shortest unfinished answer may still get."""
        return self.max_new_tokens - min(len(self.tokens[row]) for row in self.unfinished)

    def note_draft(self, kept: torch.LongTensor, rows: list[int]) -> None:
        """Counts a draft for each of these rows, and the tokens that are kept of it, of `(batch,)`."""
        for row in rows:
            self.num_kept[row] += kept[row].item()
            self.num_drafts[row] += 1

    def extend(self, tokens: torch.LongTensor, log_confidences: torch.Tensor, counts: torch.LongTensor) -> None:
        """Adds the first `counts` `(batch,)` of `tokens` `(batch, new)`, with the logs of their probabilities."""
        rows = zip(tokens.tolist(), log_confidences.tolist(), counts.tolist(), strict=True)
        for row, (new, confidences, count) in enumerate(rows):
            before = len(self.tokens[row])
            for token, confidence in zip(new[:count], confidences, strict=False):
                if self.is_done[row]:
                    break
                self.tokens[row].append(token)
                self.log_confidences[row].append(confidence)
                self.is_done[row] = len(self.tokens[row]) == self.max_new_tokens or self.is_stopped(self.tokens[row])
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


def largest_blocks(model, text: DecoderState, new_mask: torch.LongTensor) -> torch.LongTensor:
    """
    Tokens that each text may get in one block within the decoder's positions, `(batch,)`, its own next one included; at
    least that one. Arguments as in [`read_and_draft`].
    """
    known = int(model.config.reads_decoder_states)
    longest = model.longest_answers(text.mask.sum(1) + new_mask.sum(1)) - known
    return longest.clamp_min(1)


def read_and_draft(
    model,
    text: DecoderState,
    new_tokens: torch.LongTensor,
    new_mask: torch.LongTensor,
    size: int,
    instruction: Callable[[], PredictorInputs],
) -> torch.Tensor:
    """
    Reads new tokens of the text, and proto-tokens after them, in one pass.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        new_tokens, new_mask (`torch.LongTensor` of shape `(batch, new)`): padded on the left; the text so far holds
            them when this returns.
        instruction (`Callable`): gives what drafts are predicted from; not called without a draft.
        size (`int`): tokens to predict. The first is the decoder's own prediction; a size of 1 has no draft.

    Returns:
        Logits `(batch, size, vocab)` of the tokens that follow.
    """
    predicting, slots, slot_mask = torch.ones_like(new_mask[:, :1], dtype=torch.bool), None, None
    if size > 1:
        given = instruction()
        prediction = model.proto_predictor(
            given.encoder_states, given.encoder_mask, text.states, text.mask, given.category_ids
        )
        # The first token of an answer is fed before the slots: the last new one.
        known = int(model.config.reads_decoder_states)
        lengths = torch.full((len(new_tokens),), known + size, device=new_tokens.device)
        layout = model.layout(lengths, prediction.e.shape[1])
        slots = fill_slots(layout, prediction.e, prediction.m)
        # Beyond the last position of a text nothing is read, and what is predicted there means nothing.
        num_free = num_positions(model.decoder) - text.mask.sum(1) - new_mask.sum(1)
        slot_mask = layout.mask & (torch.arange(slots.shape[1], device=slots.device) < num_free[:, None])
        predicting = predicting_positions(layout, known + 1)[:, known:]
    predicts = F.pad(predicting, (new_tokens.shape[1] - 1, 0))
    return text.read(new_tokens, new_mask, predicts, slots, slot_mask).view(len(new_tokens), size, -1)
