"""Retrieval decoding: the nearest banked proto-tokens instead of the predicted ones."""

import numpy as np
from sklearn.neighbors import NearestNeighbors


def nearest_rows(
    predicted: np.ndarray, banked: np.ndarray, k: int = 1, metric: str = "cosine"
) -> tuple[np.ndarray, np.ndarray]:
    """
    Exact search, in blocks, so that memory does not grow with the bank times the queries.

    Args:
        predicted (`np.ndarray` of shape `(queries, dim)`), banked (`np.ndarray` of shape `(bank, dim)`): a text's `e`
            and `m` side by side, from `flatten_proto_tokens`.
        metric (`str`): `cosine`, which contrastive losses learn, or `euclidean`, which regression does.

    Returns:
        Rows of the bank, nearest first, and their distances, each `(queries, k)`.

    Raises:
        ValueError: if the bank has fewer than `k` rows.
    """
    if k > len(banked):
        raise ValueError(f"the bank has {len(banked)} texts, fewer than the {k} nearest that are asked for.")
    distances, rows = NearestNeighbors(metric=metric, algorithm="brute").fit(banked).kneighbors(predicted, k)
    return rows, distances


def retrieval_ranks(predicted: np.ndarray, banked: np.ndarray, metric: str = "cosine") -> np.ndarray:
    """
    Rank, from 1, of each query's own text among the banked ones, `(queries,)`; row i of both is text i. Equally near
    ones count as before it.
    """
    rows, distances = nearest_rows(predicted, banked, len(banked), metric)
    own = distances[rows == np.arange(len(predicted))[:, None]]
    return (distances <= own[:, None]).sum(1)
