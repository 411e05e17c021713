"""Values that others reported: read from the one reviewed file, checked, and never measured."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from cellray.bench.rows import MethodFamily, ResultRow
from cellray.core.errors import DataError, did_you_mean
from cellray.metrics.base import Metric, all_metrics

__all__ = ["REPORTED_FILE", "Reported", "read_reported", "reported", "reported_for"]

REPORTED_FILE = Path(__file__).with_name("reported.toml")

_TEXT = ("doi", "table", "read", "transcription", "task", "dataset_id", "split_id")
_KEYS = {*_TEXT, "seeds", "spread", "metrics", "rows"}
_ROW_KEYS = {"method", "family", "values", "spreads"}
_SPREADS = ("sd", "ci95_half_width")
_DOI = re.compile(r"10\.\d{4,9}/\S+")


@dataclass(frozen=True)
class Reported:
    """What the file holds.

    Attributes:
        rows: one for each value.
        metrics: those that only reported values have, by id.
    """

    rows: tuple[ResultRow, ...]
    metrics: Mapping[str, Metric]


@cache
def reported() -> Reported:
    """The file that cellray ships, read once."""
    return read_reported(REPORTED_FILE)


def reported_for(task: str, dataset_id: str) -> list[ResultRow]:
    """Reported values of one data set; none for synthetic data, which nobody reported."""
    return [r for r in reported().rows if r.task == task and r.dataset_id == dataset_id]


def read_reported(path: str | Path) -> Reported:
    """Read and check a file of reported values.

    Args:
        path: laid out as ``reported.toml`` describes at its top.

    Raises:
        DataError: a key is missing or unknown, a DOI is none, a value was not read in the
            authors' own text, is out of range or given twice, or a metric is not known.
    """
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: {error}") from error
    own = _own_metrics(raw.get("metric", []), path)
    known = {**all_metrics(), **own}
    found: list[ResultRow] = []
    for place, table in enumerate(raw.get("table", []), start=1):
        where = f"{path}, table {place}"
        _check_table(table, known, where)
        for row in table["rows"]:
            found += _rows(table, row, known, where)
    if not found:
        raise DataError(f"{path}: no reported value; it needs [[table]] with rows")
    _check_once(found, path)
    return Reported(tuple(found), own)


def _own_metrics(entries: Sequence[Mapping[str, Any]], path: str | Path) -> dict[str, Metric]:
    own: dict[str, Metric] = {}
    for entry in entries:
        if set(entry) != {"id", "title", "meaning"}:
            raise DataError(f"{path}: [[metric]] has the keys id, title and meaning: {entry}")
        if entry["id"] in own or entry["id"] in all_metrics():
            raise DataError(f"{path}: the metric '{entry['id']}' is defined already; leave it out")
        own[entry["id"]] = Metric(entry["id"], entry["title"], entry["meaning"])
    return own


def _check_table(table: Mapping[str, Any], known: Mapping[str, Metric], where: str) -> None:
    odd = sorted(set(table) - _KEYS)
    if odd:
        raise DataError(f"{where}: unknown keys {', '.join(odd)}; allowed: {sorted(_KEYS)}")
    absent = [key for key in _TEXT if not isinstance(table.get(key), str) or not table[key]]
    absent += [key for key in ("metrics", "rows") if not table.get(key)]
    if absent:
        raise DataError(f"{where}: {', '.join(absent)} missing; every value says where it is from")
    if not _DOI.fullmatch(table["doi"]):
        raise DataError(f"{where}: doi = '{table['doi']}' is none; write it 10.1038/...")
    if table["transcription"] != "P":
        raise DataError(
            f"{where}: transcription = '{table['transcription']}'; only what was read in the "
            "authors' own text ('P') is shown as reported: look the values up there"
        )
    if "spread" in table and table["spread"] not in _SPREADS:
        raise DataError(f"{where}: spread = '{table['spread']}' is none of {', '.join(_SPREADS)}")
    if table["dataset_id"].startswith("synthetic/"):
        raise DataError(f"{where}: nobody reported values of synthetic data")
    for name in table["metrics"]:
        if name not in known:
            raise DataError(
                f"{where}: no metric is called '{name}'.{did_you_mean(name, known)} Define one "
                "that only the paper has under [[metric]]"
            )


def _rows(
    table: Mapping[str, Any], row: Mapping[str, Any], known: Mapping[str, Metric], where: str
) -> list[ResultRow]:
    name = row.get("method", "")
    odd = sorted(set(row) - _ROW_KEYS)
    if odd or not name:
        raise DataError(f"{where}: a row has {sorted(row)}; it needs method, family and values")
    families = get_args(MethodFamily)
    if row.get("family") not in families:
        raise DataError(f"{where}, '{name}': family is none of {', '.join(families)}")
    metrics = table["metrics"]
    kind = table.get("spread", "")
    spreads = row.get("spreads", [])
    if len(row.get("values", [])) != len(metrics) or len(spreads) != (len(metrics) if kind else 0):
        raise DataError(
            f"{where}, '{name}': {len(row.get('values', []))} values and {len(spreads)} spreads "
            f"for {len(metrics)} metrics, spread = '{kind}'"
        )
    for number in (*row["values"], *spreads):
        if not isinstance(number, float) or not 0.0 <= number <= 1.0:
            raise DataError(f"{where}, '{name}': {number} is not in 0..1")
    found = []
    for place, metric in enumerate(metrics):
        found.append(
            ResultRow(
                task=table["task"],
                dataset_id=table["dataset_id"],
                split_id=table["split_id"],
                method=name,
                method_family=row["family"],
                metric_id=metric,
                value=row["values"][place],
                higher_is_better=known[metric].higher_is_better,
                provenance="reported",
                reported_source=f"{table['doi']}, {table['table']} (read: {table['read']})",
                reported_spread=spreads[place] if kind else None,
                reported_spread_kind=kind,
                remarks=(f"mean of {table['seeds']} runs",) if table.get("seeds") else (),
            )
        )
    return found


def _check_once(rows: Sequence[ResultRow], path: str | Path) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.row_id in seen:
            raise DataError(
                f"{path}: '{row.method}' on {row.dataset_id} has {row.metric_id} twice from "
                f"{row.reported_source}"
            )
        seen.add(row.row_id)
