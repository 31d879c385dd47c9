"""From jobs to answers: what the model's thread and the reader's do."""

import copy
import ctypes
import math
import platform
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers.generation.streamers import BaseStreamer

from eval_tasks.commands.generate import measures_of
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.generation_protogen import (
    MODES,
    ProtoGenGenerateOutput,
    ProtoGenGenerationConfig,
)

from .batcher import Job
from .schemas import Common

# What OpenAI says of a token that has no probability; JSON has no infinity.
LEAST_LOG_PROBABILITY = -9999.0
# Between which freed memory is given back; it takes some hundredths of one.
SECONDS = 10


class PromptRefused(ValueError):
    """A prompt that the model cannot read."""


class ClientLeft(Exception):
    """Nobody waits for the answer that is being written."""


@dataclass
class Answer:
    """
    Args:
        text (`str`)
        tokens (`list[tuple[str, float]]`): text and log-probability of each, EOS left out.
        num_tokens (`int`): EOS included.
        finish_reason (`str`): `"length"` if a limit cut it, `"stop"` otherwise.
        measures (`dict`): what `generate` says of it besides.
    """

    text: str
    tokens: list[tuple[str, float]]
    num_tokens: int
    finish_reason: str
    measures: dict[str, float | str | bool]


def give_back_memory() -> None:
    """Passes of many shapes leave holes in the heap, which glibc keeps until it is asked."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def before_stop(text: str, stop_strings: list[str]) -> str:
    """A text up to the first stop string."""
    return text[: min((at for stop in stop_strings if (at := text.find(stop)) >= 0), default=None)]


def settled(text: str, stop_strings: list[str]) -> str:
    """What later tokens cannot change: no character that lacks bytes, and no beginning of a stop string at the end."""
    cut = before_stop(text, stop_strings)
    if cut != text:
        return cut
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    held = (n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - max(held, default=0)]


class JobStreamer(BaseStreamer):
    """Passes on a job's text as it grows; ends the pass when nobody waits for it."""

    def __init__(self, processor: ProtoGenProcessor, job: Job):
        self.processor, self.job = processor, job
        self.ids, self.has_prompt, self.num_sent = [], False, 0

    def put(self, value: torch.LongTensor) -> None:
        if self.job.answers.cancelled():
            raise ClientLeft
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.ids += value.tolist()
        text = settled(self.processor.decode(self.ids), self.job.config.stop_strings or [])
        if len(text) > self.num_sent:
            self.job.on_text(text[self.num_sent :])
            self.num_sent = len(text)

    def end(self) -> None:
        pass


class Writing:
    """
    A model and its processor, twice: tokenizers change while they are used, so each thread has its own.

    Args:
        model (`ProtoGenForConditionalGeneration`), processor (`ProtoGenProcessor`)
        max_pass_tokens (`int`): tokens of a pass at most.
    """

    def __init__(self, model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor, max_pass_tokens: int):
        self.model, self.processor, self.max_pass_tokens = model, processor, max_pass_tokens
        self.given_back = time.monotonic()
        # A loaded model has a plain one.
        self.config = ProtoGenGenerationConfig.from_dict(model.generation_config.to_diff_dict())
        # These clients expect the whole distribution where neither they nor the model cut it.
        self.config.top_k = self.config.top_k or 0
        self.readers_processor = copy.deepcopy(processor)

    def job(self, request: Common) -> Job:
        """
        What a request asks for. A pass is its own where what is drawn with a seed would depend on others, and where a
        text is passed on as it grows.

        Raises:
            ValueError: if an option is not of the mode, or the model does not have what is asked for.
        """
        options, instructions = request.options, request.instructions
        # What is not drawn is the same each time: it is written once.
        is_drawn = not self.config.merged(**options).sampling.is_greedy
        options["num_return_sequences"] = request.n if is_drawn else 1
        config = self.config.merged(**options)
        is_random = is_drawn or config.num_candidates > 1
        has_text = self.processor.answer_format == "text"
        if is_drawn and request.num_top:
            raise ValueError("the most likely tokens are known only where they are taken: set temperature to 0.")
        if config.stop_strings and not has_text:
            raise ValueError("stop is not for this model, whose answers are JSON made of what the decoder writes.")
        in_blocks = not MODES[config.mode].is_at_once
        is_one = request.n * len(instructions) == 1
        seed = request.seed if is_random else None
        grows = request.stream and in_blocks and is_one and has_text and not request.wants_logprobs
        alone = seed is not None or grows
        contexts = [request.protogen.context] * len(instructions)
        return Job(instructions, contexts, request.n, options, config, seed, alone, grows)

    def read(self, job: Job) -> None:
        """
        Sets a job's size.

        Raises:
            PromptRefused: if the model cannot read a prompt.
            ValueError: if no pass has room for the job.
        """
        try:
            inputs = self.readers_processor(job.instructions, job.contexts)
        except (ValueError, TemplateError) as error:
            raise PromptRefused(str(error)) from error
        source = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        job.prompt_tokens = inputs["decoder_prompt_mask"].sum().item()
        job.rows = len(job.instructions) * job.config.num_return_sequences * job.config.num_candidates
        job.row_tokens = source + inputs["decoder_prompt_ids"].shape[1] + self.longest(job.config)
        if job.rows * job.row_tokens > self.max_pass_tokens:
            raise ValueError(
                f"{job.rows} answers of {job.row_tokens} tokens, prompts included, are more than the "
                f"{self.max_pass_tokens} tokens of a pass: ask for fewer or shorter answers."
            )

    def longest(self, config: ProtoGenGenerationConfig) -> int:
        """Tokens of an answer at most."""
        own = self.model.config.max_answer_length
        if MODES[config.mode].is_at_once:
            return config.length or min(config.longest(own), own)
        return config.longest(own)

    def write(self, jobs: list[Job]) -> list[list[Answer]]:
        """The answers to each job, which all have the same options, from one call of `generate`."""
        first = jobs[0]
        instructions = [instruction for job in jobs for instruction in job.instructions]
        contexts = [context for job in jobs for context in job.contexts]
        inputs = self.processor(instructions, contexts).to(self.model.device)
        own_draws = nullcontext() if first.seed is None else torch.random.fork_rng()
        with own_draws:
            if first.seed is not None:
                torch.manual_seed(first.seed)
            output = self.model.generate(
                **inputs,
                processor=self.processor,
                streamer=JobStreamer(self.processor, first) if first.grows else None,
                return_dict_in_generate=True,
                **first.options,
            )
        if time.monotonic() - self.given_back > SECONDS:
            give_back_memory()
            self.given_back = time.monotonic()
        answers = iter([self._answer(output, row, first.config) for row in range(len(output.sequences))])
        written = first.config.num_return_sequences

        def of_job(job):
            for _ in job.instructions:
                own = [next(answers) for _ in range(written)]
                yield from own * (job.number // written)

        return [list(of_job(job)) for job in jobs]

    def _answer(self, output: ProtoGenGenerateOutput, row: int, config: ProtoGenGenerationConfig) -> Answer:
        length = output.lengths[row].item()
        ids = output.sequences[row, :length].tolist()
        probabilities = output.token_confidences[row, :length].tolist()
        measures = {"mode": config.mode} | measures_of(output, row)
        if "abstained" in measures:
            measures["abstained"] = bool(measures["abstained"])
        ended = bool(ids) and ids[-1] in self.model.config.eos_token_ids
        whole = self.processor.decode(ids)
        text = before_stop(whole, config.stop_strings or [])
        is_cut = not ended and text == whole and length >= self.longest(config)
        pieces = [self.processor.decoder_tokenizer.decode([token]) for token in ids[: length - ended]]
        log_p = [math.log(p) if p > 0 else LEAST_LOG_PROBABILITY for p in probabilities]
        return Answer(
            text=text,
            tokens=list(zip(pieces, log_p, strict=False)),
            num_tokens=length,
            finish_reason="length" if is_cut else "stop",
            measures=measures,
        )
