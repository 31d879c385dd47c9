"""Fitting: optimising proto-tokens for given texts against the frozen decoder."""

import hashlib
import math
import warnings
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import psutil
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from modeling_protogen.frozen_decoder import check_decoder, embedding_std, joined_inputs, logits_of, sink_ids
from modeling_protogen.objectives import MAX_FLOAT_LOGITS
from modeling_protogen.proto_tokens import build_layout, fill_slots

from .grouped_attention import use_grouped_attention
from .proto_bank import BankEntry, BankInfo

SCHEDULES = ["cosine", "constant"]
# Above one half no other token is likelier; the rest is room for rounding.
SAFE_PROBABILITY = 0.6
# Share of a pass that may be padding; texts of other lengths go into a pass of their own.
MAX_PADDING = 0.1
# Answer tokens with which a processor is busy: more of them in one pass cost memory and gain nothing.
BUSY_TOKENS = {"cpu": 512}
BUSY_TOKENS_ACCELERATOR = 16_384


@dataclass
class FittingArguments:
    """How proto-tokens are fitted."""

    fit_num_texts: int | None = field(default=None, metadata={"help": "Texts to fit; all by default."})
    fit_max_length: int = field(default=64, metadata={"help": "Tokens of each text to fit; the rest is cut."})
    fit_slots: str = field(
        default="auto", metadata={"help": "Texts fitted side by side; auto chooses by memory and processor."}
    )
    fit_max_steps: int = field(default=300, metadata={"help": "Optimisation steps of one attempt."})
    fit_attempts: int = field(default=5, metadata={"help": "Fresh starts for texts that are not perfect; 1 = none."})
    fit_min_probability: float = field(
        default=0.7,
        metadata={
            "help": "A text is done when it is perfect and each of its tokens has this probability, so that rounding "
            "(another batch size or dtype) does not undo it; 0 stops at perfect, as the paper does."
        },
    )
    fit_learning_rate: float = field(default=0.3, metadata={"help": "AdamW learning rate."})
    fit_schedule: str = field(
        default="cosine",
        metadata={"help": "Learning rate over an attempt: cosine (to zero) or constant.", "choices": SCHEDULES},
    )
    fit_weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay."})
    fit_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    fit_beta2: float = field(default=0.9, metadata={"help": "AdamW beta2."})
    fit_normalize_gradients: bool = field(
        default=True, metadata={"help": "Scale the gradient of each proto-token to length 1 before AdamW sees it."}
    )
    fit_init_std: float | None = field(
        default=None,
        metadata={"help": "Std of the initial proto-tokens; that of the embedding table by default (paper: 1)."},
    )
    fit_progressive_share: float = field(
        default=0.0,
        metadata={"help": "Share of an attempt over which the loss grows from the first token to the whole text."},
    )
    fit_shared_m_texts: int = field(
        default=64,
        metadata={"help": "Texts of a group on which its shared m is learned (m_scope shared, per_category)."},
    )
    fit_shared_m_steps: int = field(default=400, metadata={"help": "Steps in which a shared m is learned."})
    fit_seed: int = field(default=0, metadata={"help": "Seed of the initial proto-tokens."})
    fit_compile: bool = field(
        default=False,
        metadata={"help": "Compile the decoder with torch.compile: a minute or two at the start, faster steps after."},
    )

    def __post_init__(self):
        if self.fit_slots != "auto" and not (self.fit_slots.isdecimal() and int(self.fit_slots) > 0):
            raise ValueError(f"fit_slots must be auto or a number of texts, not {self.fit_slots!r}.")
        for name in ("fit_max_length", "fit_max_steps", "fit_attempts", "fit_shared_m_texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass
class Text:
    """
    A text to reconstruct.

    Args:
        id (`str`): example id.
        token_ids (`list[int]`): in the decoder's vocabulary.
        group (`str`): whose `m` it uses where `m` is not its own: its category, or `""` if all share one.
        start (tuple of `e` `(chunks, num_e_tokens, dim)` and `m` `(chunks, dim)`, *optional*):
            where the first attempt starts; random by default. `m` is ignored unless it is the text's own.
    """

    id: str
    token_ids: list[int]
    group: str = ""
    start: tuple[torch.Tensor, torch.Tensor | None] | None = None


@dataclass(eq=False)
class TextFit:
    """
    A text in its slot, and the best it has reached.

    Args:
        text (`Text`)
        e (`nn.Parameter` of shape `(chunks, num_e_tokens, dim)`): `e` of the current attempt; None before the first.
        m (`torch.Tensor` of shape `(chunks, dim)` or `(1, dim)`): its own `m`, a parameter, or that of its group.
        optimizer (`torch.optim.Optimizer`): of this attempt.
        attempt, step (`int`): counted from 0; `step` within the attempt.
        best (`BankEntry`, *optional*): copies of the vectors with the best accuracy measured, and that accuracy.
        min_probability (`float`): the least probability of a token under the best vectors.
    """

    text: Text
    e: nn.Parameter | None = None
    m: torch.Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    attempt: int = 0
    step: int = 0
    best: BankEntry | None = None
    min_probability: float = 0.0

    @property
    def score(self) -> tuple[float, float]:
        """What the best vectors are chosen by."""
        return (self.best.accuracy if self.best else -1.0, self.min_probability)


class ProtoTokenFitter:
    """
    Fits `(e, m)` of many texts side by side against the frozen decoder.

    A fixed number of slots is always full: a text leaves its slot the moment it is done (see `fit_min_probability`) or
    out of attempts, and the next one takes it with an optimiser of its own. Texts do not influence each other: where
    one starts depends on its id and the seed alone, and where it ends not on what is fitted beside it.

    An `m` that several texts share is learned first, on a sample of them ([`fit_shared_m`]), and then stays: with the
    `m` given the texts are independent again, and can leave one by one.

    The vectors kept are the ones that the accuracy was measured with, not those after the following step. An accuracy
    without a margin is measured once more, the text alone, so that anyone can repeat it.

    Args:
        decoder (`PreTrainedModel`): the frozen causal language model.
        info (`BankInfo`): arrangement, chunk size, number of e-tokens, scope of m and sink.
        args (`FittingArguments`)

    Raises:
        ValueError: if the decoder lacks the sink that `info` asks for, or cannot serve ([`check_decoder`]).
    """

    def __init__(self, decoder: PreTrainedModel, info: BankInfo, args: FittingArguments):
        if info.sink == "bos" and decoder.config.get_text_config().bos_token_id is None:
            raise ValueError("sink=bos needs a decoder with a bos_token_id; this one has none: fit with sink=none.")
        self.decoder = decoder.requires_grad_(False).eval()
        use_grouped_attention(decoder)
        check_decoder(decoder)
        self.body = decoder.base_model
        if args.fit_compile:
            self.body = torch.compile(self.body, dynamic=True)
        self.info = info
        self.args = args
        self.init_std = args.fit_init_std or embedding_std(decoder)
        self.busy_tokens = BUSY_TOKENS.get(decoder.device.type, BUSY_TOKENS_ACCELERATOR)
        # Positions that the decoder was run on so far, and those of them that were padding.
        self.num_positions = self.num_padding = 0

    def fit(self, texts: list[Text], m: dict[str, torch.Tensor] | None = None) -> Iterator[list[BankEntry]]:
        """
        Fits the texts, the longest first.

        Args:
            texts (`list[Text]`)
            m (`dict[str, torch.Tensor]` of shape `(1, dim)`, *optional*): the `m` of each group; without it each text
                gets its own.

        Yields:
            `list[BankEntry]`: after every step the texts that have just ended, often none.
        """
        if not texts:
            return
        waiting = deque(TextFit(text) for text in sorted(texts, key=lambda text: -len(text.token_ids)))
        slots = self.num_slots(texts)
        active = []
        while waiting or active:
            while waiting and len(active) < slots:
                fit = waiting.popleft()
                if fit.e is None:
                    self.start(fit, m)
                active.append(fit)
            scores = self._scores_and_gradients(active)
            if scores is None:
                # Those who leave for lack of memory go on later where they were.
                slots = len(active) // 2
                warnings.warn(f"out of memory: going on with {slots} slots.", stacklevel=2)
                waiting.extendleft(reversed(active[slots:]))
                active = active[:slots]
                continue
            ended = []
            for fit, score in zip(active, scores, strict=True):
                if score > fit.score:
                    fit.best = self._entry(fit, score[0])
                    fit.min_probability = score[1]
                if self._is_done(fit) or (self._is_spent(fit) and fit.attempt + 1 == self.args.fit_attempts):
                    ended.append(fit)
                elif self._is_spent(fit):
                    fit.attempt += 1
                    self.start(fit, m)
                else:
                    self._step(fit)
            active = [fit for fit in active if fit not in ended]
            yield [self._confirmed(fit) for fit in ended]

    def fit_shared_m(self, texts: list[Text]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        Learns the `m` of each group together with an `e` for each text of a sample, `fit_shared_m_texts` a group, in
        `fit_shared_m_steps` steps; keeps the state with the best mean accuracy.

        Args:
            texts (`list[Text]`)

        Returns:
            The `m` `(1, dim)` of each group, and of each text of the sample the `e` `(chunks, num_e_tokens, dim)`, from
            which its fit may start.
        """
        fits = [TextFit(text) for text in self._sample(texts)]
        groups = sorted({fit.text.group for fit in fits})
        m = {group: nn.Parameter(self._random(f"m {group}", 0, 1, self.info.dim)) for group in groups}
        optimizers = [self.optimizer([vector]) for vector in m.values()]
        for fit in fits:
            self.start(fit, m)
        best, slots = (-1.0, -1.0), self.num_slots([fit.text for fit in fits])
        kept = {}
        for step in tqdm(range(self.args.fit_shared_m_steps + 1), desc="shared m", leave=False):
            scores = []
            while len(scores) < len(fits):
                part = self._scores_and_gradients(fits[len(scores) : len(scores) + slots])
                if part is None:
                    slots //= 2
                    # The shared gradients are gone with the part that failed.
                    scores = []
                    for fit in fits:
                        fit.e.grad = fit.m.grad = None
                else:
                    scores += part
            mean = tuple(sum(part) / len(scores) for part in zip(*scores, strict=True))
            if mean > best:
                best = mean
                kept = {fit.text.id: fit.e.detach().clone() for fit in fits}
                learned = {group: vector.detach().clone() for group, vector in m.items()}
            if step == self.args.fit_shared_m_steps:
                break
            rate = self.learning_rate(step, self.args.fit_shared_m_steps)
            for vector, optimizer in zip(m.values(), optimizers, strict=True):
                self.update([vector], optimizer, rate)
            for fit in fits:
                self.update([fit.e], fit.optimizer, rate)
                fit.step += 1
        return learned, kept

    def _sample(self, texts: list[Text]) -> list[Text]:
        """`fit_shared_m_texts` of each group, the longest first; the same whatever the order of the texts."""
        sample = defaultdict(list)
        for text in sorted(texts, key=lambda text: self._seed(text.id, "sample")):
            if len(sample[text.group]) < self.args.fit_shared_m_texts:
                sample[text.group].append(text)
        return sorted((text for group in sample.values() for text in group), key=lambda text: -len(text.token_ids))

    def measure(self, entry: BankEntry) -> float:
        """
        The share of a text's tokens that its stored proto-tokens write, in a pass of its own.

        Args:
            entry (`BankEntry`)
        """
        e, m = entry.e.to(self.decoder.device), entry.m.to(self.decoder.device)
        with torch.no_grad():
            states, targets = self._answer_states([TextFit(Text(entry.id, entry.token_ids), e, m)])
            return (logits_of(self.decoder, states).max(-1).indices == targets).float().mean().item()

    def num_slots(self, texts: list[Text]) -> int:
        """
        Texts to fit side by side: `fit_slots`, or as many of the longest as keep the processor busy, if the memory that
        is free holds the activations of that many.

        Args:
            texts (`list[Text]`)
        """
        if self.args.fit_slots != "auto":
            return int(self.args.fit_slots)
        longest = max(texts, key=lambda text: len(text.token_ids))
        device = self.decoder.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        # Gradients pass through as much again as is kept for them.
        by_memory = free // (2 * self._saved_bytes(longest))
        return max(1, min(len(texts), by_memory, self.busy_tokens // len(longest.token_ids)))

    def _saved_bytes(self, text: Text) -> int:
        """Bytes that autograd keeps for the backward pass of one text, without the decoder's weights."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.decoder.parameters()}
        saved = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        fit = TextFit(text)
        self.start(fit)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # Alive until the bytes are counted: freed storage would be taken again.
            states = self._answer_states([fit])
        del states
        return max(1, sum(saved.values()))

    def _is_done(self, fit: TextFit) -> bool:
        return fit.score >= (1.0, self.args.fit_min_probability)

    def _is_spent(self, fit: TextFit) -> bool:
        return fit.step == self.args.fit_max_steps

    def start(self, fit: TextFit, m: dict[str, torch.Tensor] | None = None) -> None:
        """
        Puts a text at the beginning of an attempt.

        Args:
            fit (`TextFit`): what is changed.
            m (`dict[str, torch.Tensor]` of shape `(1, dim)`, *optional*): the `m` of each group; its own by default.
        """
        text, info = fit.text, self.info
        chunks = -(-len(text.token_ids) // info.chunk_size)
        given_e, given_m = text.start if text.start is not None and fit.attempt == 0 else (None, None)
        if given_e is None:
            given_e = self._random(f"e {text.id}", fit.attempt, chunks, info.num_e_tokens, info.dim)
        fit.e = nn.Parameter(given_e.to(self.decoder.device, torch.float32, copy=True))
        if m is not None:
            fit.m = m[text.group]
        else:
            if given_m is None:
                given_m = self._random(f"m {text.id}", fit.attempt, chunks, info.dim)
            fit.m = nn.Parameter(given_m.to(self.decoder.device, torch.float32, copy=True))
        fit.optimizer = self.optimizer([fit.e] if m is not None else [fit.e, fit.m])
        fit.step = 0

    def _step(self, fit: TextFit) -> None:
        parameters = fit.optimizer.param_groups[0]["params"]
        self.update(parameters, fit.optimizer, self.learning_rate(fit.step, self.args.fit_max_steps))
        fit.step += 1

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        """
        AdamW with the settings of the fit.

        Args:
            parameters (`list[nn.Parameter]`)
        """
        args = self.args
        betas = (args.fit_beta1, args.fit_beta2)
        return torch.optim.AdamW(
            parameters, args.fit_learning_rate, betas, weight_decay=args.fit_weight_decay, fused=True
        )

    def learning_rate(self, step: int, num_steps: int) -> float:
        """
        The learning rate of a step.

        Args:
            step (`int`): counted from 0.
            num_steps (`int`): of the attempt.
        """
        if self.args.fit_schedule == "constant":
            return self.args.fit_learning_rate
        return self.args.fit_learning_rate * (1 + math.cos(math.pi * step / num_steps)) / 2

    def update(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, rate: float) -> None:
        """
        One step along the gradients, which are then gone.

        Args:
            parameters (`list[nn.Parameter]`): with gradients.
            optimizer (`torch.optim.Optimizer`): theirs.
            rate (`float`): the learning rate.
        """
        if self.args.fit_normalize_gradients:
            for parameter in parameters:
                parameter.grad = F.normalize(parameter.grad, dim=-1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    def _scores_and_gradients(self, fits: list[TextFit]) -> list[tuple[float, float]] | None:
        """
        Accuracy and least probability of each text; adds the gradients of their losses to their proto-tokens. None if
        the memory does not suffice and fewer texts could be tried.
        """
        error = None
        try:
            return self.backward(fits)
        except RuntimeError as raised:
            if len(fits) == 1 or not should_reduce_batch_size(raised):
                raise
            error = raised
        # The traceback holds the tensors of the failed pass.
        error.__traceback__ = None
        for fit in fits:
            fit.e.grad = fit.m.grad = None
        clear_device_cache(garbage_collection=True)
        return None

    def backward(self, fits: list[TextFit]) -> list[tuple[float, float]]:
        """
        Adds the gradients of the texts' losses to their proto-tokens, or to what those are made of. A text's loss is
        the mean cross-entropy of its tokens.

        Args:
            fits (`list[TextFit]`)

        Returns:
            The accuracy and the least probability of a token of each text.
        """
        scores = {}
        for group in passes(fits, self.busy_tokens):
            scores |= zip(map(id, group), self._backward_pass(group), strict=True)
        return [scores[id(fit)] for fit in fits]

    def _backward_pass(self, fits: list[TextFit]) -> list[tuple[float, float]]:
        """At most MAX_FLOAT_LOGITS are alive at once."""
        states, targets = self._answer_states(fits)
        weights = torch.cat([self._token_weights(fit) for fit in fits]).to(states.device)
        rows = max(1, MAX_FLOAT_LOGITS // self.decoder.config.get_text_config().vocab_size)
        losses, correct, gradients = [], [], []
        for part, target, weight in zip(
            states.detach().split(rows), targets.split(rows), weights.split(rows), strict=True
        ):
            logits = logits_of(self.decoder, part.requires_grad_())
            loss = F.cross_entropy(logits.float(), target, reduction="none")
            gradients.append(torch.autograd.grad((loss * weight).sum(), part)[0])
            losses.append(loss.detach())
            correct.append(logits.detach().max(-1).indices == target)
        states.backward(torch.cat(gradients))

        lengths = [len(fit.text.token_ids) for fit in fits]
        accuracies = torch.stack([part.float().mean() for part in torch.cat(correct).split(lengths)])
        least = torch.stack([part.max() for part in torch.cat(losses).split(lengths)]).neg().exp()
        return [tuple(score) for score in torch.stack([accuracies, least], dim=1).tolist()]

    def _token_weights(self, fit: TextFit) -> torch.Tensor:
        length = len(fit.text.token_ids)
        growth = self.args.fit_progressive_share * self.args.fit_max_steps
        covered = length if fit.step >= growth else math.ceil(length * (fit.step + 1) / growth)
        return (torch.arange(length) < covered) / covered

    def _answer_states(self, fits: list[TextFit]) -> tuple[torch.Tensor, torch.LongTensor]:
        """The decoder's last states where it predicts the texts' tokens `(answer_tokens, dim)`, and those tokens."""
        info, device = self.info, self.decoder.device
        lengths = torch.tensor([len(fit.text.token_ids) for fit in fits], device=device)
        num_chunks = max(len(fit.e) for fit in fits)

        def stack(vectors):
            return torch.stack([F.pad(v, (0, 0) * (v.dim() - 1) + (0, num_chunks - len(v))) for v in vectors])

        # A shared m has one row for all chunks.
        m = [fit.m.expand(len(fit.e), -1) for fit in fits]
        layout = build_layout(lengths, info.arrangement, info.chunk_size, num_chunks, info.num_e_tokens)
        slots = fill_slots(layout, stack([fit.e for fit in fits]), stack(m))
        sink = sink_ids(self.decoder.config, info.sink, len(fits), device)
        inputs, predicts = joined_inputs(self.decoder, slots, layout, sink)
        self.num_positions += inputs["attention_mask"].numel()
        self.num_padding += layout.mask.numel() - layout.mask.sum().item()
        targets = torch.tensor([token for fit in fits for token in fit.text.token_ids], device=device)
        return self.body(use_cache=False, **inputs).last_hidden_state[predicts], targets

    def _seed(self, *names) -> int:
        digest = hashlib.sha256(repr((self.args.fit_seed, *names)).encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def _random(self, name: str, attempt: int, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed(name, attempt))
        return (torch.randn(*shape, generator=generator) * self.init_std).to(self.decoder.device)

    def _entry(self, fit: TextFit, accuracy: float) -> BankEntry:
        e = fit.e.detach().cpu().clone()
        m = fit.m.detach().cpu().expand(len(e), -1).clone()
        steps = fit.attempt * self.args.fit_max_steps + fit.step
        return BankEntry(fit.text.id, fit.text.token_ids, e, m, accuracy, steps)

    def _confirmed(self, fit: TextFit) -> BankEntry:
        has_margin = fit.score >= (1.0, SAFE_PROBABILITY)
        return fit.best if has_margin else replace(fit.best, accuracy=self.measure(fit.best))


def passes(fits: list[TextFit], max_tokens: int) -> Iterator[list[TextFit]]:
    """Groups texts by length, the longest first: of a group at most MAX_PADDING is padding, and two
    texts or more have at most `max_tokens`."""
    group, tokens = [], 0
    for fit in sorted(fits, key=lambda fit: -len(fit.text.token_ids)):
        tokens += len(fit.text.token_ids)
        if group and not (1 - MAX_PADDING) * (len(group) + 1) * len(group[0].text.token_ids) <= tokens <= max_tokens:
            yield group
            group, tokens = [], len(fit.text.token_ids)
        group.append(fit)
    yield group
