"""Capacity: how long a text one pair of proto-tokens can hold."""

import random
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Powers of the square root of two (Mezentsev & Oseledets, arXiv:2505.21189, section 4).
LENGTHS = (4, 5, 8, 11, 16, 22, 32, 45, 64, 90, 128, 181, 256, 362, 512, 724, 1024)
SOURCES = ("prose", "random_words")


@dataclass
class CapacityArguments:
    """What capacity is measured on."""

    capacity_texts: int = field(default=8, metadata={"help": "Texts of each length."})
    capacity_max_length: int = field(default=128, metadata={"help": "Longest length tried, in tokens."})
    capacity_threshold: float = field(default=0.99, metadata={"help": "Mean accuracy that a length must reach."})
    capacity_sources: list[str] = field(
        default_factory=lambda: list(SOURCES),
        metadata={"help": "Texts: prose (the answers), random_words (of theirs)."},
    )
    capacity_m_scopes: list[str] = field(
        default_factory=lambda: ["per_example", "shared"], metadata={"help": "Scopes of m."}
    )
    capacity_sinks: list[str] = field(default_factory=lambda: ["bos", "none"], metadata={"help": "Sinks."})


def capacity_texts(
    tokenizer: PreTrainedTokenizerBase, source: str, answers: list[str], count: int, length: int, seed: int
) -> list[list[int]]:
    """
    Token ids of texts with at least `length` tokens: the beginnings of the first answers that are long enough, or words
    drawn from all of the answers' distinct words.

    Returns:
        `count` lists of `length` ids.

    Raises:
        ValueError: if the source is unknown, or too few answers are long enough.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source of texts {source!r}; there are {', '.join(SOURCES)}.")
    if source == "random_words":
        words = sorted({word for answer in answers for word in answer.split()})
        rng = random.Random(seed)
        # A word has at least one token.
        answers = [" ".join(rng.choices(words, k=length)) for _ in range(count)]
    texts = []
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        if len(ids) >= length:
            texts.append(ids[:length])
        if len(texts) == count:
            return texts
    raise ValueError(
        f"only {len(texts)} of the texts have {length} tokens, {count} are needed: give longer ones (--data), or lower "
        "--capacity_max_length or --capacity_texts."
    )


def information_bits(decoder: PreTrainedModel, token_ids: list[int]) -> float:
    """
    The text's information under the decoder, `-sum log2 p(token | BOS, tokens before)` (`H_LM`); without a BOS the
    first token, which nothing predicts, is not counted.
    """
    bos = decoder.config.get_text_config().bos_token_id
    ids = torch.tensor([token_ids if bos is None else [bos, *token_ids]], device=decoder.device)
    with torch.no_grad():
        log_p = decoder(ids).logits[0, :-1].float().log_softmax(-1)
    return -log_p.gather(1, ids[0, 1:, None]).sum().item() / torch.log(torch.tensor(2.0)).item()


def longest_held(accuracies: dict[int, float], threshold: float) -> int:
    """`C_tokens`: the longest length in tokens whose mean accuracy reaches the threshold; 0 if none does."""
    return max((length for length, accuracy in accuracies.items() if accuracy >= threshold), default=0)
