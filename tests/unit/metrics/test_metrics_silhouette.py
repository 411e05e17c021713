"""Silhouettes: scikit-learn as a second implementation, hand cases, cells without a width."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import pairwise_distances, silhouette_samples

from cellray.core.errors import DataError
from cellray.metrics import neighbours
from cellray.metrics.silhouette import (
    asw_batch,
    asw_label,
    bras,
    isolated_asw,
    silhouette_widths,
    widths_to_all_others,
)


@pytest.mark.parametrize("block_bytes", [1, 32 << 20])
def test_equals_scikit_learn_with_classes_of_one_cell(
    block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    labels = np.append(rng.integers(0, 4, size=150), [4])
    points = rng.normal(size=(151, 7)) + labels[:, None]
    points[:20] = points[0]
    expected = silhouette_samples(points, labels)
    np.testing.assert_allclose(silhouette_widths(points, labels), expected, atol=1e-6)
    assert silhouette_widths(points, labels)[150] == 0.0


def test_widths_to_all_others_equal_the_pairs() -> None:
    rng = np.random.default_rng(1)
    points, codes = rng.normal(size=(60, 5)), rng.integers(0, 3, size=60)
    points[7] = 0.0  # no direction: at distance 1 from all
    pairs = pairwise_distances(points, metric="cosine")
    pairs[7], pairs[:, 7], pairs[7, 7] = 1.0, 1.0, 0.0
    same = codes[:, None] == codes
    inner = (pairs * same).sum(axis=1) / (same.sum(axis=1) - 1)
    outer = (pairs * ~same).sum(axis=1) / (~same).sum(axis=1)
    expected = (outer - inner) / np.maximum(inner, outer)
    np.testing.assert_allclose(widths_to_all_others(points, codes), expected, atol=1e-12)


def test_one_dimension_by_hand() -> None:
    """0 and 2 against 10: widths 1 - 2/10, 1 - 2/8, 0 for the cell that is alone."""
    widths = silhouette_widths(np.array([[0.0], [2.0], [10.0]]), ["a", "a", "b"])
    np.testing.assert_allclose(widths, [0.8, 0.75, 0.0])
    assert asw_label(widths) == pytest.approx((1.55 / 3 + 1) / 2)
    # label b is in one batch, a in two
    assert isolated_asw(widths, ["a", "a", "b"], ["x", "y", "x"]) == 0.5


def test_cells_that_are_all_the_same_have_width_zero() -> None:
    points, labels = np.full((40, 3), 0.1), np.arange(40) % 2
    assert not silhouette_widths(points, labels).any()
    batches = np.arange(40) // 2 % 2
    assert asw_batch(points, labels, batches) == 1.0
    assert bras(points, labels, batches) == 1.0


def test_batches_apart_within_labels_score_near_0_and_mixed_near_1() -> None:
    rng = np.random.default_rng(2)
    labels, batches = np.arange(400) % 2, np.arange(400) // 2 % 2
    points = rng.normal(size=(400, 4)) + 5.0
    apart = points + 100.0 * np.stack([batches == 0, batches == 1, labels, labels], axis=1)
    for score in (asw_batch, bras):
        assert score(points, labels, batches) > 0.9
        assert score(apart, labels, batches) < 0.3
    assert asw_batch(apart, labels, batches) < 0.05


def test_labels_that_cannot_be_judged_are_left_out() -> None:
    """Label b is in one batch, label c has a batch for each cell: only a counts."""
    rng = np.random.default_rng(3)
    points = rng.normal(size=(46, 3))
    labels = np.array(["a"] * 40 + ["b"] * 4 + ["c"] * 2)
    batches = np.array(["x", "y"] * 20 + ["x"] * 4 + ["x", "y"])
    for score in (asw_batch, bras):
        alone = score(points[:40], labels[:40], batches[:40])
        assert score(points, labels, batches) == pytest.approx(alone)
        with pytest.raises(DataError, match="label and batch are the same thing"):
            score(points[40:], labels[40:], batches[40:])


def test_errors_say_what_was_given() -> None:
    points = np.zeros((3, 2))
    with pytest.raises(DataError, match="all cells have one label; a silhouette needs"):
        silhouette_widths(points, ["a", "a", "a"])
    with pytest.raises(DataError, match="3 cells but 2 cell labels; give one each"):
        silhouette_widths(points, ["a", "b"])
    with pytest.raises(DataError, match="3 cells but 1 batch labels; give one each"):
        bras(points, ["a", "b", "a"], ["x"])
    with pytest.raises(DataError, match="3 widths but 2 labels"):
        isolated_asw(np.zeros(3), ["a", "b"], ["x", "y"])


def test_a_cell_far_away_does_not_blur_the_others() -> None:
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 3, size=90)
    points = rng.normal(size=(90, 4)) + labels[:, None]
    points[5] += 1e5
    expected = silhouette_samples(points, labels)
    np.testing.assert_allclose(silhouette_widths(points, labels), expected, atol=1e-6)
