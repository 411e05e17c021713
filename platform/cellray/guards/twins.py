"""The same cell on both sides of a split: exact and near duplicates of test cells.

Legend: N cells of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.tasks.base import Split

__all__ = ["Twins", "find_twins", "without_twins"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

_EXAMPLES = 3


@dataclass(frozen=True)
class Twins:
    """Test cells that have a twin among the cells a method learns from or is chosen by.

    Attributes:
        seen: joinids of training and validation cells that equal a test cell.
        test: joinids of the test cells they equal.
        examples: a few (training or validation cell, test cell) pairs.
        inside: validation cells that equal a training cell.
    """

    seen: I64
    test: I64
    examples: tuple[tuple[int, int], ...] = ()
    inside: int = 0


def find_twins(split: Split, joinids: I64, hashes: U64) -> Twins:
    """Cells of equal hash on both sides of a split; a hash of 0 (no counts) equals nothing.

    Args:
        split: the split.
        joinids: ascending, at least those of the split.
        hashes: of the cells of ``joinids``, e.g. :func:`cellray.data.contents.content_hashes`.
    """

    def of(part: I64) -> U64:
        return hashes[np.searchsorted(joinids, part)]

    def met(these: U64, those: U64) -> npt.NDArray[np.bool_]:
        return np.asarray(np.isin(these, those) & (these != 0))

    learnt = np.sort(np.concatenate([split.train, split.validation]))
    ours, theirs = of(learnt), of(split.test)
    seen, test = met(ours, theirs), met(theirs, ours)
    order = np.argsort(theirs, kind="stable")
    firsts = np.flatnonzero(seen)[:_EXAMPLES]
    partner = split.test[order[np.searchsorted(theirs[order], ours[firsts])]]
    return Twins(
        seen=learnt[seen],
        test=split.test[test],
        examples=tuple(zip(learnt[firsts].tolist(), partner.tolist(), strict=True)),
        inside=int(met(of(split.validation), of(split.train)).sum()),
    )


def without_twins(split: Split, twins: Twins, policy: str) -> Split:
    """The split that a policy leaves, with a warning of what was done.

    Args:
        split: the split.
        twins: of it, by the hash of all counts.
        policy: ``task.duplicates``: ``error`` refuses, ``drop_train`` takes the twins out of
            training and validation, ``allow`` keeps them. Test cells never change.

    Raises:
        DataError: there are twins and the policy is ``error``, or dropping them leaves no training
            cell.
    """
    if not len(twins.test):
        return split
    what = (
        f"{len(twins.test):,} of {len(split.test):,} test cells have the same counts as "
        f"{len(twins.seen):,} training or validation cells ({_pairs(twins.examples)})"
    )
    if policy == "error":
        raise DataError(
            f"{what}: what a model has seen would be scored. Ingest each cell once "
            "(ingest.duplicate_cells), split by a column that keeps copies together, or set "
            'task.duplicates = "drop_train" to leave the copies out of training, or "allow"'
        )
    if policy == "allow":
        kept = f'{what}: kept, because task.duplicates = "allow"; scores are too high'
        return replace(split, warnings=(*split.warnings, kept))
    train, validation = (
        part[~np.isin(part, twins.seen)] for part in (split.train, split.validation)
    )
    if not len(train):
        raise DataError(f"{what}; without them no training cell is left: change task.split")
    if len(split.validation) and not len(validation):
        raise DataError(f"{what}; without them no validation cell is left: change task.split")
    dropped = f"{what}: those are left out of training and validation (task.duplicates)"
    left_out = {**split.left_out, "copy of a test cell": len(twins.seen)}
    return replace(
        split,
        train=train,
        validation=validation,
        left_out=left_out,
        warnings=(*split.warnings, dropped),
    )


def _pairs(examples: Sequence[tuple[int, int]]) -> str:
    pairs = ", ".join(f"{ours} = {theirs}" for ours, theirs in examples)
    return f"joinids {pairs}" if pairs else "no example"
