"""Neighbour vote: exact for any number of neighbours, against a count by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cellray.baselines._vote import count_votes


def by_hand(neighbours: list[int]) -> int:
    """Most votes; of those tied, the one met first."""
    votes = Counter(neighbours)
    return next(code for code in neighbours if votes[code] == max(votes.values()))


@pytest.mark.parametrize(("k", "num_classes"), [(1, 3), (2, 2), (15, 4), (15, 14), (100, 60)])
def test_votes_equal_a_count_by_hand(k: int, num_classes: int) -> None:
    labels = np.random.default_rng(k).integers(0, num_classes, (200, k))
    assert count_votes(labels)[0].tolist() == [by_hand(row) for row in labels.tolist()]


def test_a_tie_met_late_still_goes_to_the_nearest() -> None:
    """Sixty single votes first: a weight halved with every rank would round to nothing here."""
    row = [*range(2, 62), 1, 0, 0, 1]
    assert count_votes(np.array([row]))[0].tolist() == [1]
