"""Nearest neighbours against SciPy's distances: exactly, with ties, far from the origin."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from cellray.core.errors import ConfigError, DataError
from cellray.infer import neighbour_index
from cellray.infer.neighbour_index import NeighbourIndex

RNG = np.random.default_rng(0)
needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="not run: FAISS is not installed"
)


def by_scipy(cells, query, k):
    distances = cdist(query.astype(np.float64), cells.astype(np.float64))
    order = np.lexsort((np.broadcast_to(np.arange(len(cells)), distances.shape), distances))
    return np.take_along_axis(distances, order[:, :k], 1), order[:, :k]


@pytest.mark.parametrize("k", [1, 10, 300])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_exact_neighbours_agree_with_scipy(k, shift, monkeypatch):
    monkeypatch.setattr(neighbour_index, "_BLOCK_BYTES", 8 * 300 * 7)  # several blocks
    cells = (RNG.normal(size=(300, 12)) + shift).astype(np.float32)
    query = (RNG.normal(size=(40, 12)) + shift).astype(np.float32)
    distances, rows = NeighbourIndex.build(cells).search(query, k)
    expected, order = by_scipy(cells, query, k)
    np.testing.assert_allclose(distances, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(rows, order)


def test_equal_distances_come_by_row_and_copies_are_found():
    cells = np.repeat(RNG.normal(size=(5, 4)), 6, axis=0).astype(np.float32)
    distances, rows = NeighbourIndex.build(cells).search(cells[[6, 29]], 6)
    assert rows.tolist() == [[*range(6, 12)], [*range(24, 30)]]
    assert (distances == 0).all()


@needs_faiss
def test_faiss_finds_the_same(tmp_path):
    cells = RNG.normal(size=(500, 16)).astype(np.float32)
    query = RNG.normal(size=(60, 16)).astype(np.float32)
    index = NeighbourIndex.build(cells, exact_below=500)
    assert index.kind == "faiss"
    index.save(tmp_path / "index")
    expected, order = by_scipy(cells, query, 10)
    for found in (index, NeighbourIndex.load(tmp_path / "index", cells)):
        distances, rows = found.search(query, 10)
        np.testing.assert_allclose(distances, expected, rtol=1e-9)
        np.testing.assert_array_equal(rows, order)


def test_without_faiss_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    cells = RNG.normal(size=(20, 3))
    with pytest.raises(ConfigError, match=r"20 reference cells .* exact_below = 21"):
        NeighbourIndex.build(cells, exact_below=20)
    assert NeighbourIndex.build(cells, exact_below=21).kind == "exact"


def test_what_is_kept_is_read_back_or_refused(tmp_path):
    cells = RNG.normal(size=(20, 3)).astype(np.float32)
    index = NeighbourIndex.build(cells)
    index.save(tmp_path / "index")
    again = NeighbourIndex.load(tmp_path / "index", cells)
    assert again.kind == "exact"
    np.testing.assert_array_equal(again.search(cells, 3)[1], index.search(cells, 3)[1])
    with pytest.raises(DataError, match="is of 20 cells, not of 19"):
        NeighbourIndex.load(tmp_path / "index", cells[1:])
    with pytest.raises(DataError, match="no neighbour index can be read at"):
        NeighbourIndex.load(tmp_path / "none", cells)
    (tmp_path / "index" / "index.json").write_text('{"format": "x", "kind": "a", "cells": 20}')
    with pytest.raises(DataError, match="holds no index that this version reads"):
        NeighbourIndex.load(tmp_path / "index", cells)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(DataError, match=r"needs \(cells, width\) vectors; given: \(3,\)"):
        NeighbourIndex.build(np.zeros(3))
    index = NeighbourIndex.build(np.zeros((4, 2)))
    with pytest.raises(DataError, match=r"queries of shape \(1, 3\) for an index of width 2"):
        index.search(np.zeros((1, 3)), 1)
    with pytest.raises(DataError, match="k = 5 among 4 cells; k must be 1 to that"):
        index.search(np.zeros((1, 2)), 5)
