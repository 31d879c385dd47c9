"""
Quality of answers, on token ids and texts, and what a decoder thinks of a text. In scripts that are written without
spaces each character is a word, as in sacrebleu's tokenizer for Chinese.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable

import numpy as np
import regex
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF
from transformers import EvalPrediction, PreTrainedModel

from modeling_protogen.objectives import IGNORE_INDEX
from modeling_protogen.processing_protogen import ProtoGenProcessor

# With its marks.
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*")


def token_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal tokens where `labels` is not -100; both `(examples, length)`."""
    is_token = labels != IGNORE_INDEX
    return float((predictions == labels)[is_token].mean())


def accepted_length(predictions: np.ndarray, labels: np.ndarray) -> float:
    """
    Mean number of tokens before the first that differs, both `(examples, length)`: what verification would accept
    where `labels` are the teacher's answers; at most the tokens that are not -100.
    """
    agree = (predictions == labels) & (labels != IGNORE_INDEX)
    return float(np.cumprod(agree, axis=1).sum(1).mean())


def draft_metrics(draft_length: int) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    For a trainer with `num_anchors`: `top1_K`, the share of right tokens at each place of a draft, and `kept_tokens`,
    how many of a draft stand before the first wrong one, on average.
    """

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        labels = prediction.label_ids.reshape(-1, draft_length)
        drafts = prediction.predictions.reshape(-1, draft_length)
        drafts, labels = drafts[labels[:, 0] != IGNORE_INDEX], labels[labels[:, 0] != IGNORE_INDEX]
        places = range(draft_length)
        top1 = {f"top1_{k + 1}": token_accuracy(drafts[:, [k]], labels[:, [k]]) for k in places}
        return top1 | {"kept_tokens": accepted_length(drafts, labels)}

    return metrics


def share_of_equal(answer: list[int], target: list[int]) -> float:
    """Share of the target's tokens that the answer has at their places."""
    return sum(a == b for a, b in zip(answer, target, strict=False)) / len(target)


def exact_match(answers: list[str], references: list[str]) -> float:
    """Share of answers equal to their reference, outer white space aside."""
    return float(np.mean([a.strip() == r.strip() for a, r in zip(answers, references, strict=True)]))


def spaced(text: str) -> str:
    """The text with spaces around each character that is a word."""
    return UNSPACED.sub(r" \g<0> ", text)


class LettersAndDigits:
    """`rouge-score`'s own tokenizer, for all scripts: it drops all but English letters."""

    def tokenize(self, text: str) -> list[str]:
        return regex.findall(r"[\p{L}\p{M}\p{N}]+", spaced(text.lower()))


def rouge_l(answers: list[str], references: list[str]) -> np.ndarray:
    """ROUGE-L F-measures in 0..1, `(texts,)` (Lin, 2004), by the `rouge-score` package, without stemming."""
    scorer = RougeScorer(["rougeL"], tokenizer=LettersAndDigits())
    return np.array([scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)])


def bleu(answers: list[str], references: list[str]) -> np.ndarray:
    """Sentence BLEU in 0..1, `(texts,)`, smoothed as by default in `sacrebleu` (Post, 2018)."""
    metric = BLEU(effective_order=True)
    pairs = zip(map(spaced, answers), map(spaced, references), strict=True)
    return np.array([metric.sentence_score(a, [r]).score / 100 for a, r in pairs])


def chrf(answers: list[str], references: list[str]) -> np.ndarray:
    """chrF2 in 0..1, `(texts,)`, by `sacrebleu` (Popović, 2015)."""
    metric = CHRF()
    return np.array([metric.sentence_score(a, [r]).score / 100 for a, r in zip(answers, references, strict=True)])


def token_f1(answers: list[str], references: list[str]) -> np.ndarray:
    """
    F1 of the words that answer and reference share, `(texts,)`, without case, punctuation and articles (SQuAD,
    Rajpurkar et al., 2016).
    """

    def words(text):
        text = spaced(re.sub(rf"[{re.escape(string.punctuation)}]", "", text.lower()))
        return [word for word in text.split() if word not in ("a", "an", "the")]

    def f1(answer, reference):
        answer, reference = Counter(words(answer)), Counter(words(reference))
        if not answer or not reference:
            return float(answer == reference)
        return 2 * (answer & reference).total() / (answer.total() + reference.total())

    return np.array([f1(a, r) for a, r in zip(answers, references, strict=True)])


def repetition(answers: list[str], n: int = 4) -> np.ndarray:
    """Share of an answer's runs of n words that stood in it before, `(texts,)`; 0 for shorter ones."""

    def repeated(text):
        words = spaced(text).split()
        runs = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    return np.array([repeated(text) for text in answers])


def is_degenerate(answers: list[str]) -> np.ndarray:
    """Whether an answer is empty, or more than half of its runs of 4 words stood in it before, `(texts,)`."""
    return np.array([not text.strip() for text in answers]) | (repetition(answers) > 0.5)


def information_bits(decoder: PreTrainedModel, token_ids: list[int]) -> float:
    """
    The text's information under the decoder, `-sum log2 p(token | BOS, tokens before)` (`H_LM`); without a BOS the
    first token, which nothing predicts, is not counted.
    """
    bos = decoder.config.get_text_config().bos_token_id
    ids = torch.tensor([token_ids if bos is None else [bos, *token_ids]], device=decoder.device)
    with torch.no_grad():
        log_p = decoder(ids).logits[0, :-1].float().log_softmax(-1)
    return -log_p.gather(1, ids[0, 1:, None]).sum().item() / math.log(2)


def one_step_metrics(processor: ProtoGenProcessor) -> Callable[[EvalPrediction], dict[str, float]]:
    """
    `compute_metrics` for `ProtoGenTrainer`: `token_accuracy` (agreement, where labels are the teacher's answers) and
    `accepted_length` at the label's length, and `exact_match`, `rouge_l` and `length_tokens` (mean length in tokens) of
    the one-step answers at their predicted length.
    """

    def texts(ids: np.ndarray) -> list[str]:
        return processor.batch_decode([row[row != IGNORE_INDEX] for row in ids])

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        tokens, answers = prediction.predictions
        labels = prediction.label_ids
        references = texts(labels)
        return {
            "token_accuracy": token_accuracy(tokens, labels),
            "accepted_length": accepted_length(tokens, labels),
            "exact_match": exact_match(texts(answers), references),
            "rouge_l": float(rouge_l(texts(answers), references).mean()),
            "length_tokens": float((answers != IGNORE_INDEX).sum(-1).mean()),
        }

    return compute
