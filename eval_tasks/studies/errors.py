"""Which words of a reconstruction go wrong."""

import html
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from textblob.en.taggers import PatternTagger
from transformers import PreTrainedTokenizerBase

from eval_tasks.plots import bars, lines
from eval_tasks.statistics import mean_with_interval
from eval_tasks.text_metrics import information_bits
from modeling_protogen.processing_protogen import text_ids

from .reading import FittedTexts, Reconstructor, share_equal
from .study import NoArguments, StudyContext, StudyResult

# The closed classes of English: determiners, pronouns, prepositions, conjunctions, auxiliaries, particles (after Quirk
# et al., 1985, A Comprehensive Grammar of the English Language, 2.39 to 2.45).
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no all both half such what which whose
    i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself we us
    our ours ourselves they them their theirs themselves who whom whoever whatever whichever one ones someone somebody
    something anyone anybody anything everyone everybody everything nobody nothing none another other others
    about above across after against along among around as at before behind below beneath beside besides between beyond
    but by despite down during except for from in inside into like near of off on onto out outside over past per since
    through throughout to toward towards under until up upon via with within without than
    and or nor so yet because although though if unless while whereas when whenever where wherever whether how why
    am is are was were be been being have has had having do does did doing will would shall should can could may might
    must ought not n't there then too very more most much many few less least
    """.split()
)


def pieces(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[str]:
    """What each token adds to the text, white space included."""
    texts = ["", *(tokenizer.decode(token_ids[: end + 1]) for end in range(len(token_ids)))]
    return [after[len(before) :] for before, after in pairwise(texts)]


def split_words(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[range]:
    """The tokens of each word: a word begins where white space does, or ends."""
    added = pieces(tokenizer, token_ids)
    begins = [0]
    for place in range(1, len(added)):
        if added[place][:1].isspace() or added[place - 1][-1:].isspace():
            begins.append(place)
    return [range(a, b) for a, b in zip(begins, [*begins[1:], len(added)], strict=True)]


def word_rows(
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[list[int]],
    predicted: list[list[int]],
    frequency: Counter,
) -> pd.DataFrame:
    """
    A row for each word of each text.

    Args:
        token_ids, predicted (`list[list[int]]`): the texts and their reconstructions, of the same lengths.
        frequency (`Counter`): of token ids, in a corpus.

    Returns:
        `pd.DataFrame`: `text`, `word`, `kind` (function, content, or other for what has no letter), `position` of its
        first token, `relative_position` in 0..1, `rarest` (count of its rarest token in the corpus), `correct` (all of
        its tokens are right).
    """
    rows = []
    for number, (target, guess) in enumerate(zip(token_ids, predicted, strict=True)):
        for place in split_words(tokenizer, target):
            word = tokenizer.decode([target[i] for i in place]).strip()
            bare = word.strip(string.punctuation).lower()
            kind = "function" if bare in FUNCTION_WORDS else "content" if any(map(str.isalpha, bare)) else "other"
            rows.append(
                {
                    "text": number,
                    "word": word,
                    "kind": kind,
                    "position": place.start,
                    "relative_position": place.start / len(target),
                    "rarest": min(frequency[target[i]] for i in place),
                    "correct": all(target[i] == guess[i] for i in place),
                }
            )
    return pd.DataFrame(rows)


def coloured(tokenizer: PreTrainedTokenizerBase, target: list[int], guess: list[int]) -> str:
    """The reconstruction as HTML: wrong tokens are marked, and show the right one under the pointer."""
    parts = []
    added, wanted = pieces(tokenizer, guess), pieces(tokenizer, target)
    for token, right, piece, missed in zip(guess, target, added, wanted, strict=True):
        piece = html.escape(piece)
        if token != right:
            piece = f'<span class="wrong" title="{html.escape(missed)}">{piece}</span>'
        parts.append(piece)
    return "".join(parts)


def frequency_rank(count: int) -> int:
    """Power of ten of a count; 0 for what occurs less than ten times."""
    return int(np.log10(max(count, 1)))


def profile(texts: list[str]) -> dict[str, np.ndarray]:
    """Share `(texts,)` of each text's words that are nouns, verbs, ...; TextBlob tags them."""
    tagger = PatternTagger()
    tags = [[tag for _, tag in tagger.tag(text)] for text in texts]
    shares = {}
    for name, prefix in (
        ("nouns", "NN"),
        ("verbs", "VB"),
        ("adjectives", "JJ"),
        ("pronouns", "PRP"),
        ("numbers", "CD"),
    ):
        shares[name] = np.array([sum(tag.startswith(prefix) for tag in found) / max(1, len(found)) for found in tags])
    return shares


def measure(
    reader: Reconstructor,
    tokenizer: PreTrainedTokenizerBase,
    fitted: dict[str, FittedTexts],
    corpora: dict[str, Counter],
    title: str,
    folder: Path,
) -> StudyResult:
    """
    Right words by kind, place and frequency, and the bits a token of texts and reconstructions under the decoder.

    Args:
        fitted (`dict[str, FittedTexts]`), corpora (`dict[str, Counter]`): by source; the latter count token ids.
        title (`str`): of the plots; folder (`Path`): theirs.
    """
    metrics, rows, examples = {}, [], []
    for source, texts in fitted.items():
        read = reader.read(texts.e, texts.m, [len(ids) for ids in texts.token_ids])
        pairs = list(zip(texts.token_ids, read, strict=True))
        found = word_rows(tokenizer, texts.token_ids, read, corpora[source]).assign(source=source)
        rows.append(found)
        metrics[f"{source}_token_accuracy"] = mean_with_interval([share_equal(*pair) for pair in pairs])
        metrics[f"{source}_word_accuracy"] = mean_with_interval(found.groupby("text")["correct"].mean())
        for kind, part in found.groupby("kind"):
            by_text = part.groupby("text")["correct"].mean()
            if len(by_text) > 1:
                metrics[f"{source}_{kind}_word_accuracy"] = mean_with_interval(by_text)
        for name, ids in (("text", texts.token_ids), ("reconstruction", read)):
            bits = [information_bits(reader.decoder, text) / len(text) for text in ids]
            metrics[f"{source}_{name}_bits_a_token"] = mean_with_interval(bits)
        examples += [f"<h4>{source}</h4>", *(f"<p>{coloured(tokenizer, *pair)}</p>" for pair in pairs[:6])]
    rows = pd.concat(rows)
    rows["tenth"] = (rows["relative_position"] * 10).astype(int) / 10
    rows["frequency"] = rows["rarest"].map(frequency_rank)
    for x, label in (("tenth", "place in the text"), ("frequency", "log10 count of the word's rarest token")):
        by_text = rows.groupby(["source", x, "text"], as_index=False)["correct"].mean()
        by_text = by_text[by_text.groupby(["source", x])["text"].transform("size") > 1]
        labels = (label, "share of words right")
        lines(by_text, x, "correct", title, folder / f"errors_{x}.png", line="source", labels=labels)
    panels = {
        source: {
            kind: metrics[name]
            for kind in ("function", "content", "other")
            if (name := f"{source}_{kind}_word_accuracy") in metrics
        }
        for source in fitted
    }
    bars({source: found for source, found in panels.items() if found}, title, folder / "errors.png")
    return StudyResult(metrics, rows, "\n".join(examples))


Arguments = NoArguments


def study(context: StudyContext, _: NoArguments) -> StudyResult:
    """Which words go wrong, in the texts of one source or of several."""
    tokenizer = context.tokenizer
    corpora = {
        source: Counter(id for e in examples for id in text_ids(tokenizer, e.answer))
        for source, examples in context.sources.items()
    }
    fitted = {source: context.fitted(source) for source in context.sources}
    return measure(context.reader, tokenizer, fitted, corpora, context.title, context.folder)
