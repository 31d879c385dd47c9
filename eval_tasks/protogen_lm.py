"""
`lm_eval --model protogen --model_args pretrained=DIR,mode=verified`: ProtoGen under the Language Model Evaluation
Harness (https://github.com/EleutherAI/lm-evaluation-harness).

The decoder's prompt is the harness's context as it is, tokenized, cut and batched as `--model hf` does. The encoder
reads the same text; of few-shot examples that do not fit in its window the first are left out.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from eval_tasks.benchmark_data import DOLLY_HELD_OUT
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.generation_protogen import BLOCK_MODES, MODES
from modeling_protogen.objectives import IGNORE_INDEX, argmax_tokens, log_probabilities
from modeling_protogen.processing_protogen import chat_text, pad_left

log = logging.getLogger(__name__)
# The harness shows what its own loggers inform of.
harness_log = logging.getLogger("lm_eval.protogen")
# Options of `HFLM` that are for how a decoder reads and scores, not for how it is loaded.
HARNESS_OPTIONS = {"max_length", "truncation", "add_bos_token", "prefix_token_id", "logits_cache", "softmax_dtype"}
SCORINGS = ("one_step", "verified")
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


class ProtoGenLM(HFLM):
    """
    Args:
        pretrained (`str`): folder or Hub id of a ProtoGen model.
        decoder (`str`, *optional*): a thin checkpoint's decoder, where it has moved.
        device (`str`, *optional*): the harness's default, `cuda:0`, means the CPU where there is no GPU.
        dtype (`str`): of all weights; `auto` is that of the checkpoint.
        mode (`str`): how `generate_until` tasks are answered, as in `generate`; `verified` answers are those of
            `--model hf` with the decoder alone.
        scoring (`str`): how answers are scored. `one_step`: the sum of their tokens' log-probabilities in one pass of
            that length, in which positions do not see each other: not an autoregressive likelihood. `verified`: the
            decoder's own. By default `verified` in that mode, `one_step` in others. Rolling log-likelihood, which has
            no instruction, is always the decoder's own.
        batch_size, max_batch_size: as in `HFLM`.
        kwargs: options of the mode, as in `generate`, and `HARNESS_OPTIONS`, as in `HFLM`.

    Raises:
        ValueError: if mode, scoring or an option are unknown.
    """

    def __init__(
        self,
        pretrained: str,
        decoder: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        mode: str = "one_step",
        scoring: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **kwargs,
    ):
        if mode not in MODES:
            raise ValueError(f"mode={mode} is not one of {', '.join(MODES)}.")
        scoring = scoring or ("verified" if mode == "verified" else "one_step")
        if scoring not in SCORINGS:
            raise ValueError(f"scoring={scoring} is not one of {', '.join(SCORINGS)}.")
        self.mode, self.scoring = mode, scoring
        names = MODES[mode] | {"do_sample", "temperature", "top_p"}
        known = names | HARNESS_OPTIONS
        if unknown := sorted(kwargs.keys() - known):
            raise ValueError(f"{', '.join(unknown)} is not for mode={mode}, which takes {', '.join(sorted(known))}.")
        self.options = {name: value for name, value in kwargs.items() if name in names}
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            device = accelerator.device
        elif device is None or (str(device).startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.protogen = ProtoGenForConditionalGeneration.from_pretrained(
            pretrained, dtype=dtype if dtype == "auto" else getattr(torch, dtype), decoder_name_or_path=decoder
        ).to(device)
        self.processor = ProtoGenProcessor.from_pretrained(pretrained)
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
        # The messages of a chat by its rendered text: the encoder knows no template.
        self.chat_texts: dict[str, str] = {}
        self.num_cut_contexts = 0

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under, which hold prompts as this template makes them."""
        template = self.processor.prompt_template
        if template is None:
            return super().tokenizer_name
        return f"{super().tokenizer_name}-{hashlib.sha256(template.encode()).hexdigest()[:16]}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.processor.prompt_template is None:
            text = super().apply_chat_template(chat_history, add_generation_prompt)
        else:
            text = self.processor.apply_chat_template(chat_history)
        self.chat_texts[text] = chat_text(chat_history)
        return text

    def _detect_batch_size(self, requests=None, pos: int = 0) -> int:
        if self.device.type == "cpu":
            return min(CPU_BATCH_SIZE, self.max_batch_size)
        return super()._detect_batch_size(requests, pos)

    def _chosen_batch_size(self) -> int:
        return self._detect_batch_size() if self.batch_size == "auto" else self.batch_size

    def inputs(self, contexts: list[str], prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """What the model takes: the encoder's tokens of the contexts, and the decoder's of the prompts."""
        batch = {}
        if self.processor.for_encoder:
            tokenizer, window = self.processor.tokenizer, self.processor.max_input_length
            rows = []
            for context in contexts:
                ids, dropped = last_blocks(tokenizer, self.chat_texts.get(context, context), window)
                self.num_cut_contexts += bool(dropped)
                rows.append(ids)
            batch |= tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        batch["decoder_prompt_ids"], batch["decoder_prompt_mask"] = pad_left(prompts)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

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
        found = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._report_seconds(requests, start)
        return found

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        is_rolling = bool(requests) and requests[0][0] is None
        if self.scoring == "verified" or is_rolling:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **kwargs)
        size = self._chosen_batch_size()
        found = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda row: -len(requests[row][1]))
        progress = tqdm(total=len(requests), desc="one-step log-likelihoods", disable=disable_tqdm or self.rank != 0)
        for first in range(0, len(order), size):
            rows = order[first : first + size]
            for row, score in zip(rows, self.score([requests[row] for row in rows]), strict=True):
                found[row] = score
                if requests[row][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[row][0], score)
            progress.update(len(rows))
        progress.close()
        self._report_cuts()
        return found

    @torch.no_grad()
    def score(self, requests: list[tuple[tuple[str, str], list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One-step log-probability of each continuation, and whether its tokens are the most likely ones."""
        longest = max(len(continuation) for _, _, continuation in requests)
        room = self.max_length - longest
        batch = self.inputs([pair[0] for pair, _, _ in requests], [prompt[-room:] for _, prompt, _ in requests])
        labels = torch.full((len(requests), longest), IGNORE_INDEX)
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

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self._check_held_out(requests)
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
        max_new_tokens = kwargs["max_gen_toks"]
        ids, mask = self.tok_batch_encode(
            list(contexts), left_truncate_len=self.max_length - max_new_tokens, truncation=self.truncation
        )
        prompts = [row[row_mask.bool()].tolist() for row, row_mask in zip(ids, mask, strict=True)]
        options = dict(self.options)
        if kwargs.get("do_sample"):
            drawn = {"temperature": kwargs["temperature"], "top_p": kwargs.get("top_p", 1.0)}
            options |= {"do_sample": True, **drawn}
        if self.mode in BLOCK_MODES:
            options |= {"stop_strings": stop, "processor": self.processor, "max_new_tokens": max_new_tokens}
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


def last_blocks(tokenizer, text: str, window: int) -> tuple[list[int], int]:
    """
    The tokens of as many of the text's last parts, between empty lines, as fit in a window, and how many parts were
    left out. Of a last part that does not fit alone, its end.
    """
    blocks = text.strip().split("\n\n")
    for first in range(len(blocks)):
        ids = tokenizer("\n\n".join(blocks[first:]) or " ").input_ids
        if len(ids) <= window:
            return ids, first
    inner = tokenizer(blocks[-1], add_special_tokens=False).input_ids
    end = tokenizer.decode(inner[-window:])
    return tokenizer(end, truncation=True, max_length=window).input_ids, len(blocks)
