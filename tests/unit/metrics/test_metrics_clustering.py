"""Clustering metrics: goldens by hand, the oracle scan, isolated labels, errors."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from cellray.core.errors import DataError
from cellray.metrics.clustering import (
    RESOLUTIONS,
    agreement,
    isolated_f1,
    isolated_labels,
    kmeans_clusters,
    leiden_scan,
    score_best_clustering,
    score_kmeans,
)
from cellray.metrics.graphs import connectivities, leiden
from cellray.metrics.neighbours import Neighbours, nearest_neighbours


def islands(num_cells: int = 240, num_labels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    labels = np.arange(num_cells) % num_labels
    return rng.normal(size=(num_cells, 5)) + 20.0 * np.eye(5)[labels], labels


def test_nmi_and_ari_by_hand() -> None:
    """Labels a a b b, clusters 0 0 1 2: mutual information ln 2, entropies ln 2 and 1.5 ln 2."""
    nmi, ari = agreement(["a", "a", "b", "b"], np.array([0, 0, 1, 2]))
    assert nmi == pytest.approx(1.0 / 1.25)
    # pairs: 1 in both, 2 in labels, 1 in clusters, 6 in all
    assert ari == pytest.approx((1 - 2 * 1 / 6) / ((2 + 1) / 2 - 2 * 1 / 6))


def test_names_of_clusters_do_not_matter_and_lengths_must_agree() -> None:
    labels = ["a", "b", "c", "a", "b"]
    assert agreement(labels, np.array([7, 3, 1, 7, 3])) == pytest.approx((1.0, 1.0))
    with pytest.raises(DataError, match=r"5 labels but clusters of shape \(4,\); give one each"):
        agreement(labels, np.zeros(4, dtype=int))


def test_separate_islands_are_found_by_both_clusterings() -> None:
    points, labels = islands()
    graph = connectivities(nearest_neighbours(points, 14))
    assert score_kmeans(points, labels) == {
        "nmi.kmeans.v1": pytest.approx(1.0),
        "ari.kmeans.v1": pytest.approx(1.0),
    }
    assert score_best_clustering(leiden_scan(graph), labels) == {
        "nmi.leiden_nmi_opt.v1": pytest.approx(1.0),
        "ari.leiden_nmi_opt.v1": pytest.approx(1.0),
    }


def test_the_scan_keeps_the_best_nmi_and_reads_ari_there() -> None:
    labels = ["a", "a", "b", "b", "b", "b"]
    coarse, fine = np.zeros(6, dtype=int), np.array([0, 0, 1, 1, 2, 2])
    found = score_best_clustering(np.stack([coarse, fine, coarse]), labels)
    assert (found["nmi.leiden_nmi_opt.v1"], found["ari.leiden_nmi_opt.v1"]) == agreement(
        labels, fine
    )


def test_resolutions_are_a_tenth_to_two() -> None:
    assert RESOLUTIONS[0] == 0.1
    assert RESOLUTIONS[-1] == 2.0
    assert len(RESOLUTIONS) == 20
    with pytest.raises(DataError, match="no resolution to cluster at"):
        leiden_scan(csr_matrix((2, 2)), resolutions=[])
    with pytest.raises(DataError, match="the resolution is 0; give a number above 0"):
        leiden(csr_matrix((2, 2)), 0)


def test_leiden_repeats_and_leaves_the_random_numbers_of_python_alone() -> None:
    rng = np.random.default_rng(6)
    graph = connectivities(nearest_neighbours(rng.normal(size=(300, 4)), 14))
    random.seed(3)
    state = random.getstate()
    first = leiden(graph, 1.0, seed=9)
    assert random.getstate() == state
    np.testing.assert_array_equal(first, leiden(graph, 1.0, seed=9))


def test_weights_by_the_formula() -> None:
    """Symmetric, without a diagonal, in 0..1; 1 between a cell and its nearest."""
    points = np.random.default_rng(7).normal(size=(100, 3))
    near = nearest_neighbours(points, 14)
    graph = connectivities(near)
    assert abs(graph - graph.T).max() == 0
    assert graph.diagonal().max() == 0
    assert 0 < graph.data.min() <= graph.data.max() <= 1.0
    assert graph[np.arange(100), near.indices[:, 0]].min() == pytest.approx(1.0)
    one = Neighbours(np.array([[1], [2], [1]]), np.array([[1.0], [1.0], [1.0]]))
    # K + 1 = 2: log2(2) = 1, the nearest's weight alone; joined both ways 1 + 1 - 1
    assert connectivities(one).toarray().tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    with pytest.raises(DataError, match="at least one neighbour"):
        connectivities(near.first(0))


def test_isolated_labels_are_those_in_the_fewest_batches() -> None:
    labels = ["a", "a", "b", "c", "c", "c"]
    assert isolated_labels(labels, ["x", "y", "x", "y", "y", "y"]).tolist() == [1, 2]
    assert isolated_labels(["a", "b"], ["x", "x"]).tolist() == [0, 1]
    with pytest.raises(DataError, match="6 cell labels but 2 batches"):
        isolated_labels(labels, ["x", "y"])


def test_isolated_f1_by_hand() -> None:
    """Label b is in one batch: 2 of its 3 cells fill a cluster of 2 at the second resolution."""
    labels = ["a", "a", "a", "b", "b", "b"]
    batches = ["x", "y", "x", "x", "x", "x"]
    scan = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]])
    assert isolated_f1(scan, labels, batches) == pytest.approx(2 * 2 / (3 + 2))
    with pytest.raises(DataError, match=r"clusterings of shape \(2, 5\) for 6 cells"):
        isolated_f1(scan[:, :5], labels, batches)


def test_kmeans_of_too_few_distinct_cells_makes_no_warning() -> None:
    points = np.repeat(np.eye(2), 5, axis=0)
    assert len(np.unique(kmeans_clusters(points, 4))) == 2
    with pytest.raises(DataError, match="11 clusters of 10 cells; give 1 to 10"):
        kmeans_clusters(points, 11)
