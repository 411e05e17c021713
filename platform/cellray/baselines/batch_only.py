"""A classifier that looks at nothing but the batch: what it scores is how far batch tells label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellray.baselines._joint import batch_names, joined
from cellray.baselines.base import BaselineConfig, BaselineUnit, CellCounts, Labelled

__all__ = ["BASELINE", "BatchOnlyConfig"]


class BatchOnlyConfig(BaselineConfig):
    """No keys beside the name."""

    name: str = "batch_only"


def _answer(
    config: BatchOnlyConfig,
    train: CellCounts,
    labels: npt.NDArray[np.int64],
    query: CellCounts,
    seed: int,
) -> Labelled:
    """The most frequent training class of the cell's batch; of all cells in a batch unseen."""
    batch_names(joined(train, query), config.name)
    assert train.batches is not None
    assert query.batches is not None
    num_batches = int(max(train.batches.max(), query.batches.max())) + 1
    table = np.zeros((num_batches, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(table, (train.batches, labels), 1)
    table[table.sum(axis=1) == 0] = np.bincount(labels, minlength=table.shape[1])
    codes, shares = table.argmax(axis=1), table.max(axis=1) / table.sum(axis=1)
    return Labelled(codes[query.batches], shares[query.batches])


BASELINE = BaselineUnit(
    name="batch_only",
    config=BatchOnlyConfig,
    seed_scope="",
    title="the most frequent class of the cell's batch: sees no gene",
    answer=_answer,
    needs_batches=True,
    family="control",
)
