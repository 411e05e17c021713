"""The reference index: against scikit-learn with ties, FAISS against the exact search, files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.neighbors import NearestNeighbors

from cellray.core.errors import ConfigError, DataError
from cellray.infer import neighbour_index
from cellray.infer.neighbour_index import NeighbourIndex

F32 = npt.NDArray[np.float32]

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="not run: faiss is not installed"
)


def cells(num: int, *, seed: int = 0, dimensions: int = 8) -> F32:
    return np.random.default_rng(seed).standard_normal((num, dimensions)).astype(np.float32)


def on_a_grid(num: int, *, seed: int = 0) -> F32:
    """Whole numbers of few values: ties and duplicates everywhere, squares exact."""
    return np.random.default_rng(seed).integers(0, 4, (num, 4)).astype(np.float32)


def in_full(reference: F32, query: F32, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Every distance, sorted by (distance, row), one query cell at a time."""
    distances, rows = [], []
    for cell in query.astype(np.float64):
        all_of = np.sqrt(((reference - cell) ** 2).sum(axis=1))
        order = np.argsort(all_of, kind="stable")[:k]
        distances.append(all_of[order].tolist())
        rows.append(order.tolist())
    return distances, rows


def test_exact_search_equals_scikit_learn() -> None:
    reference, query = cells(500), cells(90, seed=1)
    distances, rows = NeighbourIndex.build(reference).search(query, 12)
    other = NearestNeighbors(n_neighbors=12, algorithm="brute").fit(reference.astype(np.float64))
    theirs, their_rows = other.kneighbors(query.astype(np.float64))
    np.testing.assert_array_equal(rows, their_rows)
    np.testing.assert_allclose(distances, theirs, rtol=1e-6)


def test_ties_go_to_the_lower_row_and_distances_equal_scikit_learn() -> None:
    reference, query = on_a_grid(400), on_a_grid(60, seed=1)
    distances, rows = NeighbourIndex.build(reference).search(query, 20)
    expected, expected_rows = in_full(reference, query, 20)
    assert rows.tolist() == expected_rows
    np.testing.assert_allclose(distances, expected, atol=1e-12)
    theirs = NearestNeighbors(n_neighbors=20).fit(reference).kneighbors(query)[0]
    np.testing.assert_allclose(distances, theirs, atol=1e-6)
    assert (distances[:, 0] == 0).any()  # a query that equals a reference finds it


def test_a_query_is_answered_alike_in_any_company() -> None:
    reference, query = on_a_grid(300), on_a_grid(50, seed=2)
    index = NeighbourIndex.build(reference)
    distances, rows = index.search(query, 7)
    order = np.random.default_rng(0).permutation(50)
    np.testing.assert_array_equal(index.search(query[order], 7)[1], rows[order])
    np.testing.assert_array_equal(index.search(query[4:5], 7)[0], distances[4:5])
    assert index.search(query[:0], 7)[1].shape == (0, 7)


def test_far_from_the_origin_nothing_is_lost() -> None:
    reference, query = cells(200) + np.float32(1e4), cells(20, seed=1) + np.float32(1e4)
    assert (
        NeighbourIndex.build(reference).search(query, 5)[1].tolist()
        == in_full(reference, query, 5)[1]
    )


def test_all_reference_cells_may_be_asked_for() -> None:
    rows = NeighbourIndex.build(cells(9)).search(cells(3, seed=1), 9)[1]
    assert np.sort(rows, axis=1).tolist() == [list(range(9))] * 3


@needs_faiss
@pytest.mark.parametrize("make", [cells, on_a_grid])
def test_faiss_finds_what_the_exact_search_finds(make: object) -> None:
    reference, query = make(3000), make(200, seed=1)  # type: ignore[operator]
    index = NeighbourIndex.build(reference, exact_below=1000)
    assert index.kind == "faiss"
    distances, rows = index.search(query, 10)
    expected, expected_rows = NeighbourIndex.build(reference).search(query, 10)
    np.testing.assert_allclose(distances, expected, rtol=1e-6, atol=1e-12)
    if make is cells:  # no ties: the same rows, recall 1
        np.testing.assert_array_equal(rows, expected_rows)


@needs_faiss
def test_faiss_keeps_neighbours_far_from_the_origin() -> None:
    reference, query = cells(3000) + np.float32(300), cells(100, seed=1) + np.float32(300)
    rows = NeighbourIndex.build(reference, exact_below=1000).search(query, 10)[1]
    np.testing.assert_array_equal(rows, NeighbourIndex.build(reference).search(query, 10)[1])


def test_without_faiss_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_index.importlib.util, "find_spec", lambda name: None)
    wanted = r"120 reference cells .* pip install 'cellray\[faiss\]', or .* exact_below = 121"
    with pytest.raises(ConfigError, match=wanted):
        NeighbourIndex.build(on_a_grid(120), exact_below=100)
    assert NeighbourIndex.build(on_a_grid(120), exact_below=121).kind == "exact"


def test_a_saved_index_answers_alike(tmp_path: Path) -> None:
    index = NeighbourIndex.build(cells(80), exact_below=900)
    index.save(tmp_path / "reference")
    again = NeighbourIndex.load(tmp_path / "reference")
    assert (again.num_cells, again.exact_below, again.kind) == (80, 900, "exact")
    for ours, theirs in zip(index.search(cells(9), 4), again.search(cells(9), 4), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_index_may_leave_its_embedding_to_others(tmp_path: Path) -> None:
    index = NeighbourIndex.build(cells(80))
    index.save(tmp_path, with_embedding=False)
    assert [file.name for file in tmp_path.iterdir()] == ["index.json"]
    again = NeighbourIndex.load(tmp_path, cells(80))
    np.testing.assert_array_equal(again.search(cells(9), 4)[1], index.search(cells(9), 4)[1])
    with pytest.raises(DataError, match=r"embedding.npy is missing"):
        NeighbourIndex.load(tmp_path)
    for other in (cells(79), cells(80, seed=1)):
        with pytest.raises(DataError, match=r"made of other cells: .* shape \(80, 8\) with SHA"):
            NeighbourIndex.load(tmp_path, other)


def test_folders_that_hold_no_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no neighbour index in .*index.json, embedding.npy is mis"
    ):
        NeighbourIndex.load(tmp_path)
    NeighbourIndex.build(cells(8)).save(tmp_path)
    np.save(tmp_path / "embedding.npy", cells(7))
    with pytest.raises(DataError, match=r"other cells: .* \(8, 8\) with .* shape \(7, 8\)"):
        NeighbourIndex.load(tmp_path)
    (tmp_path / "embedding.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="cannot be read"):
        NeighbourIndex.load(tmp_path)
    NeighbourIndex.build(cells(8)).save(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(DataError, match="not of the format cellray.neighbour_index.v1"):
        NeighbourIndex.load(tmp_path)


@pytest.mark.parametrize("exact_below", [pytest.param(5, marks=needs_faiss), 1000])
def test_bad_questions_are_refused(exact_below: int) -> None:
    index = NeighbourIndex.build(cells(60), exact_below=exact_below)
    with pytest.raises(DataError, match="query embedding has 3 dimensions, the reference has 8"):
        index.search(cells(2, dimensions=3), 5)
    for k in (0, 61):
        with pytest.raises(DataError, match=f"k = {k} neighbours among 60 reference cells"):
            index.search(cells(2), k)
    with pytest.raises(DataError, match="the query embedding of 1 of 1 cells holds NaN"):
        index.search(np.full((1, 8), np.nan), 2)
    with pytest.raises(DataError, match=r"the reference embedding has shape \(4,\)"):
        NeighbourIndex.build(np.zeros(4))
