"""Decoding: `generate` in all its modes, and what it returns."""

from dataclasses import dataclass, replace

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .adaptive_decoding import adaptive_decoding
from .autoregressive import DecoderState
from .block_decoding import Answers, Instruction, stops_at
from .configuration_protogen import UNCERTAINTY_SCORES
from .cuda_graphs import OneStepGraphs
from .one_step_decoding import as_rows, candidates, cut_at_eos, likeliest_candidates, refine, token_mask
from .sampling import Sampling, log_probability, token_entropy
from .verified_decoding import verified_decoding

# The options of each mode, besides those of all.
BLOCK_OPTIONS = {"max_new_tokens", "block_size", "stop_strings", "processor", "streamer"}
AT_ONCE_OPTIONS = {"length", "num_length_sigmas", "proto_tokens", "abstain_above", "output_uncertainty_scores"}
MODES = {
    "one_step": AT_ONCE_OPTIONS | {"num_candidates", "candidate_noise"},
    "refine": AT_ONCE_OPTIONS | {"num_refinements", "confidence_threshold"},
    "adaptive": BLOCK_OPTIONS | {"confidence_threshold"},
    "verified": BLOCK_OPTIONS,
}


@dataclass
class ProtoGenGenerateOutput(ModelOutput):
    """
    Output of [`ProtoGenForConditionalGeneration.generate`] with `return_dict_in_generate=True`.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, length)`):
            Answers in the decoder's vocabulary, up to and including EOS, then padding.
        lengths (`torch.LongTensor` of shape `(batch,)`): tokens in each answer, EOS included.
        token_confidences (`torch.FloatTensor` of shape `(batch, length)`): probability of each token; 0 at padding.
            The decoder's own where it verified the token, otherwise that of the draft.
        confidences (`torch.FloatTensor` of shape `(batch,)`): geometric mean of an answer's token probabilities.
        predicted_lengths (`torch.FloatTensor` of shape `(batch,)`, one_step and refine): median of the predicted
            length, in tokens.
        length_sigmas (`torch.FloatTensor` of shape `(batch,)`, one_step and refine):
            Standard deviation of the length in tokens, to first order: `predicted_length` times that of the log length.
        uncertainties (`torch.FloatTensor` of shape `(batch,)`, one_step and refine):
            `config.uncertainty_score` of each answer; where it is calibrated, the expected share of wrong tokens.
        uncertainty_scores (`dict[str, torch.FloatTensor]`, one_step and refine):
            All of `UNCERTAINTY_SCORES`, each `(batch,)`, as they are; with `output_uncertainty_scores`.
        abstained (`torch.BoolTensor` of shape `(batch,)`, one_step and refine, with `abstain_above`): answers that are
            not given; their sequences are padding and their lengths 0.
        accepted_lengths (`torch.FloatTensor` of shape `(batch,)`, adaptive and verified): drafted tokens that were
            kept, on average a draft.
        num_drafts (`torch.LongTensor` of shape `(batch,)`, adaptive and verified): drafts for each answer.
        num_passes (`int`, adaptive and verified): passes of the decoder, the prompt's included; greedy decoding takes
            one a token.
    """

    sequences: torch.LongTensor | None = None
    lengths: torch.LongTensor | None = None
    token_confidences: torch.FloatTensor | None = None
    confidences: torch.FloatTensor | None = None
    predicted_lengths: torch.FloatTensor | None = None
    length_sigmas: torch.FloatTensor | None = None
    uncertainties: torch.FloatTensor | None = None
    uncertainty_scores: dict[str, torch.FloatTensor] | None = None
    abstained: torch.BoolTensor | None = None
    accepted_lengths: torch.FloatTensor | None = None
    num_drafts: torch.LongTensor | None = None
    num_passes: int | None = None


def interpolate(x: torch.Tensor, points: list[list[float]]) -> torch.Tensor:
    """The piecewise linear function through `points` `[[x, y], ...]` with growing x, constant outside; any shape."""
    at, value = torch.tensor(points, device=x.device, dtype=x.dtype).T.contiguous()
    if len(at) == 1:
        return value.expand_as(x)
    right = torch.searchsorted(at, x.contiguous()).clamp(1, len(at) - 1)
    share = ((x - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return value[right - 1] + share * (value[right] - value[right - 1])


def check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}.")


class ProtoGenGenerationMixin(GenerationMixin):
    """Replaces `GenerationMixin.generate`."""

    def use_cuda_graphs(self, answer_lengths: list[int] | None = None, input_multiple: int = 32) -> None:
        """
        From now on `one_step` and `refine` write by CUDA graphs, which are recorded the first time that a shape comes:
        a batch of instructions and prompts, padded to a multiple of `input_multiple` tokens, with answers of one of
        these lengths, and cut. Call it when the model is on its GPU to stay; each graph takes memory.

        Args:
            answer_lengths (`list[int]`, *optional*): in tokens; by default powers of two from 16, and
                `config.max_answer_length`.

        Raises:
            ValueError: where answers cannot be cut (`arrangement="halves"`), or the model is on no GPU.
        """
        if self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need the model on a CUDA device; it is on {self.device}.")
        longest = self.config.max_answer_length
        powers = [2**n for n in range(4, longest.bit_length()) if 2**n < longest]
        self.graphs = OneStepGraphs(self, sorted({*(answer_lengths or powers), longest}), input_multiple)

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
        temperature: float = 0.0,
        top_p: float = 1.0,
        return_dict_in_generate: bool = False,
        **options,
    ) -> torch.LongTensor | ProtoGenGenerateOutput:
        """
        Writes one answer for each instruction, cut at EOS. Modes:

        - `one_step`: the whole answer in a single pass of the decoder.
        - `refine`: then the decoder reads it, and predicts anew what is less sure than a threshold.
        - `adaptive`: block after block, each as far as it is sure.
        - `verified`: block after block, each as far as the decoder would have written it itself, token by token. The
          answer is the decoder's greedy one; with a temperature it has the decoder's distribution. In bfloat16 two
          tokens of nearly equal probability may change places, as passes of different lengths round differently.

        Args:
            input_ids, attention_mask, decoder_prompt_ids, decoder_prompt_mask, category_ids:
                As in [`ProtoGenForConditionalGeneration.forward`]; the processor makes them. All that reads drafts with
                the decoder needs the prompt: every mode but `one_step`, and candidates.
            mode (`str`): one of `MODES`.
            temperature (`float`): 0 takes the likeliest token everywhere; above, tokens are drawn. In one step they are
                drawn independently of one another.
            top_p (`float`): draws among the likeliest tokens only, which together have this probability.
            return_dict_in_generate (`bool`): whether to return lengths, confidences and all else as well.
            length (`int` or `torch.LongTensor` of shape `(batch,)`, one_step and refine):
                Tokens to write, instead of the predicted length.
            num_length_sigmas (`float`, one_step and refine): writes `exp(mean + num_length_sigmas * sigma)` tokens of
                the predicted log-normal length; EOS still cuts.
            proto_tokens (one_step and refine): `e` and `m`, shaped as the model's output has them, to write from
                instead of the predicted ones: retrieved from a bank, or fitted.
            abstain_above (`float`, one_step and refine): gives no answer that is more uncertain than this, as of
                `uncertainties`; `config.abstention_thresholds` has what held-out instructions asked for.
            output_uncertainty_scores (`bool`, one_step and refine): whether to return every score, not the configured
                one alone.
            num_candidates (`int`, one_step): writes so many answers in one pass and returns the one that the decoder,
                reading them all in a second pass, finds likeliest a token: one as predicted, the others of lengths at
                quantiles of the predicted distribution and
            candidate_noise (`float`, one_step): with Gaussian noise on `e` and `m`, its standard deviation in units of
                `config.proto_token_std`; 0.5 by default.
            num_refinements (`int`, refine): passes over the draft; 1 by default.
            confidence_threshold (`float`, refine and adaptive): probability from which on a token is sure; 0.9 by
                default.
            max_new_tokens (`int`, adaptive and verified): tokens at most; `config.max_answer_length` by default.
            block_size (`int`, adaptive and verified): tokens of a draft at most; by default as many as there are
                proto-tokens for. Drafts are shorter where long ones do not pay.
            stop_strings (`list[str]`, adaptive and verified): an answer ends with the token that completes one of them.
            processor (`ProtoGenProcessor`, adaptive and verified): needed by `stop_strings`; and where it has
                `encoder_reads_answer`, the encoder reads the answer so far before each draft.
            streamer (`BaseStreamer`, adaptive and verified): gets the prompt, then the tokens as they are written; for
                one instruction at a time.

        Returns:
            `torch.LongTensor` of shape `(batch, length)`, or [`ProtoGenGenerateOutput`].

        Raises:
            ValueError: if an option is not of this mode or has an impossible value, or a mode has no prompt that needs
                one.
        """
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}.")
        foreign = sorted(options.keys() - MODES[mode])
        if foreign:
            raise ValueError(
                f"{', '.join(foreign)} is not for mode={mode}, which takes {', '.join(sorted(MODES[mode]))}."
            )
        needs_prompt = mode != "one_step" or options.get("num_candidates", 1) > 1
        self._check_prompt(decoder_prompt_ids, needs_prompt)
        write = self._write_blocks if "block_size" in MODES[mode] else self._write_at_once
        return write(
            (input_ids, attention_mask),
            (decoder_prompt_ids, decoder_prompt_mask),
            category_ids,
            mode,
            Sampling(temperature, top_p),
            return_dict_in_generate,
            **options,
        )

    def _write_at_once(
        self,
        instruction,
        prompt,
        category_ids,
        mode,
        sampling,
        returns_all,
        length=None,
        num_length_sigmas=0.0,
        proto_tokens=None,
        abstain_above=None,
        output_uncertainty_scores=False,
        num_candidates=1,
        candidate_noise=0.5,
        num_refinements=1,
        confidence_threshold=0.9,
    ):
        config = self.config
        check_at_least_one(num_candidates=num_candidates, num_refinements=num_refinements)
        # A recorded pass starts from its own prediction.
        is_recorded = self.graphs is not None and proto_tokens is None and num_candidates == 1
        passes = self.graphs if is_recorded else self
        prediction = passes.predict(*instruction, *prompt, category_ids)
        if proto_tokens is not None:
            prediction = replace(prediction, e=proto_tokens[0], m=proto_tokens[1])
        quantiles = 0.0
        if num_candidates > 1:
            prediction, quantiles = candidates(prediction, num_candidates, candidate_noise * config.proto_token_std)
            prompt = tuple(part.repeat_interleave(num_candidates, dim=0) for part in prompt)
        mean, sigma = prediction.log_length_mean, prediction.log_length_variance.sqrt()
        error, log_duration_confidence = prediction.error_mean, prediction.log_duration_confidence
        if length is None:
            lengths = self.clamp_lengths((mean + (num_length_sigmas + quantiles) * sigma).exp())
        else:
            lengths = torch.as_tensor(length, device=mean.device)
            if lengths.min() < 1 or lengths.max() > config.max_answer_length:
                raise ValueError(
                    f"length must lie in 1..{config.max_answer_length} tokens (config.max_answer_length); got {length}."
                )
            lengths = lengths.expand(len(mean) // num_candidates).repeat_interleave(num_candidates)
        first = None if prediction.next_logits is None else sampling.pick(prediction.next_logits)
        logits = passes.decode(prediction, lengths, *prompt, first_tokens=first)
        tokens = sampling.pick(logits)
        if first is not None:  # What the others follow is not drawn again.
            tokens[lengths.cumsum(0) - lengths] = first
        if mode == "refine":
            logits, tokens = refine(
                self.decoder, prompt, logits, tokens, lengths, num_refinements, confidence_threshold, sampling
            )
        sequences = as_rows(tokens, lengths, config.answer_pad_token_id)
        written, lengths = lengths, cut_at_eos(sequences, lengths, config.eos_token_ids)
        if num_candidates > 1:
            best = likeliest_candidates(self.decoder, prompt, sequences, lengths, num_candidates)
            is_best = torch.isin(torch.arange(len(written), device=best.device).repeat_interleave(written), best)
            logits, tokens = logits[is_best], tokens[is_best]
            mean, sigma, error, log_duration_confidence, written, lengths, sequences = (
                part[best] for part in (mean, sigma, error, log_duration_confidence, written, lengths, sequences)
            )
        kept = token_mask(lengths)
        sequences = sequences[:, : kept.shape[1]].masked_fill(~kept, config.answer_pad_token_id)
        if not returns_all and abstain_above is None:
            return sequences

        def by_answer(values):
            return as_rows(values, written, 0.0)[:, : kept.shape[1]] * kept

        log_confidence = by_answer(log_probability(logits, tokens))
        confidences = (log_confidence.sum(-1) / lengths).exp()
        compute_score = {
            "confidence": lambda: 1 - confidences,
            "least_confidence": lambda: 1 - log_confidence.min(-1).values.exp(),
            "sequence": lambda: 1 - (log_confidence.sum(-1) + log_duration_confidence).exp(),
            "entropy": lambda: by_answer(token_entropy(logits)).sum(-1) / lengths,
            "length_sigma": lambda: sigma,
            "predicted_error": lambda: error,
        }
        names = UNCERTAINTY_SCORES if output_uncertainty_scores else (config.uncertainty_score,)
        scores = {name: compute_score[name]() for name in names}
        uncertainties = scores[config.uncertainty_score]
        if config.uncertainty_points is not None:
            uncertainties = interpolate(uncertainties, config.uncertainty_points)
        abstained = None
        if abstain_above is not None:
            abstained = uncertainties > abstain_above
            sequences = sequences.masked_fill(abstained[:, None], config.answer_pad_token_id)
            lengths = lengths.masked_fill(abstained, 0)
        output = ProtoGenGenerateOutput(
            sequences=sequences,
            lengths=lengths,
            token_confidences=log_confidence.exp() * kept,
            confidences=confidences,
            predicted_lengths=mean.exp(),
            length_sigmas=mean.exp() * sigma,
            uncertainties=uncertainties,
            uncertainty_scores=scores if output_uncertainty_scores else None,
            abstained=abstained,
        )
        return output if returns_all else sequences

    def _write_blocks(
        self,
        instruction,
        prompt,
        category_ids,
        mode,
        sampling,
        returns_all,
        max_new_tokens=None,
        block_size=None,
        stop_strings=(),
        processor=None,
        streamer=None,
        confidence_threshold=0.9,
    ):
        config = self.config
        # Own tokens that a draft stands after: the last one written.
        num_before = int(config.reads_decoder_states)
        longest_block = config.chunk_size * config.max_chunks - num_before
        block_size = longest_block if block_size is None else block_size
        if not 1 <= block_size <= longest_block:
            raise ValueError(f"block_size must lie in 1..{longest_block} tokens; got {block_size}.")
        max_new_tokens = config.max_answer_length if max_new_tokens is None else max_new_tokens
        check_at_least_one(max_new_tokens=max_new_tokens)
        if stop_strings and processor is None:
            raise ValueError("stop_strings need the tokenizer: give processor=processor.")
        if streamer is not None:
            streamer.put(prompt[0])
        is_stopped = stops_at(config.eos_token_ids, stop_strings, processor and processor.decoder_tokenizer)
        answers = Answers(len(prompt[0]), max_new_tokens, is_stopped, streamer)
        given = Instruction(*self.encode(*instruction), category_ids)

        def source():
            if self.encoder is None or processor is None or not processor.encoder_reads_answer:
                return given
            written = [tokens[: len(tokens) - num_before] for tokens in answers.tokens]
            return Instruction(*self.encode(*processor.add_answers(*instruction, written)), category_ids)

        text = DecoderState(self.decoder, *prompt, config.layers_read)
        if mode == "adaptive":
            adaptive_decoding(self, answers, source, text, block_size, confidence_threshold, sampling)
        else:
            verified_decoding(self, answers, source, text, block_size, sampling)
        if streamer is not None:
            streamer.end()
        sequences, log_confidence, lengths = answers.tables(config.answer_pad_token_id, text.mask.device)
        if not returns_all:
            return sequences
        num_drafts = torch.tensor(answers.num_drafts, device=lengths.device)
        return ProtoGenGenerateOutput(
            sequences=sequences,
            lengths=lengths,
            token_confidences=log_confidence.exp() * token_mask(lengths),
            confidences=(log_confidence.sum(-1) / lengths).exp(),
            accepted_lengths=torch.tensor(answers.num_kept, device=lengths.device) / num_drafts.clamp_min(1),
            num_drafts=num_drafts,
            num_passes=text.num_passes,
        )
