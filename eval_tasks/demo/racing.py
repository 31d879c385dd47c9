"""An answer at once, and the same decoder's own answer token by token; what each takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from eval_tasks.commands.generate import measures_of
from modeling_protogen import ProtoGenForConditionalGeneration, ProtoGenProcessor
from modeling_protogen.autoregressive import DecoderState
from modeling_protogen.configuration_protogen import category_id
from modeling_protogen.frozen_decoder import logits_of
from trainers.devices import synchronize


@dataclass(frozen=True)
class Question:
    """What a person asks; `category` for a model with one `m` for each."""

    instruction: str
    context: str = ""
    category: str | None = None


@dataclass(frozen=True)
class Answer:
    """
    Args:
        text (`str`): empty if it was abstained from.
        tokens (`list[tuple[str, float]]`): the text that each token adds, and its probability.
        measures (`dict[str, float]`): from `measures_of`.
        seconds (`dict[str, float]`): by part; all of them are the time from instruction to text.
    """

    text: str
    tokens: list[tuple[str, float]]
    measures: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Written:
    """How far the decoder is: its text, the number of its tokens, its seconds, and whether that is all."""

    text: str
    num_tokens: int
    seconds: float
    is_whole: bool


def answer_at_once(
    model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor, prompt: Question, **options
) -> Answer:
    """
    The model's answer; `options` are those of `generate`.

    Raises:
        ValueError: if the model cannot read the prompt, or an option is not of the mode.
    """
    start = time.perf_counter()
    inputs = processor([prompt.instruction], [prompt.context]).to(model.device)
    if model.config.categories:
        options["category_ids"] = torch.tensor([category_id(prompt.category, model.config.categories)]).to(model.device)
    read = time.perf_counter()
    head = model.decoder.get_output_embeddings()
    parts = {
        "encoder": [model.encoder],
        "predictor": [model.proto_predictor],
        "decoder": [model.decoder.base_model, head],
    }
    with seconds_of(parts) as seconds:
        output = model.generate(**inputs, processor=processor, return_dict_in_generate=True, **options)
        synchronize()
    written = time.perf_counter()
    length = output.lengths[0].item()
    ids = output.sequences[0, :length].tolist()
    text = processor.decode(ids)
    seconds["text"] = read - start + time.perf_counter() - written
    seconds["other"] = written - read - sum(seconds[part] for part in parts)
    texts = token_texts(lambda ids: processor.decoder_tokenizer.decode(ids, skip_special_tokens=True), ids)
    tokens = list(zip(texts, output.token_confidences[0, :length].tolist(), strict=True))
    return Answer(text, tokens, measures_of(output, 0), seconds)


@contextmanager
def seconds_of(parts: dict[str, list[nn.Module | None]]) -> Iterator[dict[str, float]]:
    """Adds up how long the calls of modules take, by part; one part's modules do not call one another."""
    seconds, starts, hooks = dict.fromkeys(parts, 0.0), {}, []

    def begin(module, _):
        synchronize()
        starts[module] = time.perf_counter()

    def end(part):
        def hook(module, *_):
            synchronize()
            seconds[part] += time.perf_counter() - starts[module]

        return hook

    for part, modules in parts.items():
        for module in filter(None, modules):
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end(part))]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def token_texts(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """The text that each token adds; a character of several tokens comes with its last one."""
    texts, before = [], ""
    for number in range(1, len(ids) + 1):
        text = decode(ids[:number])
        if number < len(ids):
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        texts.append(text[len(before) :])
        before = text
    return texts


def answer_token_by_token(
    model: ProtoGenForConditionalGeneration, processor: ProtoGenProcessor, prompt: Question
) -> Iterator[Written]:
    """
    The frozen decoder's own answer to the same prompt as it grows, greedy, with keys and values cached, and at most as
    long as the model's answers. The time between two steps, in which others show it, is not counted.
    """
    start, seconds, ids = time.perf_counter(), 0.0, []
    inputs = processor([prompt.instruction], [prompt.context]).to(model.device)
    longest, eos = model.config.max_answer_length, model.config.eos_token_ids
    tokens = greedy_tokens(model.decoder, inputs["decoder_prompt_ids"], inputs["decoder_prompt_mask"])
    for token in islice(tokens, longest):
        ids.append(token)
        text = processor.decoder_tokenizer.decode(ids, skip_special_tokens=True)
        is_whole = token in eos or len(ids) == longest
        seconds += time.perf_counter() - start
        yield Written(text if is_whole else text.rstrip("\N{REPLACEMENT CHARACTER}"), len(ids), seconds, is_whole)
        if is_whole:
            return
        start = time.perf_counter()


@torch.no_grad()
def greedy_tokens(decoder, prompt_ids: torch.LongTensor, prompt_mask: torch.Tensor) -> Iterator[int]:
    """The decoder's most likely token after a prompt `(1, length)`, and after each of those, for ever."""
    text, tokens, mask = DecoderState(decoder, len(prompt_ids)), prompt_ids, prompt_mask
    while True:
        states, _ = text.read(tokens, mask)
        tokens = logits_of(decoder, states).argmax(-1)
        mask = torch.ones_like(tokens)
        yield tokens.item()
