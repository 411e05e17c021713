"""Result rows out of MLflow's child runs: the only way from the tracking store into a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, get_args

from cellray.bench.rows import ResultRow, Status, failed_rows, row_from, rows_of
from cellray.metrics.base import all_metrics

__all__ = ["rows_of_child", "rows_of_children"]

ROW_TAG = "cellray.row"
ERROR_TAG = "cellray.error"


def rows_of_child(run: Any) -> list[ResultRow]:
    """The rows of one child: its tag ``cellray.row`` with each of its metrics that has an id.

    Args:
        run: an MLflow run with that tag; with ``cellray.error`` if it failed.

    Raises:
        DataError: the tag holds an impossible row.
    """
    template = row_from(json.loads(run.data.tags[ROW_TAG]) | {"run_id": run.info.run_id})
    if ERROR_TAG in run.data.tags:
        bad = template.status in set(get_args(Status)) - {"ok", "skipped"}
        how = template.status if bad else "failed"
        return failed_rows(template, run.data.tags[ERROR_TAG], status=how)
    known = all_metrics()
    scores = {
        name: float(value)
        for name, value in run.data.metrics.items()
        if name.partition("/")[0] in known
    }
    return rows_of(template, scores)


def rows_of_children(runs: Iterable[Any]) -> list[ResultRow]:
    """The rows of children, the newest of each (method, seed).

    Args:
        runs: newest first; those without the tag (a trainer's own) are passed over.

    Raises:
        DataError: a tag holds an impossible row.
    """
    newest: dict[tuple[str, int | None], list[ResultRow]] = {}
    for run in runs:
        if ROW_TAG not in run.data.tags:
            continue
        raw = json.loads(run.data.tags[ROW_TAG])
        key = (raw["method"], raw.get("seed"))
        if key not in newest:
            newest[key] = rows_of_child(run)
    return [row for rows in newest.values() for row in rows]
