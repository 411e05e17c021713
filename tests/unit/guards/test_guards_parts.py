"""Parts of a split that overlap, units on both sides, choice by the test set, dropped classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import DataError
from cellray.guards.parts import check_parts, units_on_both_sides
from cellray.tasks.base import Split, ids_sha256


def split_of(train, validation, test, unit="batch") -> Split:
    parts = [np.asarray(p, dtype=np.int64) for p in (train, validation, test)]
    return Split(*parts, split_sha256=ids_sha256(parts[2]), unit=unit)


GOOD = split_of([0, 1, 2], [3], [4, 5])


def test_a_good_split_passes():
    check_parts(GOOD)
    check_parts(split_of([0, 1], [], [2]))


@pytest.mark.parametrize(
    ("split", "told"),
    [
        (split_of([0, 1], [4], [4, 5]), "1 cells are in the validation and the test part"),
        (split_of([0, 5], [3], [4, 5]), r"1 cells are in the training and the test part .*ids 5\)"),
        (split_of([0, 3], [3], [4, 5]), "1 cells are in the training and the validation part"),
        (split_of([0, 0], [3], [4, 5]), "the training part of the split holds a cell more than"),
        (split_of([], [3], [4, 5]), "no training cell"),
        (split_of([0], [3], []), "no test cell"),
        (replace(GOOD, test=np.array([4])), "were changed after the split was made"),
    ],
)
def test_parts_that_do_not_hold_are_refused(split, told):
    with pytest.raises(DataError, match=told):
        check_parts(split)


OBS = pd.DataFrame(
    {
        "soma_joinid": np.arange(6),
        "donor_id": ["a", "a", "b", "b", "b", "c"],
        "patient": ["p"] * 6,
        "batch": ["x", "x", "x", "x", "y", "y"],
    }
)


def test_donors_on_both_sides_are_named():
    (told,) = units_on_both_sides(OBS, GOOD, ["donor_id", "patient", "subject"])
    assert told.startswith("in-distribution: 1 of 2 values of 'donor_id' in the test set are")
    assert "(b; 1 of 2 test cells), because cells are split by 'batch'" in told


def test_donors_on_one_side_are_fine():
    split = split_of([0, 1], [], [2, 3, 4])
    assert units_on_both_sides(OBS, split, ["donor_id", "patient"]) == []
