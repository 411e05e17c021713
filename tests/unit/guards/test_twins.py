"""Duplicates across a split: found, refused, dropped, and fast."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cellray.core.errors import DataError
from cellray.guards.twins import find_twins, without_twins
from cellray.tasks.base import Split, ids_sha256


def split_of(train, validation, test) -> Split:
    parts = [np.asarray(p, dtype=np.int64) for p in (train, validation, test)]
    return Split(*parts, split_sha256=ids_sha256(parts[2]), unit="donor")


JOINIDS = np.arange(10, 20)
SPLIT = split_of([10, 11, 12, 13], [14, 15], [16, 17, 18, 19])


def hashes(**same: int) -> np.ndarray:
    """Distinct hashes but for the cells named ``c<joinid>``."""
    values = np.arange(1, 11, dtype=np.uint64) << np.uint64(40)
    for name, value in same.items():
        values[int(name[1:]) - 10] = value
    return values


def test_no_twin_leaves_the_split_as_it_is():
    twins = find_twins(SPLIT, JOINIDS, hashes())
    assert len(twins.seen) == len(twins.test) == twins.inside == 0
    assert without_twins(SPLIT, twins, "error") is SPLIT


def test_twins_are_found_on_both_sides_of_the_test_set_only():
    found = find_twins(SPLIT, JOINIDS, hashes(c11=5, c14=5, c18=5, c12=6, c15=6))
    assert found.seen.tolist() == [11, 14]
    assert found.test.tolist() == [18]
    assert found.examples == ((11, 18), (14, 18))
    assert found.inside == 1 + 0 + 1  # 14 equals 11, 15 equals 12


def test_cells_without_counts_are_no_twins():
    found = find_twins(SPLIT, JOINIDS, hashes(c11=0, c18=0))
    assert len(found.seen) == len(found.test) == 0


def test_they_are_refused_and_the_message_says_what_to_do():
    twins = find_twins(SPLIT, JOINIDS, hashes(c11=5, c18=5))
    with pytest.raises(
        DataError,
        match=r"1 of 4 test cells have the same counts as 1 training or validation cells \(joinids "
        r'11 = 18\).*task\.duplicates = "drop_train"',
    ):
        without_twins(SPLIT, twins, "error")


def test_dropping_takes_them_out_of_training_and_keeps_the_test_set():
    twins = find_twins(SPLIT, JOINIDS, hashes(c11=5, c14=5, c18=5))
    kept = without_twins(SPLIT, twins, "drop_train")
    assert kept.train.tolist() == [10, 12, 13]
    assert kept.validation.tolist() == [15]
    assert kept.test is SPLIT.test
    assert kept.split_sha256 == SPLIT.split_sha256
    assert kept.left_out == {"copy of a test cell": 2}
    assert "left out of training" in kept.warnings[-1]


def test_keeping_them_is_said():
    twins = find_twins(SPLIT, JOINIDS, hashes(c11=5, c18=5))
    kept = without_twins(SPLIT, twins, "allow")
    assert kept.train is SPLIT.train
    assert 'task.duplicates = "allow"; scores are too high' in kept.warnings[-1]


@pytest.mark.parametrize(("part", "cells"), [("training", range(10, 14)), ("validation", (14, 15))])
def test_a_part_of_copies_only_is_refused(part, cells):
    same = {f"c{cell}": 7 for cell in (*cells, 18)}
    twins = find_twins(SPLIT, JOINIDS, hashes(**same))
    with pytest.raises(DataError, match=f"no {part} cell is left: change task.split"):
        without_twins(SPLIT, twins, "drop_train")


def test_against_a_loop_and_in_time():
    rng = np.random.default_rng(0)
    num = 100_000
    values = rng.integers(1, 2**63, num).astype(np.uint64)
    values[rng.integers(0, num, 500)] = values[rng.integers(0, num, 500)]
    order = rng.permutation(num)
    split = split_of(
        np.sort(order[:70_000]), np.sort(order[70_000:80_000]), np.sort(order[80_000:])
    )
    started = time.perf_counter()
    found = find_twins(split, np.arange(num), values)
    assert time.perf_counter() - started < 2.0  # 0.05 s on an idle core
    learnt = set(values[order[:80_000]].tolist())
    assert found.test.tolist() == [c for c in split.test.tolist() if int(values[c]) in learnt]
    test = set(values[order[80_000:]].tolist())
    both = np.sort(order[:80_000])
    assert found.seen.tolist() == [c for c in both.tolist() if int(values[c]) in test]
    assert len(found.test) > 50
