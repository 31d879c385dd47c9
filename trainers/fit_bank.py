"""Fitting a set of texts into a bank: the shares of several processes, progress, and going on after a kill."""

import time
from contextlib import ExitStack
from dataclasses import replace

import torch
from accelerate import Accelerator
from tqdm import tqdm

from modeling_protogen import ProtoGenConfig, ProtoGenForConditionalGeneration, ProtoGenProcessor

from .data import Example
from .fitting import ProtoTokenFitter, Text
from .proto_bank import BankEntry, BankInfo, ProtoTokenBank


def fit_bank(fitter: ProtoTokenFitter, bank: ProtoTokenBank, texts: list[Text], accelerator: Accelerator) -> int:
    """
    Fits the texts that the bank lacks. Every process takes its share of them and writes shards of its own; a text is on
    the disk at the end of the step in which it ended.

    Where `m` is shared it is learned first, by one process, and kept in the bank: texts that come later use the same.

    Args:
        fitter (`ProtoTokenFitter`), bank (`ProtoTokenBank`), texts (`list[Text]`)
        accelerator (`Accelerator`): the processes; its trackers, if any, get the progress.

    Returns:
        `int`: texts that were fitted, by all processes.

    Raises:
        ValueError: if another run writes this bank, or a text's group has no `m` in it.
    """
    with ExitStack() as stack:
        # A second run fails here at rank 0, before its other ranks have done anything.
        with accelerator.main_process_first():
            stack.enter_context(bank.writing(accelerator.process_index))
        # Nobody writes before all have read what there is.
        accelerator.wait_for_everyone()
        pending = [text for text in texts if text.id not in bank]
        m = None
        if bank.info.m_scope != "per_example" and pending:
            with accelerator.main_process_first():
                m, pending = shared_m(fitter, bank, pending)
        pending.sort(key=lambda text: -len(text.token_ids))
        mine = pending[accelerator.process_index :: accelerator.num_processes]
        progress = Progress(len(mine), accelerator)
        with progress.bar:
            for ended in fitter.fit(mine, m):
                bank.append(ended)
                progress.step(ended)
    accelerator.wait_for_everyone()
    bank.reload()
    return len(pending)


def shared_m(
    fitter: ProtoTokenFitter, bank: ProtoTokenBank, texts: list[Text]
) -> tuple[dict[str, torch.Tensor], list[Text]]:
    """The bank's `m` of each group, learned and stored if it has none yet; and the texts, with the starts it gave."""
    if bank.shared_m() is None:
        bank.write_shared_m(*fitter.fit_shared_m(texts))
    # As stored: a run that goes on starts where the first one did.
    m, starts = bank.shared_m(), bank.shared_m_starts()
    texts = [with_shared_m_start(text, starts.get(text.id), bank.info.chunk_size) for text in texts]
    unknown = sorted({text.group for text in texts} - m.keys())
    if unknown:
        raise ValueError(
            f"the bank in {bank.folder} has no m for {', '.join(unknown)}, only for {', '.join(sorted(m))}: it was "
            "learned on other data. Fit these into another bank."
        )
    return {group: vector.to(fitter.decoder.device) for group, vector in m.items()}, texts


def with_shared_m_start(text: Text, e: torch.Tensor | None, chunk_size: int) -> Text:
    """The text, starting from this `e` where there is one that is as long as the text is now."""
    fits = e is not None and len(e) == -(-len(text.token_ids) // chunk_size)
    return replace(text, start=(e, None)) if fits else text


class Progress:
    """
    A progress bar with the share of perfect texts, texts a minute, steps a text and the time left; the same metrics to
    the accelerator's trackers. The main process shows its own share.

    Args:
        total (`int`): texts of this process.
        accelerator (`Accelerator`)
    """

    def __init__(self, total: int, accelerator: Accelerator):
        self.accelerator = accelerator
        self.steps = self.texts = self.perfect = self.text_steps = 0
        self.start = time.monotonic()
        name = "fit" if accelerator.num_processes == 1 else "fit, this process"
        self.bar = tqdm(
            total=total,
            desc=name,
            disable=not accelerator.is_main_process,
            bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}, left {remaining}{postfix}]",
        )

    def step(self, ended: list[BankEntry]) -> None:
        """Counts one step, and the texts that ended in it."""
        self.steps += 1
        self.texts += len(ended)
        self.perfect += sum(entry.accuracy == 1 for entry in ended)
        self.text_steps += sum(entry.steps for entry in ended)
        status = f"step {self.steps}"
        if self.texts:
            metrics = {
                "texts_done": self.texts,
                "perfect_share": self.perfect / self.texts,
                "texts_per_minute": 60 * self.texts / (time.monotonic() - self.start),
                "steps_per_text": self.text_steps / self.texts,
            }
            status += ", perfect {perfect_share:.0%}, {texts_per_minute:.3g} texts/min, {steps_per_text:.0f} steps/text"
            status = status.format(**metrics)
            if ended:
                self.accelerator.log({f"fit/{name}": value for name, value in metrics.items()}, step=self.steps)
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(len(ended))


def with_predicted_starts(
    texts: list[Text],
    examples: list[Example],
    model: ProtoGenForConditionalGeneration,
    processor: ProtoGenProcessor,
    info: BankInfo,
    batch_size: int = 32,
) -> list[Text]:
    """
    The texts, each with the proto-tokens that a trained model predicts from its instruction as a start.

    Args:
        texts (`list[Text]`), examples (`list[Example]`): in the same order.
        model, processor: trained without `decoder_sees_prompt` and slot adapters, for the bank's arrangement.

    Raises:
        ValueError: if the model's proto-tokens mean something else than the bank's.
    """
    check_same_vectors(model.config, info)
    started = []
    for first in tqdm(range(0, len(texts), batch_size), desc="predict starts", leave=False):
        part = examples[first : first + batch_size]
        inputs = processor([e.instruction for e in part], [e.context for e in part])
        with torch.no_grad():
            predicted = model.predict(**inputs.to(model.device))
        for text, text_e, text_m in zip(texts[first : first + batch_size], predicted.e, predicted.m, strict=True):
            chunks = -(-len(text.token_ids) // info.chunk_size)
            started.append(replace(text, start=(text_e[:chunks], text_m[:chunks])))
    return started


def check_same_vectors(config: ProtoGenConfig, info: BankInfo) -> None:
    """
    Raises:
        ValueError: if a model's proto-tokens mean something else than a bank's.
    """
    wanted = {
        "arrangement": info.arrangement,
        "chunk_size": info.chunk_size,
        "num_e_tokens": info.num_e_tokens,
        "sink": info.sink,
        "m_scope": "per_example",
        "decoder_sees_prompt": False,
        "slot_adapter_rank": 0,
    }
    differing = [
        f"{name}={getattr(config, name)!r}" for name, value in wanted.items() if getattr(config, name) != value
    ]
    if differing:
        raise ValueError(
            f"a model with {', '.join(differing)} does not go with this bank, which needs "
            f"{', '.join(f'{name}={value!r}' for name, value in wanted.items())}."
        )
