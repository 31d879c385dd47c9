"""Decoding: `generate` in all its modes, and what it returns."""

import copy
import difflib
import math
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .adaptive_decoding import adaptive_decoding
from .block_decoding import Drafter, GenerationBuffer, stops_at
from .configuration_protogen import UNCERTAINTY_SCORES
from .cuda_graphs import OneStepGraphs
from .draft_length import PassCosts, measured_costs
from .one_step_decoding import (
    Draft,
    as_rows,
    best_candidates,
    candidates,
    cut_at_eos,
    cut_where,
    refine,
    token_mask,
)
from .proto_predictor import ProtoTokenPrediction
from .sampling import Sampling, log_probability, token_entropy
from .verified_decoding import verified_decoding

# The options of all modes, which mean what they mean in transformers, and those of each.
COMMON_OPTIONS = {"max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences"}
COMMON_OPTIONS |= {"stop_strings", "return_dict_in_generate", "mode"}
AT_ONCE_OPTIONS = {"length", "num_length_sigmas", "abstain_above", "output_uncertainty_scores"}


class Mode(NamedTuple):
    """
    A way to write answers.

    Args:
        options (`set[str]`): that it takes beside those of all modes.
        write_blocks (`Callable`, *optional*): writes block after block, as [`verified_decoding`]; whole answers are
            written by default.
    """

    options: set[str]
    write_blocks: Callable | None = None

    @property
    def is_at_once(self) -> bool:
        return self.write_blocks is None


MODES = {
    "one_step": Mode(AT_ONCE_OPTIONS | {"num_candidates", "candidate_noise"}),
    "refine": Mode(AT_ONCE_OPTIONS | {"num_refinements", "confidence_threshold"}),
    "adaptive": Mode({"block_size", "confidence_threshold", "position_cost", "slots_cost"}, adaptive_decoding),
    "verified": Mode({"block_size", "position_cost", "slots_cost"}, verified_decoding),
}
# What a generation config holds that does not change an answer here: the decoder's configuration has the tokens.
IGNORED_OPTIONS = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version"}
IGNORED_OPTIONS |= {"use_cache", "_from_model_config"}
# Tokens at most of answers by a model that drafts, where nothing else is said.
LONGEST_VERIFIED = 256
# Options that are whole numbers from 1 on, and numbers, where they are given.
COUNTS = ("max_new_tokens", "max_length", "num_return_sequences", "num_candidates", "num_refinements", "block_size")
NUMBERS = ("num_length_sigmas", "abstain_above", "candidate_noise", "confidence_threshold", "temperature", "top_p")
NUMBERS += ("position_cost", "slots_cost")
# What transformers draws with where nothing is said.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
# What to use instead of options that are refused.
INSTEAD = {
    "output_scores": "token_confidences has probabilities, and answer_logits of a call of the model logits",
    "output_logits": "they are in answer_logits of a call of the model",
    "num_beams": "mode=one_step has num_candidates",
}
WHOLE_NUMBERS = (*COUNTS, "top_k")
# Least and most, beside those of `Sampling`.
RANGES = {"candidate_noise": (0, math.inf), "confidence_threshold": (0, 1)}
RANGES |= {"position_cost": (0, math.inf), "slots_cost": (0, math.inf)}


class ProtoGenGenerationConfig(GenerationConfig):
    """
    How [`ProtoGenForConditionalGeneration.generate`] writes; a saved model's `generation_config.json`.

    Args:
        mode (`str`, defaults to `"one_step"`): one of `MODES`.
        length (`int` or `torch.LongTensor` of shape `(batch,)`, *optional*, one_step and refine):
            Tokens to write, instead of the predicted length; not more than `max_new_tokens`.
        num_length_sigmas (`float`, defaults to 0.0, one_step and refine): writes `exp(mean + num_length_sigmas *
            sigma)` tokens of the predicted log-normal length; EOS still cuts.
        abstain_above (`float`, *optional*, one_step and refine): gives no answer whose `uncertainties` exceed this;
            `config.abstention_thresholds` has calibrated thresholds.
        output_uncertainty_scores (`bool`, defaults to False, one_step and refine): returns every score, not the
            configured one alone.
        num_candidates (`int`, defaults to 1, one_step): writes this many answers in one pass and returns the one that
            has the highest mean log-probability when the decoder reads them all in a second pass. One is as predicted;
            the others have noise, and lengths at quantiles of the predicted distribution.
        candidate_noise (`float`, defaults to 0.5, one_step): standard deviation of the Gaussian noise on candidates'
            `e` and `m`, in units of `config.proto_token_std`.
        num_refinements (`int`, defaults to 1, refine): passes over the draft.
        confidence_threshold (`float`, defaults to 0.9, refine and adaptive): least probability of a token, in
            [0, 1], to count as confident.
        block_size (`int`, *optional*, adaptive and verified): tokens of a draft at most; by default as many as there
            are proto-tokens for. Drafts are shorter where long ones do not pay, or positions end.
        position_cost (`float`, defaults to 0.027, adaptive and verified): time of each more position in a pass, in
            passes over one position. What pays follows from it. The default is that of 135M parameters in bfloat16 on
            two cores; `model.measure_pass_costs()` sets yours.
        slots_cost (`float`, defaults to 0.1, adaptive and verified): time that slots take beyond their positions, in
            the same unit.
        max_new_tokens (`int`, *optional*): tokens of an answer at most; `max_length` by default.
        max_length (`int`, *optional*): the same, as a prompt is no part of an answer; `config.max_answer_length` by
            default.
        do_sample (`bool`, *optional*): draws tokens, in one step independently of one another. The most likely ones
            are taken by default.
        temperature (`float`, *optional*): that tokens are drawn with; 1.0 by default.
        top_k (`int`, *optional*): draws among this many of the most likely tokens only; 50 by default, 0 for all.
        top_p (`float`, *optional*): draws among the most likely tokens only, which together have this probability; 1.0
            by default.
        num_return_sequences (`int`, *optional*): answers to each instruction, next to each other; with `do_sample`.
        stop_strings (`str` or `list[str]`, *optional*): an answer ends with the token that completes one of them;
            `generate` needs the `processor`.
        return_dict_in_generate (`bool`, *optional*): returns lengths, confidences and all else as well.
        **kwargs: other fields of [`GenerationConfig`], which `generate` refuses.
    """

    def __init__(
        self,
        mode: str = "one_step",
        length: int | torch.LongTensor | None = None,
        num_length_sigmas: float = 0.0,
        abstain_above: float | None = None,
        output_uncertainty_scores: bool = False,
        num_candidates: int = 1,
        candidate_noise: float = 0.5,
        num_refinements: int = 1,
        confidence_threshold: float = 0.9,
        block_size: int | None = None,
        position_cost: float = 0.027,
        slots_cost: float = 0.1,
        **kwargs,
    ):
        self.mode = mode
        self.length = length
        self.num_length_sigmas = num_length_sigmas
        self.abstain_above = abstain_above
        self.output_uncertainty_scores = output_uncertainty_scores
        self.num_candidates = num_candidates
        self.candidate_noise = candidate_noise
        self.num_refinements = num_refinements
        self.confidence_threshold = confidence_threshold
        self.block_size = block_size
        self.position_cost = position_cost
        self.slots_cost = slots_cost
        super().__init__(**kwargs)

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> "ProtoGenGenerationConfig":
        """The defaults; a model that drafts writes with `verified`, and not as many tokens as a draft has."""
        first_tokens = model_config.get("first_tokens") if isinstance(model_config, dict) else model_config.first_tokens
        return cls(mode="verified", max_new_tokens=LONGEST_VERIFIED) if first_tokens == "drafts" else cls()

    def merged(self, **kwargs) -> "ProtoGenGenerationConfig":
        """
        A copy with these options instead.

        Raises:
            ValueError: if one of them, or of this configuration, is unknown, not of the mode, or impossible.
        """
        options = copy.deepcopy(self)
        mode = kwargs.get("mode", self.mode)
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is not one of {', '.join(MODES)}.")
        known = COMMON_OPTIONS | MODES[mode].options
        everywhere = COMMON_OPTIONS.union(IGNORED_OPTIONS, *(each.options for each in MODES.values()))
        # Files hold fields of no effect as well.
        asked = {name for name, value in self.to_diff_dict().items() if value is not None and value is not False}
        foreign = sorted(kwargs.keys() - known) or sorted(asked - everywhere)
        if foreign:
            raise ValueError(not_taken(mode, foreign, known))
        # At transformers' defaults they change nothing.
        drawn = [name for name, neutral in SAMPLING.items() if kwargs.get(name) not in (None, neutral)]
        if drawn and not kwargs.get("do_sample", self.do_sample):
            raise ValueError(f"do_sample=True is needed with {' and '.join(drawn)}, by which tokens are drawn.")
        given = {name: kwargs.get(name, getattr(self, name)) for name in (*WHOLE_NUMBERS, *NUMBERS)}
        check_numbers({name: value for name, value in given.items() if value is not None})
        options.update(**kwargs)
        if isinstance(options.stop_strings, str):
            options.stop_strings = [options.stop_strings]
        return options

    @property
    def sampling(self) -> Sampling:
        if not self.do_sample:
            return Sampling()
        given = {name: getattr(self, name) for name in SAMPLING}
        return Sampling(**{name: type(d)(d if given[name] is None else given[name]) for name, d in SAMPLING.items()})

    @property
    def pass_costs(self) -> PassCosts:
        return PassCosts(self.position_cost, self.slots_cost)

    def longest(self, default: int) -> int:
        """
        Tokens of an answer at most.

        Args:
            default (`int`): where no option says.
        """
        limits = self.max_new_tokens, self.max_length, default
        return next(limit for limit in limits if limit is not None)


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


def check_numbers(options: dict[str, int | float]) -> None:
    """A ValueError names what is none of `WHOLE_NUMBERS` or `NUMBERS`."""
    for name, value in options.items():
        is_whole = name in WHOLE_NUMBERS
        is_number = isinstance(value, Integral if is_whole else Real) and not isinstance(value, bool)
        if not is_number or value != value:
            raise ValueError(f"{name} must be a {'whole ' if is_whole else ''}number; got {value!r}.")
        if name in COUNTS and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}.")
        least, most = RANGES.get(name, (-math.inf, math.inf))
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in {least}..{most}; got {value}.")


def not_taken(mode: str, names: list[str], known: Set[str]) -> str:
    """What to say of options that a mode does not take."""
    near = [name for given in names for name in difflib.get_close_matches(given, known, n=1, cutoff=0.8)]
    meant = f" (did you mean {' and '.join(near)}?)" if near else ""
    instead = "".join(f"; {INSTEAD[name]}" for name in names if name in INSTEAD)
    return f"{', '.join(names)}{meant} is not for mode={mode}, which takes {', '.join(sorted(known))}{instead}."


def check_ids(**ids: torch.LongTensor | None) -> None:
    """A ValueError names ids that are no batch of texts."""
    for name, given in ids.items():
        if given is None:
            continue
        if not isinstance(given, torch.Tensor):
            raise ValueError(
                f"{name} must be a tensor; got {type(given).__name__}. The processor makes them: "
                "model.generate(**processor(text))."
            )
        if given.dim() != 2 or not given.numel():
            raise ValueError(
                f"{name} must have the shape (batch, length), with a text at least; got {tuple(given.shape)}. "
                "The processor makes them."
            )


class ProtoGenGenerationMixin(GenerationMixin):
    """Replaces `GenerationMixin.generate`."""

    generation_config_class = ProtoGenGenerationConfig

    def use_cuda_graphs(self, answer_lengths: list[int] | None = None, input_multiple: int = 32) -> None:
        """
        From now on `one_step` and `refine` write by CUDA graphs, which are recorded the first time that a shape comes:
        a batch of instructions and prompts, padded to a multiple of `input_multiple` tokens, with answers of one of
        these lengths, and cut. Call it when the model is on its GPU to stay; each graph takes memory.

        Args:
            answer_lengths (`list[int]`, *optional*): in tokens; by default powers of two from 16, and
                `config.max_answer_length`.
            input_multiple (`int`, defaults to 32): in tokens.

        Raises:
            ValueError: where answers cannot be cut (`arrangement="halves"`), or the model is on no GPU.
        """
        if self.device.type != "cuda":
            raise ValueError(f"CUDA graphs need the model on a CUDA device; it is on {self.device}.")
        longest = self.config.max_answer_length
        powers = [2**n for n in range(4, longest.bit_length()) if 2**n < longest]
        self.graphs = OneStepGraphs(self, sorted({*(answer_lengths or powers), longest}), input_multiple)

    def measure_pass_costs(self) -> None:
        """
        Times some passes of the decoder where it is, which takes seconds, and sets `position_cost` and `slots_cost` of
        the generation configuration: how long drafts of `adaptive` and `verified` are depends on them.
        """
        costs = measured_costs(self.decoder)
        self.generation_config.position_cost, self.generation_config.slots_cost = costs

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_prompt_ids: torch.LongTensor | None = None,
        decoder_prompt_mask: torch.Tensor | None = None,
        category_ids: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        encoder_places: torch.LongTensor | None = None,
        proto_tokens: tuple[torch.Tensor, torch.Tensor] | None = None,
        processor=None,
        streamer: BaseStreamer | None = None,
        **kwargs,
    ) -> torch.LongTensor | ProtoGenGenerateOutput:
        """
        Writes one answer for each instruction, cut at EOS. Modes:

        - `one_step`: the whole answer in a single pass of the decoder.
        - `refine`: then the decoder reads it, and predicts again what is less sure than a threshold.
        - `adaptive`: block after block, each as far as it is sure.
        - `verified`: block after block, each as far as the decoder would have written it itself, token by token. The
          answer is the decoder's greedy one; with `do_sample` it has the decoder's distribution. In bfloat16 two tokens
          of nearly equal probability may change places, as passes of different lengths round differently.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, source)`, *optional*): instructions in the encoder's
                vocabulary. The processor makes these and the next ones, which are those of `forward`.
            attention_mask (`torch.Tensor` of shape `(batch, source)`, *optional*)
            decoder_prompt_ids (`torch.LongTensor` of shape `(batch, prompt)`, *optional*): prompts in the decoder's
                vocabulary. All that reads drafts with the decoder needs them: every mode but `one_step`, and
                candidates.
            decoder_prompt_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*)
            category_ids (`torch.LongTensor` of shape `(batch,)`, *optional*)
            encoder_places (`torch.LongTensor` of shape `(batch, prompt)`, *optional*)
            generation_config (`GenerationConfig`, *optional*): the model's own `generation_config` by default.
            proto_tokens (`tuple[torch.Tensor, torch.Tensor]`, *optional*, one_step and refine): `e` of shape `(batch,
                chunks, num_e_tokens, decoder_dim)` and `m` `(batch, chunks, decoder_dim)` to write from instead of the
                predicted ones: retrieved from a bank, or fitted.
            processor (`ProtoGenProcessor`, *optional*): required with `stop_strings`.
            streamer (`BaseStreamer`, *optional*): gets the prompt, then the tokens as they are written; for one
                instruction at a time.
            **kwargs: fields of [`ProtoGenGenerationConfig`], where all options are described: `mode`, `length`,
                `num_length_sigmas`, `abstain_above`, `output_uncertainty_scores`, `num_candidates`, `candidate_noise`,
                `num_refinements`, `confidence_threshold`, `block_size`, `position_cost`, `slots_cost`,
                `max_new_tokens`, `max_length`, `do_sample`, `temperature`, `top_k`, `top_p`,
                `num_return_sequences`, `stop_strings`, `return_dict_in_generate`. They win over the configuration.

        Returns:
            `torch.LongTensor` of shape `(batch, length)`, or [`ProtoGenGenerateOutput`].

        Raises:
            ValueError: if an option is not of this mode or has an impossible value, a mode has no prompt that needs
                one, or what the model predicts is not finite, as with damaged weights.
        """
        base = self.generation_config if generation_config is None else generation_config
        if not isinstance(base, ProtoGenGenerationConfig):
            base = ProtoGenGenerationConfig.from_dict(base.to_diff_dict())
        options = base.merged(**kwargs)
        at_once = MODES[options.mode].is_at_once
        if self.config.aligns_encoder and not at_once and options.block_size != 1:
            raise ValueError(
                f"mode={options.mode} writes block after block, and this model (upsamples_prompt with "
                "latent_source=encoder) spreads the prompt over whole answers: use one_step or refine, or block_size=1 "
                "for one token a block."
            )
        check_ids(input_ids=input_ids, decoder_prompt_ids=decoder_prompt_ids)
        self._check_prompt(decoder_prompt_ids, options.mode != "one_step" or options.num_candidates > 1)
        if decoder_prompt_ids is not None and decoder_prompt_mask is None:
            decoder_prompt_mask = torch.ones_like(decoder_prompt_ids)
        if proto_tokens is not None and not at_once:
            raise ValueError(
                f"proto_tokens are not for mode={options.mode}, which drafts from those that the model predicts: use "
                "one_step or refine."
            )
        if options.stop_strings and processor is None:
            raise ValueError("stop_strings need the tokenizer: give processor=processor.")
        number = options.num_return_sequences or 1

        def repeated(*parts):
            return tuple(part if part is None else part.repeat_interleave(number, dim=0) for part in parts)

        instruction, prompt = repeated(input_ids, attention_mask), repeated(decoder_prompt_ids, decoder_prompt_mask)
        category_ids, encoder_places = repeated(category_ids, encoder_places)
        if streamer is not None:
            streamer.put((instruction if prompt[0] is None else prompt)[0].cpu())
        if at_once:
            given = instruction, prompt, (category_ids, encoder_places)
            return self._write_at_once(*given, options, proto_tokens, processor, streamer)
        return self._write_blocks(instruction, prompt, category_ids, options, processor, streamer)

    def _write_at_once(self, instruction, prompt, others, options, proto_tokens, processor, streamer):
        config, sampling, num_candidates = self.config, options.sampling, options.num_candidates
        # A recorded pass starts from its own prediction.
        is_recorded = self.graphs is not None and proto_tokens is None and num_candidates == 1
        passes = self.graphs if is_recorded else self
        prediction = passes.predict(*instruction, *prompt, *others)
        if proto_tokens is not None:
            prediction = replace(prediction, e=proto_tokens[0], m=proto_tokens[1])
        quantiles = 0.0
        if num_candidates > 1:
            noise = options.candidate_noise * config.proto_token_std
            prediction, quantiles = candidates(prediction, num_candidates, noise)
            prompt = tuple(part.repeat_interleave(num_candidates, dim=0) for part in prompt)
        lengths = self._lengths(prediction, quantiles, options, prompt[1])
        first = None if prediction.next_logits is None else sampling.pick(prediction.next_logits)
        logits = passes.decode(prediction, lengths, *prompt, first_tokens=first)
        tokens = sampling.pick(logits)
        if first is not None:  # What the others follow is not drawn again.
            tokens[lengths.cumsum(0) - lengths] = first
        if options.mode == "refine":
            settings = options.num_refinements, options.confidence_threshold, sampling
            logits, tokens = refine(self.decoder, prompt, logits, tokens, lengths, *settings)
        draft = Draft(prediction, lengths, logits, tokens)
        if num_candidates > 1:
            sequences = as_rows(tokens, lengths, config.answer_pad_token_id)
            ends = cut_at_eos(sequences, lengths, config.eos_token_ids)
            draft = draft.of_rows(best_candidates(self.decoder, prompt, sequences, ends, num_candidates))
        return self._finished(draft, options, processor, streamer)

    def _lengths(
        self,
        prediction: ProtoTokenPrediction,
        quantiles: torch.Tensor | float,
        options,
        decoder_prompt_mask: torch.Tensor | None,
    ) -> torch.LongTensor:
        """Tokens to write of each answer, `(batch,)`; `quantiles` from [`candidates`]."""
        mean, sigma = prediction.log_length_mean, prediction.log_length_variance.sqrt()
        longest = min(options.longest(self.config.max_answer_length), self.config.max_answer_length)
        if options.length is None:
            lengths = self.clamp_lengths((mean + (options.num_length_sigmas + quantiles) * sigma).exp())
            lengths = lengths.clamp_max(longest)
            if decoder_prompt_mask is None:
                return lengths
            known = int(self.config.uses_decoder_states)
            return lengths.minimum(self.longest_answers(decoder_prompt_mask.sum(1) + known)).clamp_min(1)
        lengths = torch.as_tensor(options.length, device=mean.device)
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"length must be a whole number of tokens; got {options.length}.")
        if lengths.min() < 1 or lengths.max() > self.config.max_answer_length:
            raise ValueError(
                f"length must lie in 1..{self.config.max_answer_length} tokens (config.max_answer_length); "
                f"got {options.length}."
            )
        repeats = options.num_candidates * (options.num_return_sequences or 1)
        return lengths.clamp_max(longest).expand(len(mean) // repeats).repeat_interleave(repeats)

    def _finished(self, draft: Draft, options, processor, streamer) -> torch.LongTensor | ProtoGenGenerateOutput:
        """The answers of a draft, cut where they end, with their uncertainty where it is wanted."""
        config = self.config
        sequences = as_rows(draft.tokens, draft.lengths, config.answer_pad_token_id)
        lengths = cut_at_eos(sequences, draft.lengths, config.eos_token_ids)
        if options.stop_strings:
            is_stopped = stops_at(config.eos_token_ids, options.stop_strings, processor.decoder_tokenizer)
            lengths = cut_where(is_stopped, sequences, lengths)
        kept = token_mask(lengths)
        sequences = sequences[:, : kept.shape[1]].masked_fill(~kept, config.answer_pad_token_id)
        if options.return_dict_in_generate or options.abstain_above is not None:
            output = self._with_uncertainty(draft, options, sequences, lengths, kept)
            sequences, lengths = output.sequences, output.lengths
        if streamer is not None:
            streamer.put(sequences[0, : lengths[0]].cpu())
            streamer.end()
        return output if options.return_dict_in_generate else sequences

    def _with_uncertainty(self, draft, options, sequences, lengths, kept) -> ProtoGenGenerateOutput:
        config, prediction = self.config, draft.prediction

        def by_answer(values):
            return as_rows(values, draft.lengths, 0.0)[:, : kept.shape[1]] * kept

        log_confidence = by_answer(log_probability(draft.logits, draft.tokens))
        confidences = (log_confidence.sum(-1) / lengths).exp()
        mean, sigma = prediction.log_length_mean, prediction.log_length_variance.sqrt()
        compute_score = {
            "confidence": lambda: 1 - confidences,
            "least_confidence": lambda: 1 - log_confidence.min(-1).values.exp(),
            "sequence": lambda: 1 - (log_confidence.sum(-1) + prediction.log_duration_confidence).exp(),
            "entropy": lambda: by_answer(token_entropy(draft.logits)).sum(-1) / lengths,
            "length_sigma": lambda: sigma,
            "predicted_error": lambda: prediction.error_mean,
        }
        names = UNCERTAINTY_SCORES if options.output_uncertainty_scores else (config.uncertainty_score,)
        scores = {name: compute_score[name]() for name in names}
        uncertainties = scores[config.uncertainty_score]
        if config.uncertainty_points is not None:
            uncertainties = interpolate(uncertainties, config.uncertainty_points)
        abstained = None
        if options.abstain_above is not None:
            # Also where there is no telling: NaN.
            abstained = ~(uncertainties <= options.abstain_above)
            sequences = sequences.masked_fill(abstained[:, None], config.answer_pad_token_id)
            lengths = lengths.masked_fill(abstained, 0)
        return ProtoGenGenerateOutput(
            sequences=sequences,
            lengths=lengths,
            token_confidences=log_confidence.exp() * kept,
            confidences=confidences,
            predicted_lengths=mean.exp(),
            length_sigmas=mean.exp() * sigma,
            uncertainties=uncertainties,
            uncertainty_scores=scores if options.output_uncertainty_scores else None,
            abstained=abstained,
        )

    def _write_blocks(self, instruction, prompt, category_ids, options, processor, streamer):
        config = self.config
        longest_block = config.chunk_size * config.max_chunks
        block_size = longest_block if options.block_size is None else options.block_size
        if not 1 <= block_size <= longest_block:
            raise ValueError(f"block_size must lie in 1..{longest_block} tokens; got {block_size}.")
        tokenizer = processor and processor.decoder_tokenizer
        is_stopped = stops_at(config.eos_token_ids, options.stop_strings or (), tokenizer)
        answers = GenerationBuffer(len(prompt[0]), options.longest(config.max_answer_length), is_stopped, streamer)
        # Short passes are a twentieth faster in it than without gradients alone. What is returned is made outside.
        with torch.inference_mode():
            # Blocks of one token need no drafts.
            prediction = self.predict(*instruction, *prompt, category_ids) if block_size > 1 else None
            drafter = Drafter(self, prediction)
            num_passes = MODES[options.mode].write_blocks(self, answers, drafter, prompt, block_size, options)
        num_passes += prediction is not None and prediction.prompt_cache is not None
        if streamer is not None:
            streamer.end()
        sequences, log_confidence, lengths = answers.tables(config.answer_pad_token_id, self.device)
        if not options.return_dict_in_generate:
            return sequences
        num_drafts = torch.tensor(answers.num_drafts, device=lengths.device)
        return ProtoGenGenerateOutput(
            sequences=sequences,
            lengths=lengths,
            token_confidences=log_confidence.exp() * token_mask(lengths),
            confidences=(log_confidence.sum(-1) / lengths).exp(),
            accepted_lengths=torch.tensor(answers.num_kept, device=lengths.device) / num_drafts.clamp_min(1),
            num_drafts=num_drafts,
            num_passes=num_passes,
        )
