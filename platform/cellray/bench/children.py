"""Result rows into and out of MLflow's child runs: the only way from the store into a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args

from cellray.bench.rows import ResultRow, Status, failed_rows, row_from, rows_of
from cellray.core.errors import DataError
from cellray.metrics.base import all_metrics

__all__ = ["ERROR_TAG", "ROW_TAG", "row_tag", "rows_of_child", "rows_of_children"]

ROW_TAG = "cellray.row"
ERROR_TAG = "cellray.error"
_TAG_CHARS = 8000  # MLflow's limit on a tag's value; beyond it a tag is refused or cut


def row_tag(template: ResultRow) -> str:
    """What to log as the tag ``cellray.row``: the fields that say something, as JSON.

    Args:
        template: the run's fields without metric and value. Its ``params_json`` is left out if
            the tag would grow too long: the run has the parameters, the row their digest.
    """
    said = {
        f.name: value
        for f in fields(ResultRow)
        if (value := getattr(template, f.name)) != f.default or f.name == "schema_version"
    }
    text = json.dumps(said)
    if len(text) > _TAG_CHARS:
        text = json.dumps({name: value for name, value in said.items() if name != "params_json"})
    return text


def _raw(run: Any) -> dict[str, Any]:
    try:
        raw: dict[str, Any] = json.loads(run.data.tags[ROW_TAG])
    except json.JSONDecodeError as error:
        raise DataError(
            f"run '{run.info.run_id}': its tag {ROW_TAG} is no whole JSON ({error}); it was cut or "
            "written by hand: delete the run and run this method and seed again"
        ) from error
    return raw


def rows_of_child(run: Any) -> list[ResultRow]:
    """The rows of one child: its tag ``cellray.row`` with each of its metrics that has an id.

    Args:
        run: an MLflow run with that tag; with ``cellray.error`` if it failed.

    Raises:
        DataError: the tag holds an impossible row, or no whole one.
    """
    template = row_from(_raw(run) | {"run_id": run.info.run_id})
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
        DataError: a tag holds an impossible row, or no whole one.
    """
    newest: dict[tuple[str, int | None], list[ResultRow]] = {}
    for run in runs:
        if ROW_TAG not in run.data.tags:
            continue
        raw = _raw(run)
        key = (raw["method"], raw.get("seed"))
        if key not in newest:
            newest[key] = rows_of_child(run)
    return [row for rows in newest.values() for row in rows]
