"""Blockwise decoding: proto-tokens draft the next block, and each mode decides how much of the draft to accept."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .autoregressive import DecoderState
from .frozen_decoder import logits_of
from .proto_predictor import ProtoTokenPrediction
from .proto_tokens import fill_slots
from .sampling import Sampling

# Tokens at each place of a draft whose logits the tokens before it move.
NUM_MOVED = 64


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

    def extend(
        self, tokens: torch.LongTensor, log_confidences: torch.Tensor, counts: torch.LongTensor
    ) -> torch.LongTensor:
        """
        Adds the first `counts` `(batch,)` of `tokens` `(batch, new)`, with the logs of their probabilities.

        Returns:
            How many were added `(batch,)`: none after an answer's end.
        """
        lengths = torch.tensor([len(answer) for answer in self.tokens])
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
        return torch.tensor([len(answer) for answer in self.tokens]) - lengths

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


class Drafter:
    """
    Drafts from one prediction, behind any place of an answer: the text's last token predicts the next one, and slots
    behind it those that follow.

    Args:
        model (`ProtoGenForConditionalGeneration`)
        prediction (`ProtoTokenPrediction`, *optional*): from the prompt; None where nothing is drafted.
    """

    def __init__(self, model, prediction: ProtoTokenPrediction | None):
        self.decoder, self.coherence, self.prediction = model.decoder, model.coherence, prediction
        self.layout = model.layout
        # Slots that learned whole answers predict their own position's token: the first is the text's to predict.
        self.num_idle = int(model.config.first_tokens != "drafts")
        self.laid_out = {}

    def slots(self, size: int) -> torch.Tensor | None:
        """Slots `(batch, slots, dim)` for drafts of `size` tokens; None for none."""
        return self._laid_out(size)[0] if size else None

    def num_slots(self, size: int) -> int:
        """Slots that drafts of `size` tokens take, from one token on."""
        return len(self.places(size))

    def places(self, size: int) -> torch.BoolTensor:
        """Which of the slots `(slots,)` predict the `size` tokens of a draft."""
        return self._laid_out(size)[1]

    def _laid_out(self, size: int) -> tuple[torch.Tensor, torch.BoolTensor]:
        if size not in self.laid_out:
            e, m = self.prediction.e, self.prediction.m
            lengths = torch.full((len(e),), self.num_idle + size, device=e.device)
            layout = self.layout(lengths, num_chunks=e.shape[1])
            places = layout.predicts[0] & (layout.predicts[0].cumsum(0) > self.num_idle)
            self.laid_out[size] = fill_slots(layout, e, m), places
        return self.laid_out[size]

    def read(
        self,
        text: DecoderState,
        tokens: torch.LongTensor,
        mask: torch.LongTensor,
        size: int,
        num_last: int = 1,
        ends: Sequence[int] = (-1,),
        parents: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """
        Reads on with slots for drafts of `size` tokens behind each end; other arguments as in [`DecoderState.read`].

        Returns:
            The decoder's logits at the last tokens `(batch, num_last, vocab)`, and for [`Drafter.draft`] states
            `(batch, ends, size, dim)` and logits `(batch, ends, size, vocab)`; None where `size` is 0.
        """
        states, behind = text.read(tokens, mask, num_last, self.slots(size), ends, parents)
        if not size:
            return logits_of(self.decoder, states), None, None
        behind = behind[:, :, self.places(size)]
        # One pass through the output layer costs less than two.
        logits = logits_of(self.decoder, torch.cat([states, behind.flatten(1, 2)], dim=1))
        return logits[:, :num_last], behind, logits[:, num_last:].unflatten(1, behind.shape[1:3])

    def draft(
        self, states: torch.Tensor, logits: torch.Tensor, certain: torch.LongTensor, sampling: Sampling
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """
        Drafts `(batch, size)` and the logits that they are picked from `(batch, size, vocab)`.

        Args:
            states (`torch.Tensor` of shape `(batch, size, dim)`), logits (`torch.Tensor` of shape `(batch, size,
                vocab)`): the decoder's, at the slots that predict them.
            certain (`torch.LongTensor` of shape `(batch, 1)`): the token before each draft.
        """
        if self.coherence is None:
            return sampling.pick(logits), logits
        # Only the most likely tokens are moved, which takes no more passes through the output layer.
        most_likely, tokens, moved = logits.topk(min(NUM_MOVED, logits.shape[-1])).indices, certain, []
        for state, before_it, candidates in zip(states.unbind(1), logits.unbind(1), most_likely.unbind(1), strict=True):
            nearest_first = self.decoder.get_input_embeddings()(tokens.flip(1))
            missing = self.coherence.num_tokens - tokens.shape[1]
            state = self.coherence(state, F.pad(nearest_first, (0, 0, 0, missing)))
            moved.append(before_it.scatter(-1, candidates, logits_of(self.decoder, state, candidates)))
            tokens = torch.cat([tokens, sampling.pick(moved[-1])[:, None]], dim=1)
        return tokens[:, 1:], torch.stack(moved, dim=1)
