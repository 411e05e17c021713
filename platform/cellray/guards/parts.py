"""The parts of a split: disjoint, not empty, and whose units are on one side only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import DataError
from cellray.tasks.base import Split, ids_sha256

__all__ = [
    "UNIT_COLUMNS",
    "check_parts",
    "units_on_both_sides",
]

I64 = npt.NDArray[np.int64]

# obs columns whose values are people or samples: better units of a split than cells
UNIT_COLUMNS = ("donor_id", "donor", "patient", "individual", "subject")
_LISTED = 8


def check_parts(split: Split) -> None:
    """Refuse a split whose parts share cells, repeat them, or are not what it says they are.

    Raises:
        DataError: says which parts and how many cells.
    """
    parts = {"training": split.train, "validation": split.validation, "test": split.test}
    for name, part in parts.items():
        if len(np.unique(part)) != len(part):
            raise DataError(f"the {name} part of the split holds a cell more than once")
    names = list(parts)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = np.intersect1d(parts[first], parts[second])
            if len(both):
                raise DataError(
                    f"{len(both)} cells are in the {first} and the {second} part of the split "
                    f"(joinids {', '.join(map(str, both[:3]))}): a method must not be chosen by or "
                    "trained on what it is scored on; make the parts disjoint"
                )
    for name in ("training", "test"):
        if not len(parts[name]):
            raise DataError(f"the split has no {name} cell; change task.split")
    if split.split_sha256 != ids_sha256(split.test):
        raise DataError(
            "split_sha256 is not that of the test cells: they were changed after the split was "
            "made; make the split anew"
        )


def units_on_both_sides(obs: pd.DataFrame, split: Split, columns: Sequence[str]) -> list[str]:
    """A warning for each column of people or samples whose values are trained on and scored.

    Args:
        obs: cells with ``soma_joinid``, ascending, and the columns.
        split: the split.
        columns: columns looked at; those that obs lacks are passed over.
    """
    rows = obs["soma_joinid"].to_numpy(dtype=np.int64)
    learnt = obs.iloc[np.searchsorted(rows, np.concatenate([split.train, split.validation]))]
    test = obs.iloc[np.searchsorted(rows, split.test)]
    found = []
    for column in (c for c in columns if c in obs):
        if obs[column].astype("string").nunique() < 2:
            continue
        ours, theirs = (set(part[column].dropna().astype(str)) for part in (learnt, test))
        both = sorted(ours & theirs)
        if both:
            cells = int(test[column].astype("string").isin(both).sum())
            found.append(
                f"in-distribution: {len(both)} of {len(theirs)} values of '{column}' in the test "
                f"set are trained on too ({', '.join(both[:_LISTED])}; {cells} of {len(test)} test "
                f"cells), because cells are split by '{split.unit}'; set task.split.column = "
                f"'{column}' to score on new ones"
            )
    return found
