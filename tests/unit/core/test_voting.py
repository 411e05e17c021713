"""The neighbours' vote against a count by hand, ties and order included."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cellray.core import voting
from cellray.core.voting import vote


def by_hand(codes):
    """Winner and share of each row, one neighbour at a time."""
    found = []
    for row in codes.tolist():
        counts = Counter(row)
        most = max(counts.values())
        found.append((next(c for c in row if counts[c] == most), most / len(row)))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("k", [1, 2, 3, 10])
def test_majority_with_ties_to_the_nearest(k, monkeypatch):
    monkeypatch.setattr(voting, "_BLOCK_BYTES", 7 * k * k)  # several blocks
    codes = np.random.default_rng(k).integers(0, 4, (100, k))
    winners, shares = vote(codes)
    assert [winners.tolist(), shares.tolist()] == by_hand(codes)


def test_a_tie_goes_to_the_class_of_the_nearest_among_the_tied():
    winners, shares = vote(np.array([[2, 1, 1, 2], [3, 1, 1, 2], [3, 1, 2, 0]]))
    assert winners.tolist() == [2, 1, 3]
    assert shares.tolist() == [0.5, 0.5, 0.25]


def test_no_cell_has_no_winner():
    winners, shares = vote(np.zeros((0, 3), dtype=np.int64))
    assert winners.shape == shares.shape == (0,)


def test_a_tie_met_late_still_goes_to_the_nearest():
    """Sixty single votes first: a weight halved with every rank would round to nothing here."""
    assert vote(np.array([[*range(2, 62), 1, 0, 0, 1]]))[0].tolist() == [1]
