"""Retrieval against a slow search by the definition."""

import numpy as np
import pytest
import torch
from conftest import CONTEXTS, INSTRUCTIONS

from eval_tasks.retrieval import nearest_rows, retrieval_ranks


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return rng.normal(size=(30, 7)), rng.normal(size=(40, 7))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_nearest_are_those_of_the_definition(vectors, metric):
    predicted, banked = vectors
    rows, distances = nearest_rows(predicted, banked, 3, metric)
    for query, found, distance in zip(predicted, rows, distances, strict=True):
        if metric == "cosine":
            all_distances = 1 - banked @ query / np.linalg.norm(banked, axis=1) / np.linalg.norm(query)
        else:
            all_distances = np.linalg.norm(banked - query, axis=1)
        assert found.tolist() == all_distances.argsort()[:3].tolist()
        np.testing.assert_allclose(distance, np.sort(all_distances)[:3])


def test_ranks(vectors):
    predicted, banked = vectors[0], vectors[0] + 0.01
    assert retrieval_ranks(predicted, banked).tolist() == [1] * 30
    other = np.roll(vectors[0], 1, axis=0)
    ranks = retrieval_ranks(other, vectors[0])
    for row in range(30):
        nearest, _ = nearest_rows(other[row : row + 1], vectors[0], 30)
        assert nearest[0][ranks[row] - 1] == row
    # Where all texts have one vector, none is found.
    assert retrieval_ranks(predicted, np.ones((30, 7))).tolist() == [30] * 30


def test_too_small_a_bank_is_an_error(vectors):
    with pytest.raises(ValueError, match="the bank has 40 texts, fewer than the 41"):
        nearest_rows(*vectors, k=41)


def test_writing_from_given_proto_tokens(build, llama_dir):
    model, processor = build(llama_dir)
    batch = processor(INSTRUCTIONS, CONTEXTS)
    predicted = model.predict(**batch)
    turned = [vectors[[1, 2, 0]] for vectors in (predicted.e, predicted.m)]
    output = model.generate(**batch, proto_tokens=turned, length=5)
    others = processor([INSTRUCTIONS[row] for row in (1, 2, 0)], [CONTEXTS[row] for row in (1, 2, 0)])
    assert torch.equal(output, model.generate(**others, length=5))
    assert not torch.equal(output, model.generate(**batch, length=5))
