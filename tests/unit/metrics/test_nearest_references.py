"""Nearest reference cells of query cells, exactly, against sorting every distance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.spatial.distance import cdist

from cellray.core.errors import DataError
from cellray.metrics import neighbours
from cellray.metrics.neighbours import nearest_neighbours, nearest_references

F64 = npt.NDArray[np.float64]


def sorted_out(reference: F64, query: F64, k: int) -> list[list[int]]:
    distances = cdist(query, reference)
    return np.argsort(distances, axis=1, kind="stable")[:, :k].tolist()


def grid(num: int, seed: int) -> F64:
    """Whole numbers of few values: many ties and duplicates."""
    return np.random.default_rng(seed).integers(0, 3, (num, 3)).astype(np.float64)


@pytest.mark.parametrize("k", [1, 7, 90])
@pytest.mark.parametrize("block", [1, 4096, 32 << 20])
def test_rows_equal_a_sort_of_all_distances_with_ties(
    k: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block)
    reference, query = grid(90, 0), grid(40, 1)
    found = nearest_references(reference, query, k)
    assert found.indices.tolist() == sorted_out(reference, query, k)
    expected = np.sort(cdist(query, reference), axis=1)[:, :k]
    np.testing.assert_allclose(found.distances, expected, atol=1e-12)


def test_a_reference_asked_about_itself_finds_itself_and_then_its_neighbours() -> None:
    points = np.random.default_rng(0).standard_normal((60, 5))
    found = nearest_references(points, points, 6)
    others = nearest_neighbours(points, 5).with_self()
    np.testing.assert_array_equal(found.indices, others.indices)
    np.testing.assert_array_equal(found.distances, others.distances)


def test_a_far_query_and_a_far_reference_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    reference, query = rng.standard_normal((80, 4)), rng.standard_normal((9, 4))
    reference[3] += 1e7
    query[2] -= 1e7
    assert nearest_references(reference, query, 5).indices.tolist() == sorted_out(
        reference, query, 5
    )


def test_errors_say_what_to_do() -> None:
    with pytest.raises(
        DataError, match="query embedding has 3 dimensions, the reference has 2; em"
    ):
        nearest_references(np.zeros((4, 2)), np.zeros((1, 3)), 1)
    for k in (0, 5):
        with pytest.raises(DataError, match=f"k = {k} neighbours among 4 reference cells; k must"):
            nearest_references(np.zeros((4, 2)), np.zeros((1, 2)), k)
    with pytest.raises(DataError, match="the query embedding of 1 of 1 cells holds NaN"):
        nearest_references(np.zeros((4, 2)), np.full((1, 2), np.nan), 1)
