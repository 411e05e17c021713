"""The Ray Data source of a token stream: which window of which epoch comes next.

The source reads nothing itself. Each of its read tasks emits one row that names a window of the
epoch plan; the tokenisation actors downstream hold an open store and turn windows into tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from cellray.data.plan import Plan

__all__ = ["WINDOW_SCHEMA", "WindowSource", "as_rows", "windows"]

WINDOW_SCHEMA = pa.schema([("epoch", pa.int64()), ("first", pa.int64()), ("last", pa.int64())])


def windows(plan: Plan, first_step: int, last_step: int) -> list[tuple[int, int, int]]:
    """The windows that hold steps ``first_step .. last_step`` (exclusive), in order.

    Returns:
        (epoch, first batch, last batch exclusive) each; the first may start inside a window of
        the plan (a resumed run) and the last may end inside one.
    """
    found = []
    step = first_step
    while step < last_step:
        cursor = plan.cursor(step)
        end = (cursor.position // plan.window_batches + 1) * plan.window_batches
        end = min(end, plan.batches_per_epoch, cursor.position + last_step - step)
        found.append((cursor.epoch, cursor.position, end))
        step += end - cursor.position
    return found


def _emit(epoch: int, first: int, last: int) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        row = {"epoch": [epoch], "first": [first], "last": [last]}
        yield pa.table(row, schema=WINDOW_SCHEMA)

    return read


class WindowSource(Datasource):  # type: ignore[misc]
    """Windows of all epochs in sequence, from one step to another.

    Args:
        plan: the order of cells.
        first_step: the first global batch to deliver, counted over all epochs.
        last_step: one past the last.
    """

    def __init__(self, plan: Plan, *, first_step: int, last_step: int) -> None:
        super().__init__()
        self._windows = windows(plan, first_step, last_step)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of the window rows, not of what they lead to."""
        return 24 * len(self._windows)

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: Any = None,
    ) -> list[ReadTask]:
        """One task a window, so that windows are tokenised in parallel and delivered in order."""
        meta = BlockMetadata(num_rows=1, size_bytes=24, exec_stats=None, input_files=None)
        return [
            ReadTask(
                _emit(*window), meta, schema=WINDOW_SCHEMA, per_task_row_limit=per_task_row_limit
            )
            for window in self._windows
        ]

    @property
    def num_windows(self) -> int:
        """How many windows the source names."""
        return len(self._windows)


def as_rows(batch: pa.Table) -> list[tuple[int, int, int]]:
    """The windows of a Ray Data batch as (epoch, first, last)."""
    return [(row["epoch"], row["first"], row["last"]) for row in batch.to_pylist()]
