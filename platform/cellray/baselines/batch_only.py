"""Control of confounding: the most frequent training class of a cell's batch, counts unseen.

If it scores above ``majority``, the batch tells of the label, and a method may win by knowing the
batch. Cells of a batch without training cells get the majority class of all.

Legend: N training cells, Q query cells, B batches, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellray.baselines.base import BaselineConfig, BaselineUnit, CellCounts, Labelled

__all__ = ["BASELINE", "BatchOnlyConfig"]

I64 = npt.NDArray[np.int64]


class BatchOnlyConfig(BaselineConfig):
    """No keys beside the name."""

    name: str = "batch_only"


def _label(
    config: BatchOnlyConfig, train: CellCounts, labels: I64, query: CellCounts, seed: int
) -> Labelled:
    assert train.batches is not None
    assert query.batches is not None
    num_batches = int(max(train.batches.max(), query.batches.max())) + 1
    table = np.zeros((num_batches, int(labels.max()) + 1), dtype=np.int64)  # (B, C) cells
    np.add.at(table, (train.batches, labels), 1)
    table[table.sum(axis=1) == 0] = np.bincount(labels)
    codes = table.argmax(axis=1).astype(np.int64)
    shares = table.max(axis=1) / table.sum(axis=1)
    return Labelled(codes[query.batches], shares[query.batches])


BASELINE = BaselineUnit(
    name="batch_only",
    config=BatchOnlyConfig,
    label=_label,
    family="control",
    needs_batches=True,
    seed_scope="",
    title="control of confounding: the most frequent class of the cell's batch",
)
