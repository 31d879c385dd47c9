"""One-step decoding: whole answers in a single pass of the decoder; drawn several times, or refined, where wanted."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from .autoregressive import teacher_forced_logits
from .frozen_decoder import copied_cache
from .proto_predictor import ProtoTokenPrediction
from .sampling import Sampling, log_probability

# What a prediction says of each answer beside its proto-tokens, `(batch,)`.
OF_ANSWERS = ("log_length_mean", "log_length_variance", "error_mean", "error_variance", "log_duration_confidence")


def token_mask(lengths: torch.LongTensor) -> torch.BoolTensor:
    """Where a table `(batch, longest)` of answers of these lengths `(batch,)` holds tokens."""
    return torch.arange(lengths.max(), device=lengths.device) < lengths[:, None]


def as_rows(values: torch.Tensor, lengths: torch.LongTensor, fill: float) -> torch.Tensor:
    """Values `(answer_tokens,)`, answer after answer, as a table `(batch, longest)`; `fill` after each end."""
    is_token = token_mask(lengths)
    table = torch.full(is_token.shape, fill, dtype=values.dtype, device=lengths.device)
    table[is_token] = values.to(lengths.device)
    return table


def cut_at_eos(sequences: torch.LongTensor, lengths: torch.LongTensor, eos_token_ids: list[int]) -> torch.LongTensor:
    """Lengths `(batch,)` of the answers up to and including the first EOS of each."""
    is_eos = torch.isin(sequences, torch.tensor(eos_token_ids, device=lengths.device)) & token_mask(lengths)
    return torch.where(is_eos.any(-1), is_eos.int().argmax(-1) + 1, lengths)


def cut_where(
    is_stopped: Callable[[list[int]], bool], sequences: torch.LongTensor, lengths: torch.LongTensor
) -> torch.LongTensor:
    """Lengths `(batch,)` of the answers up to and including the first token that ends one, by `stops_at`."""
    rows = [row[:length] for row, length in zip(sequences.tolist(), lengths.tolist(), strict=True)]
    ends = [next((n for n in range(1, len(row)) if is_stopped(row[:n])), len(row)) for row in rows]
    return torch.tensor(ends, device=lengths.device)


@dataclass(frozen=True)
class Draft:
    """
    A batch of whole answers, not cut yet.

    Args:
        prediction (`ProtoTokenPrediction`): what they were written from.
        lengths (`torch.LongTensor` of shape `(batch,)`): tokens of each.
        logits (`torch.Tensor` of shape `(answer_tokens, vocab)`), tokens (`torch.LongTensor` of shape
            `(answer_tokens,)`): answer after answer.
    """

    prediction: ProtoTokenPrediction
    lengths: torch.LongTensor
    logits: torch.Tensor
    tokens: torch.LongTensor

    def of_rows(self, rows: torch.LongTensor) -> "Draft":
        """Some of the answers, by growing numbers, without the proto-tokens that they were written from."""
        numbers = torch.arange(len(self.lengths), device=rows.device).repeat_interleave(self.lengths)
        is_in = torch.isin(numbers, rows)
        of_answers = {name: getattr(self.prediction, name)[rows] for name in OF_ANSWERS}
        prediction = replace(self.prediction, **of_answers)
        return Draft(prediction, self.lengths[rows], self.logits[is_in], self.tokens[is_in])


def refine(
    decoder: PreTrainedModel,
    prompt: tuple[torch.LongTensor, torch.Tensor],
    logits: torch.Tensor,
    tokens: torch.LongTensor,
    lengths: torch.LongTensor,
    num_refinements: int,
    confidence_threshold: float,
    sampling: Sampling,
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    The decoder reads the draft and predicts again the tokens that are less sure than the threshold, all in one pass and
    as often as wanted: what it predicts at a place depends on the draft before it. With all tokens unsure this is
    Jacobi decoding (Santilli et al., 2023, https://arxiv.org/abs/2305.10427), which ends at the greedy answer.

    Args:
        prompt: ids and mask `(batch, prompt)`, padded on the left.
        logits (`torch.Tensor` of shape `(answer_tokens, vocab)`), tokens (`torch.LongTensor` of shape
            `(answer_tokens,)`): the draft, answer after answer.
        lengths (`torch.LongTensor` of shape `(batch,)`): of the draft's answers.

    Returns:
        Logits and tokens, new where they were unsure.
    """
    for _ in range(num_refinements):
        unsure = log_probability(logits, tokens).exp() < confidence_threshold
        if not unsure.any():
            break
        own = teacher_forced_logits(decoder, *prompt, as_rows(tokens, lengths, 0), token_mask(lengths))
        tokens = torch.where(unsure, sampling.pick(own), tokens)
        # In place: a batch's logits are the largest tensor there is.
        logits = torch.where(unsure[:, None], own, logits, out=own)
    return logits, tokens


def candidates(
    prediction: ProtoTokenPrediction, num_candidates: int, noise: float
) -> tuple[ProtoTokenPrediction, torch.Tensor]:
    """
    Every prediction `num_candidates` times, next to each other: the first as it is, the others with Gaussian noise of
    this standard deviation on `e` and `m`.

    Returns:
        The predictions, and normal quantiles `(batch * num_candidates,)` for their log lengths: the first is the
        median, the others lie evenly around it.
    """

    def repeated(tensor):
        return tensor.repeat_interleave(num_candidates, dim=0)

    def shaken(tensor):
        tensor = repeated(tensor)
        shake = noise * torch.randn_like(tensor)
        shake[::num_candidates] = 0
        return tensor + shake

    cache = prediction.prompt_cache
    if cache is not None:
        cache = copied_cache(cache)
        cache.batch_repeat_interleave(num_candidates)
    places = torch.arange(1, num_candidates, device=prediction.e.device) / num_candidates
    quantiles = torch.special.ndtri(torch.cat([places.new_tensor([0.5]), places]))
    return (
        replace(
            prediction,
            e=shaken(prediction.e),
            m=shaken(prediction.m),
            prompt_cache=cache,
            **{name: repeated(getattr(prediction, name)) for name in OF_ANSWERS},
            next_logits=None if prediction.next_logits is None else repeated(prediction.next_logits),
        ),
        quantiles.repeat(len(prediction.e)),
    )


def best_candidates(
    decoder: PreTrainedModel,
    prompt: tuple[torch.LongTensor, torch.Tensor],
    sequences: torch.LongTensor,
    lengths: torch.LongTensor,
    num_candidates: int,
) -> torch.LongTensor:
    """
    For each instruction the row of the candidate whose tokens have the highest mean log-probability under the decoder:
    `(batch,)`.

    Args:
        prompt: ids and mask `(batch * num_candidates, prompt)`, padded on the left.
        sequences (`torch.LongTensor` of shape `(batch * num_candidates, written)`), lengths (`torch.LongTensor` of
            shape `(batch * num_candidates,)`): the candidates.
    """
    is_token = token_mask(lengths)
    sequences = sequences[:, : is_token.shape[1]]
    own = teacher_forced_logits(decoder, *prompt, sequences, is_token)
    log_p = as_rows(log_probability(own, sequences[is_token]), lengths, 0.0).sum(1) / lengths
    best = log_p.view(-1, num_candidates).argmax(1)
    return best + num_candidates * torch.arange(len(best), device=best.device)
