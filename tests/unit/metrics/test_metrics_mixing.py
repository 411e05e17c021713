"""LISI, connectivity, principal component regression, kBET: hand cases, extremes, errors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression

from cellray.core.errors import DataError
from cellray.metrics.graphs import connectivities
from cellray.metrics.kbet import acceptance_rate, diffusion_map, kbet, kbet_by_label
from cellray.metrics.mixing import (
    clisi,
    graph_connectivity,
    ilisi,
    lisi,
    neighbour_weights,
    pcr,
    pcr_comparison,
)
from cellray.metrics.neighbours import Neighbours, nearest_neighbours


def test_weights_have_the_entropy_that_was_asked_for() -> None:
    points = np.random.default_rng(0).normal(size=(200, 5)) * np.geomspace(1e-6, 1e6, 200)[:, None]
    near = nearest_neighbours(points, 89)
    weights = neighbour_weights(near, perplexity=30)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    entropy = -np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300)), 0).sum(axis=1)
    np.testing.assert_allclose(entropy, np.log(30), atol=1e-6)
    assert (np.diff(weights, axis=1) <= 0).all()


def test_ties_beyond_the_perplexity_share_all_weight() -> None:
    distances = np.array([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    near = Neighbours(np.array([[1, 1, 1, 1], [0, 0, 0, 0]]), distances)
    weights = neighbour_weights(near, perplexity=2)
    np.testing.assert_allclose(weights, [[1 / 3, 1 / 3, 1 / 3, 0], [1 / 4] * 4], atol=1e-12)


def test_lisi_by_hand_and_scaled() -> None:
    near = Neighbours(np.array([[1, 2], [0, 2], [0, 1]]), np.ones((3, 2)))
    weights = np.array([[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]])
    found = lisi(near, weights, ["a", "b", "a"])
    np.testing.assert_allclose(found, [2.0, 1.0, 1 / (0.81 + 0.01)])
    assert ilisi(found, 2) == pytest.approx(1 / 0.82 - 1)
    assert clisi(found, 3) == pytest.approx((3 - 1 / 0.82) / 2)


def test_lisi_refuses_what_it_cannot_scale() -> None:
    near = Neighbours(np.array([[1, 2], [0, 2], [0, 1]]), np.ones((3, 2)))
    with pytest.raises(DataError, match="perplexity 2 with 2 neighbours; give 1 to fewer"):
        neighbour_weights(near, perplexity=2)
    with pytest.raises(DataError, match="they must be of the same cells"):
        lisi(near, np.ones((3, 2)) / 2, ["a", "b"])
    with pytest.raises(DataError, match="iLISI of 1 batch; it needs at least two"):
        ilisi(np.ones(3), 1)
    with pytest.raises(DataError, match="cLISI of 1 label; it needs at least two"):
        clisi(np.ones(3), 1)


def test_the_two_conventions_of_connectivity_differ() -> None:
    """a: 0 <-> 1 <- 2, one part both ways, two strongly connected; b: 3 alone; a - b is no edge."""
    graph = csr_matrix((np.ones(4), ([0, 1, 2, 3], [1, 0, 1, 0])), shape=(4, 4))
    labels = ["a", "a", "a", "b"]
    assert graph_connectivity(graph, labels, directed=False) == 1.0
    assert graph_connectivity(graph, labels, directed=True) == pytest.approx((2 / 3 + 1) / 2)
    assert graph_connectivity(graph, ["a", "b", "a", "b"], directed=False) == 0.5
    with pytest.raises(DataError, match=r"3 labels for a graph of shape \(4, 4\)"):
        graph_connectivity(graph, labels[:3], directed=True)


def test_pcr_is_the_sum_over_components_of_variance_times_r2() -> None:
    rng = np.random.default_rng(1)
    batches = rng.integers(0, 3, size=90)
    points = rng.normal(size=(90, 6)) + rng.normal(size=(3, 6))[batches]
    components = PCA().fit(points)
    coordinates, one_hot = components.transform(points), np.eye(3)[batches]
    r2 = [LinearRegression().fit(one_hot, c).score(one_hot, c) for c in coordinates.T]
    expected = np.average(r2, weights=components.explained_variance_)
    assert pcr(points, batches) == pytest.approx(expected, abs=1e-9)


def test_pcr_at_its_ends_and_its_comparison() -> None:
    batches = np.arange(20) % 2
    apart = np.stack([batches, np.zeros(20)], axis=1).astype(float)
    within = np.stack([np.arange(20) // 2, np.zeros(20)], axis=1).astype(float)
    assert pcr(apart, batches) == pytest.approx(1.0)
    assert pcr(within, batches) == pytest.approx(0.0, abs=1e-12)
    assert pcr(np.ones((20, 2)), batches) == 0.0
    assert pcr_comparison(apart, within, batches) == pytest.approx(1.0)
    assert pcr_comparison(apart + within, apart, batches) == 0.0
    with pytest.raises(DataError, match="batches explain none of the variance before"):
        pcr_comparison(np.ones((20, 2)), apart, batches)
    with pytest.raises(DataError, match="20 cells but 19 batches; give one each"):
        pcr(apart, batches[1:])


def test_acceptance_by_hand() -> None:
    """Four neighbours, halves expected: 2 + 2 gives chi-square 0, 4 + 0 gives 4 (p = 0.0455)."""
    batches = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    mixed, pure = [0, 1, 4, 5], [0, 1, 2, 3]
    assert acceptance_rate(np.array([mixed] * 6 + [pure] * 2), batches) == 6 / 8
    assert acceptance_rate(np.zeros((3, 2), dtype=int), np.zeros(3, dtype=int)) == 0.0


def test_kbet_accepts_mixed_batches_and_rejects_separate_ones() -> None:
    rng = np.random.default_rng(2)
    labels, batches = np.arange(300) % 2, rng.integers(0, 2, size=300)
    mixed = rng.normal(size=(300, 6)) + 10.0 * labels[:, None]
    apart = mixed + 4.0 * batches[:, None]
    scores = [
        kbet(connectivities(nearest_neighbours(points, 49)), labels, batches)
        for points in (mixed, apart)
    ]
    assert scores[0] > 0.85
    assert scores[1] < 0.05


def test_labels_that_kbet_cannot_judge_are_nan() -> None:
    points = np.random.default_rng(3).normal(size=(100, 4))
    graph = connectivities(nearest_neighbours(points, 49))
    labels = np.array(["few"] * 9 + ["one"] * 31 + ["fit"] * 60)
    batches = np.where(labels == "one", 0, np.arange(100) % 2)
    scores = kbet_by_label(graph, labels, batches)
    assert {name: np.isnan(score) for name, score in scores.items()} == {
        "few": True,
        "fit": False,
        "one": True,
    }
    assert kbet(graph, labels, batches) == scores["fit"]
    with pytest.raises(DataError, match="kBET can judge no label"):
        kbet(graph, labels, np.zeros(100, dtype=int))
    with pytest.raises(DataError, match="99 labels and 100 batches for a graph of 100 cells"):
        kbet(graph, labels[1:], batches)


def test_the_diffusion_map_by_both_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and Lanczos agree on all distances; on a ring, opposite cells are furthest."""
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles), 0.01 * np.cos(7 * angles)], axis=1)
    graph = connectivities(nearest_neighbours(ring, 10))

    def distances() -> np.ndarray:
        place = diffusion_map(graph, 20)
        return np.linalg.norm(place[:, None] - place[None], axis=-1)

    dense = distances()
    monkeypatch.setattr("cellray.metrics.kbet._DENSE_CELLS", 0)
    np.testing.assert_allclose(distances(), dense, rtol=1e-5, atol=1e-6 * dense.max())
    assert abs(int(dense[0].argmax()) - 100) <= 3
