"""
`lm_eval --model protogen --model_args pretrained=DIR,mode=verified`: ProtoGen under the Language Model Evaluation
Harness (https://github.com/EleutherAI/lm-evaluation-harness).

The decoder's prompt is the harness's context as it is, tokenized, cut and batched as `--model hf` does. The encoder
reads the same text; of few-shot examples that do not fit in its window the first are left out.
"""

import hashlib
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from itertools import chain

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, warning_once
from tqdm import tqdm
from transformers import BatchEncoding, BatchFeature

from eval_tasks.benchmark_data import DOLLY_HELD_OUT
from modeling_protogen import ProtoGenForConditionalGeneration
from modeling_protogen.encoder_places import (
    fitted,
    places_by_content,
    places_in,
    places_in_rendered,
    places_of_tokens,
)
from modeling_protogen.generation_protogen import MODES, SAMPLING, ProtoGenGenerationConfig, not_taken
from modeling_protogen.objectives import IGNORE_INDEX, argmax_tokens, log_probabilities
from modeling_protogen.processing_protogen import chat_text, contents_of, template_pieces
from modeling_protogen.proto_tokens import num_unguided
from trainers.decoders import load_processor_of, networks_of

log = logging.getLogger(__name__)
# The harness shows what its own loggers inform of.
harness_log = logging.getLogger("lm_eval.protogen")
# Options of `HFLM` that are for how a decoder reads and scores, not for how it is loaded.
HARNESS_OPTIONS = {"max_length", "truncation", "add_bos_token", "prefix_token_id", "logits_cache", "softmax_dtype"}
# Options of `from_pretrained`.
LOADING_OPTIONS = {"revision", "trust_remote_code", "device_map", "attn_implementation"}
SAMPLING_OPTIONS = {"do_sample", *SAMPLING}
SCORINGS = ("one_step", "verified")
# Log-probability, and whether it is the most likely, of a continuation without tokens.
EMPTY_SCORE = (0.0, True)
# Arguments by name of `ProtoGenLM`.
OWN_OPTIONS = {"pretrained", "decoder", "device", "dtype", "mode", "scoring", "max_new_tokens"}
OWN_OPTIONS |= {"batch_size", "max_batch_size"}
# What `--batch_size auto` is on CPUs, where larger batches gain nothing.
CPU_BATCH_SIZE = 16


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Without that logger's warnings."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_options(mode: str, max_new_tokens: int | None, options: dict) -> None:
    """
    Raises:
        ValueError: if `generate` would refuse them.
    """
    ProtoGenGenerationConfig().merged(mode=mode, max_new_tokens=max_new_tokens, **options)


class ProtoGenLM(HFLM):
    """
    Args:
        pretrained (`str`): folder or Hub id of a ProtoGen model.
        decoder (`str`, *optional*): a thin checkpoint's decoder, where it has moved; may have an `embedded:` name.
        device (`str`, *optional*): the harness's default, `cuda:0`, means the CPU where there is no GPU. Not used with
            `device_map`.
        dtype (`str`): of all weights; `auto` is that of the checkpoint.
        mode (`str`): how `generate_until` tasks are answered, as in `generate`; `verified` answers are those of
            `--model hf` with the decoder alone.
        scoring (`str`): how answers are scored. `one_step`: the sum of their tokens' log-probabilities in one pass of
            that length, in which positions do not see each other: not an autoregressive likelihood. `verified`: the
            decoder's own. By default `verified` in that mode, `one_step` in others. Rolling log-likelihood, which has
            no instruction, is always the decoder's own. `one_step` gives an answer that is longer than the model
            writes, `config.max_answer_length`, a log-probability of minus infinity.
        max_new_tokens (`int`, *optional*): tokens of an answer at most, also where a task asks for more.
        batch_size, max_batch_size: as in `HFLM`.
        kwargs: options of the mode, as in `generate`, which a task's own win over, `LOADING_OPTIONS`, as in
            `from_pretrained`, and `HARNESS_OPTIONS`, as in `HFLM`.

    Raises:
        ValueError: if mode, scoring, the batch size or an option are unknown.
    """

    def __init__(
        self,
        pretrained: str,
        decoder: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        mode: str = "one_step",
        scoring: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **kwargs,
    ):
        if mode not in MODES:
            raise ValueError(f"mode={mode} is not one of {', '.join(MODES)}.")
        scoring = scoring or ("verified" if mode == "verified" else "one_step")
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring} is not one of {', '.join(SCORINGS)}.")
        if not re.fullmatch(r"[1-9]\d*|auto(:[\d.]+)?", str(batch_size)):
            raise ValueError(f"batch_size={batch_size} is neither a number from 1 on, nor auto or auto:N.")
        self.mode, self.scoring = mode, scoring
        self.max_new_tokens = math.inf if max_new_tokens is None else max_new_tokens
        self._check_names(kwargs.keys(), OWN_OPTIONS | LOADING_OPTIONS | HARNESS_OPTIONS)
        self.options = {name: value for name, value in kwargs.items() if name in MODES[mode].options | SAMPLING_OPTIONS}
        check_options(mode, max_new_tokens, self.options)
        loading = {name: value for name, value in kwargs.items() if name in LOADING_OPTIONS}
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            device = accelerator.device
        elif device is None or (str(device).startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        source = {name: loading[name] for name in loading.keys() & {"revision", "trust_remote_code"}}
        networks = networks_of(pretrained, decoder, **source)
        self.protogen = ProtoGenForConditionalGeneration.from_pretrained(pretrained, dtype=dtype, **networks, **loading)
        if "device_map" not in loading:
            self.protogen.to(device)
        self.processor = load_processor_of(pretrained, decoder, **source)
        # Of what does not fit the encoder reads the end.
        self.processor.tokenizer.truncation_side = "left"
        with quiet("lm_eval.models.huggingface"):  # It warns that the model is loaded, and of what we do below.
            super().__init__(
                pretrained=self.protogen.decoder,
                tokenizer=self.processor.decoder_tokenizer,
                batch_size=batch_size,
                max_batch_size=max_batch_size,
                **{name: value for name, value in kwargs.items() if name in HARNESS_OPTIONS},
            )
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        # The contents of a chat by its rendered text, as the encoder knows no template, and that template's pieces.
        self.chats: dict[str, tuple[list[str], list[str | int]]] = {}
        self.num_cut_contexts = 0

    def _check_names(self, names: Set[str], others: set[str]) -> None:
        """
        Raises:
            ValueError: if one is neither an option of the mode nor among these others.
        """
        known = MODES[self.mode].options | SAMPLING_OPTIONS | others
        if unknown := sorted(names - known):
            raise ValueError(not_taken(self.mode, unknown, known))

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under, which hold prompts as this template makes them."""
        template = self.processor.prompt_template
        if template is None:
            return super().tokenizer_name
        return f"{super().tokenizer_name}-{hashlib.sha256(template.encode()).hexdigest()[:16]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        def render(contents):
            chat = [message | {"content": content} for message, content in zip(chat_history, contents, strict=True)]
            if self.processor.prompt_template is None:
                return super(ProtoGenLM, self).apply_chat_template(chat, add_generation_prompt)
            return self.processor.apply_chat_template(chat)

        contents = contents_of(chat_history)
        text = render(contents)
        self.chats[text] = contents, template_pieces(render, len(contents)) if self.processor.aligns_encoder else []
        return text

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        if self.device.type == "cpu":
            return min(CPU_BATCH_SIZE, self.max_batch_size)
        return super()._detect_batch_size(requests, pos)

    def _chosen_batch_size(self) -> int:
        return self._detect_batch_size() if self.batch_size == "auto" else self.batch_size

    def inputs(self, contexts: list[str], prompts: list[list[int]]) -> BatchFeature:
        """What the model takes: the encoder's tokens of the contexts, and the decoder's of the prompts."""
        processor, rows, places = self.processor, [], []
        for context, prompt in zip(contexts, prompts, strict=True) if processor.for_encoder else ():
            read, encoding, dropped = last_blocks(processor.tokenizer, self._said(context), processor.max_input_length)
            self.num_cut_contexts += bool(dropped)
            rows.append(encoding.input_ids)
            if processor.aligns_encoder:
                places.append(self._places(context, prompt, read, encoding))
        return processor.inputs_of_ids(prompts, rows, places).to(self.device)

    def _said(self, context: str) -> str:
        """What the encoder reads of a context: of a rendered chat what is said in it."""
        return chat_text(self.chats[context][0]) if context in self.chats else context

    def _places(self, context: str, prompt: list[int], read: str, encoding: BatchEncoding) -> list[int]:
        """
        For each token of a prompt the number of the encoder's token that it stands for; `read` is the end of what is
        said, as the encoder reads it.
        """
        said = self._said(context)
        places = fitted([0] * (len(said.rstrip()) - len(read)) + places_in(encoding, read), len(said))
        if context in self.chats:
            contents, template = self.chats[context]
            places = places_in_rendered(context, template, contents, places_by_content(places, contents))
        # Of what is scored the harness leaves out the spaces before it; a prompt that is cut has lost its beginning.
        for text in (context, context.rstrip()):
            for options in ({}, {"add_special_tokens": False}):
                tokens = self.tokenizer(text, truncation=self.truncation, **options)
                if tokens.input_ids[-len(prompt) :] == prompt:
                    return places_of_tokens(text, tokens[0].offsets[-len(prompt) :], places)
        return [0] * len(prompt)

    def _report_cuts(self) -> None:
        if self.num_cut_contexts:
            log.warning(
                f"{self.num_cut_contexts} contexts are longer than the encoder's window of "
                f"{self.processor.max_input_length} tokens: it reads their last parts, between empty lines, that fit."
            )
        self.num_cut_contexts = 0

    def _report_seconds(self, requests, start: float) -> None:
        examples = {(request.task_name, request.doc_id) for request in requests}
        if examples and self.rank == 0:
            harness_log.info(
                f"{len(examples)} examples, {(time.perf_counter() - start) / len(examples):.3g} seconds each"
            )

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        start = time.perf_counter()
        # The harness asks for the first token even where context and continuation are both empty.
        pairs = [request.args for request in requests]
        is_empty = [context == "" and not self.tok_encode(text, add_special_tokens=False) for context, text in pairs]
        others = [request for request, empty in zip(requests, is_empty, strict=True) if not empty]
        scores = iter(super().loglikelihood(others, disable_tqdm=disable_tqdm))
        found = [EMPTY_SCORE if empty else next(scores) for empty in is_empty]
        self._report_seconds(requests, start)
        return found

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        is_rolling = bool(requests) and requests[0][0] is None
        requests = [(texts, context or [self.prefix_token_id], answer) for texts, context, answer in requests]
        if self.scoring == "verified" or is_rolling:
            windows = list(map(self._windows, requests))
            scores = iter(super()._loglikelihood_tokens([*chain(*windows)], disable_tqdm=disable_tqdm, **kwargs))
            return [joined(next(scores) for _ in own) for own in windows]
        size, longest = self._chosen_batch_size(), self._longest_at_once
        lengths = [len(answer) for _, _, answer in requests]
        found = [EMPTY_SCORE if length == 0 else (-math.inf, False) for length in lengths]
        order = sorted((row for row, length in enumerate(lengths) if 0 < length <= longest), key=lambda r: -lengths[r])
        progress = tqdm(total=len(order), desc="one-step log-likelihoods", disable=disable_tqdm or self.rank != 0)
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            for row, score in zip(rows, self.score([requests[row] for row in rows]), strict=True):
                found[row] = score
                self.cache_hook.add_partial("loglikelihood", requests[row][0], score)
            progress.update(len(rows))
        progress.close()
        self._report_cuts()
        if too_long := sum(length > longest for length in lengths):
            log.warning(
                f"{too_long} of {len(lengths)} answers to score are longer than the {longest} tokens that this model "
                "writes in one step: they count as impossible (-inf). scoring=verified scores answers of any length."
            )
        return found

    @property
    def _num_spare(self) -> int:
        """Positions in the decoder that an answer in one step takes beside its tokens."""
        config = self.protogen.config
        heads = num_unguided(config.arrangement, config.num_e_tokens) * config.max_chunks
        # Where the decoder reads the prompt first, the answer's first token is fed before the slots.
        return heads + int(config.uses_decoder_states)

    @property
    def _longest_at_once(self) -> int:
        """Tokens that an answer in one step can have, in a window that holds one of a prompt too."""
        return min(self.protogen.config.max_answer_length, self.max_length - self._num_spare - 1)

    def _windows(self, request: tuple) -> list[tuple]:
        """A request to score, without tokens none; where its continuation is longer than the window, one for each."""
        _, context, continuation = request
        if len(continuation) <= self.max_length:
            return [request] if continuation else []
        windows = get_rolling_token_windows(continuation, context[-1], self.max_length, context_len=1)
        return [(None, *make_disjoint_window(window)) for window in windows]

    @torch.no_grad()
    def score(self, requests: list[tuple[tuple[str, str], list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One-step log-probability of each continuation, and whether its tokens are the most likely ones."""
        # The window holds each answer with the end of its prompt.
        room = self.max_length - self._num_spare
        prompts = [prompt[len(answer) - room :] for _, prompt, answer in requests]
        batch = self.inputs([pair[0] for pair, _, _ in requests], prompts)
        labels = torch.full((len(requests), max(len(answer) for _, _, answer in requests)), IGNORE_INDEX)
        for label, (_, _, continuation) in zip(labels, requests, strict=True):
            label[: len(continuation)] = torch.tensor(continuation)
        labels = labels.to(self.device)
        logits = self.protogen(**batch, labels=labels, first_tokens=labels[:, 0], return_loss=False).answer_logits
        is_token = labels != IGNORE_INDEX
        log_p = torch.zeros(labels.shape, device=self.device)
        log_p[is_token] = log_probabilities(logits, labels[is_token][:, None])[:, 0]
        is_greedy = (argmax_tokens(logits, labels) == labels).all(-1)
        return list(zip(log_p.sum(-1).tolist(), is_greedy.tolist(), strict=True))

    def _check_held_out(self, requests) -> None:
        share = self.protogen.config.validation_share
        asks_dolly = any((request.task_name or "").startswith("protogen_dolly") for request in requests)
        if asks_dolly and share is not None and share < DOLLY_HELD_OUT:
            raise ValueError(
                f"protogen_dolly asks a share of {DOLLY_HELD_OUT} of Dolly and this model's training held out {share} "
                f"(validation_share): train with at least {DOLLY_HELD_OUT}."
            )

    def _check_gen_kwargs(self, requests) -> None:
        """Refuses what cannot be done before anything is answered."""
        for kwargs in {repr(request.args[1]): request.args[1] for request in requests}.values():
            self._options(normalize_gen_kwargs(kwargs, self.max_gen_toks))

    def _options(self, kwargs: dict) -> dict:
        """
        What `generate` takes, of normalized generation arguments of the harness.

        Raises:
            ValueError: if one is unknown or impossible.
        """
        # One beam is greedy decoding.
        asked = {name: value for name, value in kwargs.items() if (name, value) != ("num_beams", 1)}
        self._check_names(asked.keys(), {"until", "max_gen_toks"})
        options = self.options | {name: asked[name] for name in asked.keys() & MODES[self.mode].options}
        if asked["do_sample"]:
            options |= {name: asked[name] for name in asked.keys() & SAMPLING_OPTIONS}
            if not options.get("temperature"):
                raise ValueError("do_sample=True needs a temperature above 0: give temperature=1.0 beside it.")
        check_options(self.mode, asked["max_gen_toks"], options)
        return options

    def _longest_answer(self, kwargs: dict) -> int:
        """Tokens of an answer at most: half a window, where those that are asked for leave its prompt no room."""
        longest = min(kwargs["max_gen_toks"], self.max_new_tokens)
        if MODES[self.mode].is_at_once:
            return min(longest, self._longest_at_once)
        if longest < self.max_length:
            return longest
        half = self.max_length // 2
        warning_once(
            log,
            f"answers of {longest} tokens leave their prompts no room in the decoder's window of {self.max_length}: "
            f"they end after {half}.",
        )
        return half

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self._check_held_out(requests)
        self._check_gen_kwargs(requests)
        start = time.perf_counter()
        answers = []
        order = Collator(
            [(*request.args, request) for request in requests],
            sort_fn=lambda each: (-len(self.tok_encode(each[0])), each[0]),
            group_by="gen_kwargs",
            group_fn=lambda each: each[1],
        )
        size = self._chosen_batch_size()
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        progress = tqdm(total=len(requests), desc="answers", disable=disable_tqdm or self.rank != 0)
        for chunk in order.get_batched(n=size):
            contexts, all_kwargs, chunk_requests = zip(*chunk, strict=True)
            kwargs = normalize_gen_kwargs(all_kwargs[0], self.max_gen_toks)
            stop = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
            written = self.write(contexts, stop, kwargs)
            for context, gen_kwargs, request, (text, confidence) in zip(
                contexts, all_kwargs, chunk_requests, written, strict=True
            ):
                text = postprocess_generated_text(text, stop, None)
                answers.append(text)
                self.cache_hook.add_partial("generate_until", (context, gen_kwargs), text)
                # The harness logs a sample's arguments, so they carry how sure the answer was.
                request.arguments = (context, gen_kwargs | confidence)
            progress.update(len(chunk))
        progress.close()
        self._report_cuts()
        self._report_seconds(requests, start)
        return order.get_original(answers)

    def write(self, contexts: list[str], stop: list[str], kwargs: dict) -> list[tuple[str, dict]]:
        """
        Answers in the mode, before they are cut at stop strings, each with its `uncertainty` and its
        `token_confidences`, pairs of a token's text and its probability.
        """
        max_new_tokens, options = self._longest_answer(kwargs), self._options(kwargs)
        spare = self._num_spare if MODES[self.mode].is_at_once else 0
        ids, mask = self.tok_batch_encode(
            list(contexts), left_truncate_len=self.max_length - max_new_tokens - spare, truncation=self.truncation
        )
        prompts = [
            row[row_mask.bool()].tolist() or [self.prefix_token_id] for row, row_mask in zip(ids, mask, strict=True)
        ]
        options["max_new_tokens"] = max_new_tokens
        if not MODES[self.mode].is_at_once:
            options |= {"stop_strings": stop, "processor": self.processor}
        output = self.protogen.generate(
            **self.inputs(contexts, prompts), mode=self.mode, return_dict_in_generate=True, **options
        )
        uncertainties = 1 - output.confidences if output.uncertainties is None else output.uncertainties
        answers = []
        for row, length in enumerate(output.lengths.tolist()):
            tokens = output.sequences[row, : min(length, max_new_tokens)].tolist()
            confidences = [round(value, 4) for value in output.token_confidences[row].tolist()]
            pairs = list(zip(self.tokenizer.batch_decode([[token] for token in tokens]), confidences, strict=False))
            confidence = {"uncertainty": uncertainties[row].item(), "token_confidences": pairs}
            answers.append((self.processor.decode(tokens), confidence))
        return answers


def last_blocks(tokenizer, text: str, window: int) -> tuple[str, BatchEncoding, int]:
    """
    As many of the text's last parts, between empty lines, as fit in a window, their tokens, and how many parts were
    left out or cut. Of a last part that does not fit alone, its end, if the tokenizer's `truncation_side` is left.
    """
    blocks = text.strip().split("\n\n")

    def tokens(first, **limit):
        part = "\n\n".join(blocks[first:]) or " "
        return part, tokenizer(part, split_special_tokens=True, **limit)

    def fits(part):
        return len(part[1].input_ids) <= window

    whole = tokens(0)
    if fits(whole):
        return *whole, 0
    # From the end on: a long text is not read again for each of its parts.
    first = len(blocks) - 1
    while first and fits(tokens(first - 1)):
        first -= 1
    return *tokens(first, truncation=True, max_length=window), max(first, 1)


def joined(scores: Iterable[tuple[float, bool]]) -> tuple[float, bool]:
    """The score of a text, of those of its parts."""
    log_p, is_greedy = zip(EMPTY_SCORE, *scores, strict=True)
    return sum(log_p), all(is_greedy)
