"""One-step decoding: the whole answer in one pass of the frozen decoder, with its confidence."""

from dataclasses import dataclass

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .configuration_protogen import UNCERTAINTY_SCORES
from .verified_decoding import ProtoGenVerifiedOutput, verified_decoding

MODES = ("one_step", "verified")


@dataclass
class ProtoGenGenerateOutput(ModelOutput):
    """
    Output of [`ProtoGenForConditionalGeneration.generate`] with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`):
            Answers in the decoder's vocabulary, up to and including EOS, then padding.
        lengths (`torch.LongTensor` of shape `(batch,)`): tokens in each answer, EOS included.
        predicted_lengths (`torch.FloatTensor` of shape `(batch,)`): median of the predicted length, in tokens.
        length_sigmas (`torch.FloatTensor` of shape `(batch,)`):
            Standard deviation of the length in tokens, to first order: `predicted_length` times that of the log length.
        token_confidences (`torch.FloatTensor` of shape `(batch, length)`): probability of each token; 0 at padding.
        confidences (`torch.FloatTensor` of shape `(batch,)`): geometric mean of an answer's token probabilities.
        uncertainties (`torch.FloatTensor` of shape `(batch,)`):
            `config.uncertainty_score` of each answer; where it is calibrated, the expected share of wrong tokens.
        uncertainty_scores (`dict[str, torch.FloatTensor]`, *optional*):
            All of `UNCERTAINTY_SCORES`, each `(batch,)`, as they are; with `output_uncertainty_scores`.
    """

    sequences: torch.LongTensor | None = None
    lengths: torch.LongTensor | None = None
    predicted_lengths: torch.FloatTensor | None = None
    length_sigmas: torch.FloatTensor | None = None
    token_confidences: torch.FloatTensor | None = None
    confidences: torch.FloatTensor | None = None
    uncertainties: torch.FloatTensor | None = None
    uncertainty_scores: dict[str, torch.FloatTensor] | None = None


def log_normalizer(logits: torch.Tensor, rows: int = 128) -> torch.Tensor:
    """`logsumexp` over the vocabulary in float32, a few rows at a time: `(tokens, vocab)` in, `(tokens,)` out."""
    return torch.cat([block.float().logsumexp(-1) for block in logits.split(rows)])


def token_entropy(logits: torch.Tensor, log_normalizers: torch.Tensor, rows: int = 128) -> torch.Tensor:
    """Entropy in nats of each row's distribution, `(tokens,)`; arguments as of and from [`log_normalizer`]."""
    entropies = []
    for block, normalizer in zip(logits.split(rows), log_normalizers.split(rows), strict=True):
        log_p = block.float() - normalizer[:, None]
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(entropies)


def interpolate(x: torch.Tensor, points: list[list[float]]) -> torch.Tensor:
    """The piecewise linear function through `points` `[[x, y], ...]` with growing x, constant outside; any shape."""
    at, value = torch.tensor(points, device=x.device, dtype=x.dtype).T.contiguous()
    if len(at) == 1:
        return value.expand_as(x)
    right = torch.searchsorted(at, x.contiguous()).clamp(1, len(at) - 1)
    share = ((x - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return value[right - 1] + share * (value[right] - value[right - 1])


class ProtoGenGenerationMixin(GenerationMixin):
    """Replaces `GenerationMixin.generate`: nothing here is written token by token."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_prompt_ids: torch.LongTensor | None = None,
        decoder_prompt_mask: torch.Tensor | None = None,
        category_ids: torch.LongTensor | None = None,
        *,
        mode: str = "one_step",
        max_new_tokens: int | None = None,
        block_size: int | None = None,
        proto_tokens: tuple[torch.Tensor, torch.Tensor] | None = None,
        length: int | torch.LongTensor | None = None,
        num_length_sigmas: float = 0.0,
        return_dict_in_generate: bool = False,
        output_uncertainty_scores: bool = False,
    ) -> torch.LongTensor | ProtoGenGenerateOutput | ProtoGenVerifiedOutput:
        """
        Writes one answer for each instruction, cut at EOS: in a single pass of the decoder (`one_step`), or in blocks
        of which the decoder keeps what it would have written itself, token by token and greedily (`verified`).

        Args:
            input_ids, attention_mask, decoder_prompt_ids, decoder_prompt_mask, category_ids:
                As in [`ProtoGenForConditionalGeneration.forward`]; the processor makes them.
            mode (`str`): `one_step` or `verified`; arguments that are for one mode say so.
            max_new_tokens (`int`, *optional*): verified: tokens at most; `config.max_answer_length` by default.
            block_size (`int`, *optional*): verified: tokens of a draft at most; `config.chunk_size` by default.
            proto_tokens (*optional*): one_step: `e` and `m`, shaped as the model's output has them, to write from
                instead of the predicted ones: retrieved from a bank, or fitted.
            length (`int` or `torch.LongTensor` of shape `(batch,)`, *optional*):
                one_step: tokens to write, instead of the predicted length.
            num_length_sigmas (`float`): one_step: writes `exp(mean + num_length_sigmas * sigma)` tokens of the
                predicted log-normal length; EOS still cuts.
            return_dict_in_generate (`bool`): whether to return lengths, confidences and uncertainties as well.
            output_uncertainty_scores (`bool`): one_step: whether that holds every score, not the configured one alone.

        Returns:
            `torch.LongTensor` of shape `(batch, length)`, or [`ProtoGenGenerateOutput`] or [`ProtoGenVerifiedOutput`].

        Raises:
            ValueError: if `length` is below 1 or above `config.max_answer_length`, the mode is unknown or given what is
                for another one, or verified decoding has no prompt or a block that is longer than an answer.
        """
        config = self.config
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}.")
        foreign = {
            "one_step": {"max_new_tokens": max_new_tokens, "block_size": block_size},
            "verified": {
                "length": length,
                "proto_tokens": proto_tokens,
                "num_length_sigmas": num_length_sigmas or None,
            },
        }
        for name, value in foreign[mode].items():
            if value is not None:
                raise ValueError(f"{name} is not for mode={mode}.")
        if mode == "verified":
            self._check_prompt(decoder_prompt_ids, mode)
            block_size = config.chunk_size if block_size is None else block_size
            if not 1 <= block_size <= config.chunk_size * config.max_chunks:
                raise ValueError(
                    f"block_size must lie in 1..{config.chunk_size * config.max_chunks} tokens; got {block_size}."
                )
            output = verified_decoding(
                self,
                *self.encode(input_ids, attention_mask),
                decoder_prompt_ids,
                decoder_prompt_mask,
                category_ids,
                config.max_answer_length if max_new_tokens is None else max_new_tokens,
                block_size,
            )
            return output if return_dict_in_generate else output.sequences
        prompt = decoder_prompt_ids, decoder_prompt_mask
        prediction = self.predict(input_ids, attention_mask, *prompt, category_ids)
        if proto_tokens is not None:
            prediction.e, prediction.m = proto_tokens
        mean, sigma = prediction.log_length_mean, prediction.log_length_variance.sqrt()
        if length is None:
            budget = self.clamp_lengths((mean + num_length_sigmas * sigma).exp())
        else:
            budget = torch.as_tensor(length, device=mean.device).expand(len(mean))
            if budget.min() < 1 or budget.max() > config.max_answer_length:
                raise ValueError(
                    f"length must lie in 1..{config.max_answer_length} tokens (config.max_answer_length); got {length}."
                )
        logits = self.decode(prediction, budget, *prompt)
        # `argmax` over bfloat16 is several times slower than `max` on CPUs.
        best, tokens = logits.max(-1)

        written = torch.arange(budget.max(), device=budget.device) < budget[:, None]
        sequences = torch.full(written.shape, config.answer_pad_token_id, device=budget.device)
        sequences[written] = tokens.to(budget.device)
        is_eos = torch.isin(sequences, torch.tensor(config.eos_token_ids, device=budget.device)) & written
        lengths = torch.where(is_eos.any(-1), is_eos.int().argmax(-1) + 1, budget)
        kept = torch.arange(lengths.max(), device=budget.device) < lengths[:, None]
        sequences = sequences[:, : kept.shape[1]].masked_fill(~kept, config.answer_pad_token_id)
        if not return_dict_in_generate:
            return sequences

        def by_answer(values):
            table = torch.zeros(written.shape, device=budget.device)
            table[written] = values.to(budget.device)
            return table[:, : kept.shape[1]] * kept

        log_normalizers = log_normalizer(logits)
        log_confidence = by_answer(best.float() - log_normalizers)
        confidences = (log_confidence.sum(-1) / lengths).exp()
        compute_score = {
            "confidence": lambda: 1 - confidences,
            "least_confidence": lambda: 1 - log_confidence.min(-1).values.exp(),
            "entropy": lambda: by_answer(token_entropy(logits, log_normalizers)).sum(-1) / lengths,
            "length_sigma": lambda: sigma,
            "predicted_error": lambda: prediction.error_mean,
        }
        names = UNCERTAINTY_SCORES if output_uncertainty_scores else (config.uncertainty_score,)
        scores = {name: compute_score[name]() for name in names}
        uncertainties = scores[config.uncertainty_score]
        if config.uncertainty_points is not None:
            uncertainties = interpolate(uncertainties, config.uncertainty_points)
        return ProtoGenGenerateOutput(
            sequences=sequences,
            lengths=lengths,
            predicted_lengths=mean.exp(),
            length_sigmas=mean.exp() * sigma,
            token_confidences=log_confidence.exp() * kept,
            confidences=confidences,
            uncertainties=uncertainties,
            uncertainty_scores=scores if output_uncertainty_scores else None,
        )
