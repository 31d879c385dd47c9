"""Who holds what: `e` and `m` swapped between texts, probed, and compared with what the texts mean."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import pdist, squareform
from scipy.stats import bootstrap, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from eval_tasks.plots import bars
from eval_tasks.sentence_encoder import sentence_embeddings
from eval_tasks.statistics import mean_with_interval
from trainers.arguments import MeaningArguments
from trainers.embedded import resolve

from .errors import profile
from .reading import FittedTexts, Reconstructor, share_equal
from .study import StudyContext, StudyResult


def shared_words(a: list[int], b: list[int]) -> float:
    """Unigram F1 of two texts' tokens, whatever their order."""
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b))


def swap_rows(reader: Reconstructor, fitted: FittedTexts, seed: int = 0) -> pd.DataFrame:
    """
    Reads `e` of one text with `m` of another: every text gives its `e` once and its `m` once.

    Returns:
        `pd.DataFrame`: a row for each donor of each pair, `donor` (`e`, `m`, or `neither`: a third text, which shows
        what is shared by chance), `same_place` (share of positions with the donor's token) and `same_words` (unigram
        F1 with the donor).
    """
    order = np.random.default_rng(seed).permutation(len(fitted))
    # One step along a random circle: no text meets itself. Two steps: a text that gave neither.
    gives_m = dict(zip(order, np.roll(order, 1), strict=True))
    gives_nothing = dict(zip(order, np.roll(order, 2), strict=True))
    other = [gives_m[i] for i in range(len(fitted))]
    lengths = [min(len(fitted.token_ids[i]), len(fitted.token_ids[j])) for i, j in enumerate(other)]
    rows = []
    for i, output in enumerate(reader.read(fitted.e, fitted.m[other], lengths)):
        for donor, j in (("e", i), ("m", other[i]), ("neither", gives_nothing[i])):
            target = fitted.token_ids[j]
            row = {"text": i, "donor": donor, "same_place": share_equal(output, target)}
            rows.append(row | {"same_words": shared_words(output, target)})
    return pd.DataFrame(rows)


def probe_categories(vectors: np.ndarray, categories: list[str], seed: int = 0) -> np.ndarray:
    """
    Whether a linear probe (logistic regression on standardised vectors `(texts, dim)`, 5-fold cross-validated) gets the
    category right, weighted so that the mean over texts is the balanced accuracy; `(texts,)`.
    """
    labels = np.asarray(categories)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
    predicted = cross_val_predict(probe, vectors, labels, cv=folds)
    weight = pd.Series(labels).map(lambda label: len(labels) / ((labels == label).sum() * len(set(labels)))).to_numpy()
    return weight * (predicted == labels)


def category_metrics(vectors: dict[str, np.ndarray], categories: list[str], seed: int) -> dict[str, list[float]]:
    """The balanced accuracy of `probe_categories` from each of the vectors, and by chance."""
    # Each of the five folds needs one of each category, so rarer ones are left out.
    sizes = Counter(categories)
    common = np.array([sizes[category] >= 5 for category in categories])
    labels = np.asarray(categories)[common]
    num_common = len(set(labels))
    if num_common < 2:
        return {}
    hits = {name: probe_categories(vector[common], labels, seed) for name, vector in vectors.items()}
    accuracies = {name: mean_with_interval(hit) for name, hit in hits.items()} | {"chance": [1 / num_common] * 3}
    return {f"probe_category_balanced_accuracy_{name}": accuracy for name, accuracy in accuracies.items()}


def probe_number(vectors: np.ndarray, values: np.ndarray, seed: int = 0) -> list[float]:
    """
    R² of a linear probe (ridge on standardised vectors `(texts, dim)`, 5-fold cross-validated) of a number `(texts,)`,
    with its 95 % bootstrap interval over texts; 0 is what their mean gets.
    """
    probe = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 13)))
    predicted = cross_val_predict(probe, vectors, values, cv=KFold(5, shuffle=True, random_state=seed))
    interval = bootstrap((values, predicted), r2_score, paired=True, vectorized=False, method="percentile",
                         n_resamples=2000, rng=seed).confidence_interval  # fmt: skip
    return [float(r2_score(values, predicted)), float(interval.low), float(interval.high)]


def similarity_of_structure(a: np.ndarray, b: np.ndarray, resamples: int = 1000, seed: int = 0) -> list[float]:
    """
    Representational similarity: Spearman correlation of the two matrices of cosine distances between texts, with its
    95 % interval over texts (bootstrap; pairs of a text with its own copy are left out, and so are draws of fewer than
    three different texts, which have no correlation); NaN for so few texts.

    Args:
        a, b (`np.ndarray` of shape `(texts, dim)`; their dims may differ)

    References:
        Kriegeskorte et al., 2008, "Representational similarity analysis", Frontiers in Systems Neuroscience 2.
    """
    if len(a) < 3:
        return [float("nan")] * 3
    distance_a, distance_b = (squareform(pdist(x, "cosine")) for x in (a, b))
    rng, upper = np.random.default_rng(seed), np.triu_indices(len(a), 1)
    value = spearmanr(distance_a[upper], distance_b[upper]).statistic
    drawn = []
    for _ in range(resamples):
        rows = rng.integers(len(a), size=len(a))
        if len(np.unique(rows)) < 3:
            continue
        first, second = rows[upper[0]], rows[upper[1]]
        apart = first != second
        pairs = first[apart], second[apart]
        drawn.append(spearmanr(distance_a[pairs], distance_b[pairs]).statistic)
    return [float(value), *map(float, np.percentile(drawn, [2.5, 97.5]))]


def flat(vectors: torch.Tensor) -> np.ndarray:
    """`(texts, ...)` as `(texts, dim)`."""
    return vectors.flatten(1).numpy()


def bags_of_tokens(token_ids: list[list[int]]) -> np.ndarray:
    """TF-IDF of each text's tokens, `(texts, distinct tokens)`: what it says, whatever it means."""
    return TfidfVectorizer(analyzer=list).fit_transform(token_ids).toarray()


# Title of a panel, and what the names of its metrics begin with.
PANELS = {
    "donor's tokens, same place": "swap_same_place_",
    "donor's tokens, any place": "swap_same_words_",
    "category, linear probe": "probe_category_balanced_accuracy_",
    "similarity to meaning": "similarity_to_meaning_",
    "similarity to tokens": "similarity_to_tokens_",
}


def measure(
    reader: Reconstructor, fitted: FittedTexts, meaning: np.ndarray, title: str, folder: Path, seed: int
) -> StudyResult:
    """
    Swaps, probes and similarities of structure of `e`, `m` and both.

    Args:
        meaning (`np.ndarray` of shape `(texts, dim)`): embeddings of a sentence encoder, probed beside them.
    """
    swapped, metrics = swap_rows(reader, fitted, seed), {}
    for measure in ("same_place", "same_words"):
        for donor, part in swapped.groupby("donor", sort=False):
            metrics[f"swap_{measure}_{donor}"] = mean_with_interval(part[measure])
    vectors = {"e": flat(fitted.e), "m": flat(fitted.m)}
    vectors["both"] = np.concatenate([vectors["e"], vectors["m"]], axis=1)
    numbers = {"length": np.array([len(ids) for ids in fitted.token_ids], dtype=float)} | profile(fitted.texts)
    numbers = {name: values for name, values in numbers.items() if values.std() > 0}
    probed = {**vectors, "sentence_encoder": meaning}
    metrics |= category_metrics(probed, fitted.categories, seed)
    for name, vector in probed.items():
        for number, values in numbers.items():
            metrics[f"probe_{number}_r2_{name}"] = probe_number(vector, values, seed)
    tokens = bags_of_tokens(fitted.token_ids)
    for name, vector in vectors.items():
        metrics[f"similarity_to_meaning_{name}"] = similarity_of_structure(vector, meaning)
        metrics[f"similarity_to_tokens_{name}"] = similarity_of_structure(vector, tokens)
    panels = {
        panel: {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
        for panel, prefix in PANELS.items()
    }
    bars({panel: found for panel, found in panels.items() if found}, title, folder / "roles.png")
    return StudyResult(metrics, swapped)


Arguments = MeaningArguments


def study(context: StudyContext, args: Arguments) -> StudyResult:
    """What of a text is in `e`, and what in `m`."""
    fitted = context.fitted(context.source)
    meaning = sentence_embeddings(resolve(args.sentence_encoder), fitted.texts)
    return measure(context.reader, fitted, meaning, context.title, context.folder, context.seed)
