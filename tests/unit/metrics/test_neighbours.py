"""Exact neighbours: against brute force, with ties, duplicates and any block size."""

from __future__ import annotations

import numpy as np
import pytest

from cellray.core.errors import DataError
from cellray.metrics import neighbours as module
from cellray.metrics.neighbours import nearest_neighbours


def brute_force(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    distances = np.sqrt(((points[:, None, :] - points[None, :, :]) ** 2).sum(axis=-1))
    np.fill_diagonal(distances, np.inf)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(distances, indices, axis=1)


@pytest.mark.parametrize("block_bytes", [1, 8 * 300 * 7, 32 << 20])
def test_equals_brute_force_whatever_the_block_size(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(module, "_CANDIDATE_BYTES", block_bytes)
    points = np.random.default_rng(1).normal(size=(300, 6))
    indices, distances = brute_force(points, 20)
    found = nearest_neighbours(points, 20)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


def test_ties_go_by_index_and_duplicates_are_at_distance_zero() -> None:
    points = np.random.default_rng(2).integers(0, 3, size=(400, 3)).astype(float)
    found = nearest_neighbours(points, 30)
    indices, distances = brute_force(points, 30)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_array_equal(found.distances, distances)
    assert (found.distances[:, 0] == 0).mean() > 0.9


def test_ties_survive_an_offset_that_swallows_digits() -> None:
    """Far from the origin |x|^2 + |y|^2 - 2 x.y is noise; the answer is not."""
    points = np.random.default_rng(3).integers(0, 4, size=(200, 2)) + 2.0**26
    found = nearest_neighbours(np.concatenate([points, [[-(2.0**27), 0.0]]]), 10)
    indices, distances = brute_force(points, 10)
    np.testing.assert_array_equal(found.indices[:200], indices)
    np.testing.assert_array_equal(found.distances[:200], distances)


def test_an_outlier_costs_no_exactness() -> None:
    """Rounding errors are bounded by the cell's own norm, not by the farthest cell's."""
    points = np.random.default_rng(4).normal(size=(400, 5))
    points[7] = 1e9
    points -= points.mean(axis=0)
    found = nearest_neighbours(points, 15)
    indices, distances = brute_force(points, 15)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.distances, distances, rtol=1e-12)


def test_all_cells_the_same() -> None:
    found = nearest_neighbours(np.ones((5, 2)), 2)
    assert found.indices.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
    assert not found.distances.any()


def test_the_cell_itself_comes_first_on_request_even_among_duplicates() -> None:
    found = nearest_neighbours(np.array([[0.0], [0.0], [1.0]]), 2).with_self()
    assert found.indices.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]
    assert found.distances.tolist() == [[0, 0, 1], [0, 0, 1], [0, 1, 1]]
    assert found.first(2).indices.tolist() == [[0, 1], [1, 0], [2, 0]]


def test_the_graph_has_an_edge_to_each_neighbour() -> None:
    graph = nearest_neighbours(np.array([[0.0], [1.0], [3.0]]), 1).graph()
    assert graph.toarray().tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]


def test_errors_say_what_to_do() -> None:
    points = np.zeros((4, 2))
    with pytest.raises(DataError, match="k = 4 neighbours among 4 cells; k must be 1 to 3"):
        nearest_neighbours(points, 4)
    with pytest.raises(DataError, match=r"the embedding has shape \(4,\); give \(cells, dimen"):
        nearest_neighbours(np.zeros(4), 1)
    points[2, 1] = np.nan
    with pytest.raises(DataError, match=r"1 of 4 cells holds NaN or infinity \(first: cell 2\)"):
        nearest_neighbours(points, 1)
    with pytest.raises(DataError, match="3 neighbours of a cell are asked for, 2 were searched"):
        nearest_neighbours(np.zeros((4, 2)), 2).first(3)
