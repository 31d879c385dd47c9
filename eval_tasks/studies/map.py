"""The bank in two dimensions."""

from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples

from eval_tasks.plots import scatter
from eval_tasks.statistics import mean_with_interval

from .reading import FittedTexts
from .study import NoArguments, StudyContext, StudyResult


def measure(fitted: FittedTexts, title: str, folder: Path, seed: int) -> StudyResult:
    """`e` and `m` by PCA, and by UMAP where umap-learn is installed, coloured by category."""
    metrics, maps = {}, {}
    for name in ("e", "m"):
        vectors = getattr(fitted, name).flatten(1).numpy()
        pca = PCA(2, random_state=seed)
        maps[f"{name}, PCA"] = pca.fit_transform(vectors)
        metrics[f"{name}_variance_in_two_components"] = float(pca.explained_variance_ratio_.sum())
        if 1 < len(set(fitted.categories)) < len(fitted):
            silhouettes = silhouette_samples(vectors, fitted.categories, metric="cosine")
            metrics[f"{name}_silhouette_of_categories"] = mean_with_interval(silhouettes)
        if find_spec("umap"):
            from umap import UMAP

            maps[f"{name}, UMAP"] = UMAP(metric="cosine", random_state=seed).fit_transform(vectors)
    scatter(maps, fitted.categories, title, folder / "map.png")
    rows = pd.DataFrame({"category": fitted.categories, "text": fitted.texts})
    for name, points in maps.items():
        rows[f"{name} x"], rows[f"{name} y"] = points.T
    return StudyResult(metrics, rows)


Arguments = NoArguments


def study(context: StudyContext, _: NoArguments) -> StudyResult:
    """A map of the texts' proto-tokens."""
    return measure(context.fitted(context.source), context.title, context.folder, context.seed)
