"""One cell of a benchmark's table: scored, kept on disk, logged to MLflow, and read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.bench.table import ResultRow, failed_rows, rows_of
from cellray.core.section import flatten, to_dict
from cellray.metrics.classification import METRICS
from cellray.tasks.base import Split, Targets, Task
from cellray.train.prepare import Cells
from cellray.train.tracking import Tracker

if TYPE_CHECKING:
    from cellray.runs import BenchmarkRun

__all__ = ["Setting", "experiment_name", "kept_file", "record", "rows_from_children"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """The one dataset and split that all rows of a table share."""

    run: BenchmarkRun
    unit: Task
    cells: Cells
    split: Split
    targets: Targets
    template: ResultRow
    directory: Path
    tracker: Tracker | None

    @property
    def truth(self) -> npt.NDArray[Any]:
        """True labels of the test cells."""
        label = to_dict(self.run.task)["label"]
        rows = np.searchsorted(self.cells.joinids, self.split.test)
        return np.asarray(self.cells.obs[label].astype(str).to_numpy()[rows], dtype=object)


def experiment_name(run: BenchmarkRun) -> str:
    """The MLflow experiment of a benchmark: one per task unless the run names another."""
    return run.tracking.experiment or f"benchmark-{to_dict(run.task)['name']}"


def kept_file(setting: Setting, method: str, seed: int) -> Path:
    """Where the result of one cell of the table is kept."""
    return setting.directory / "results" / f"{method}-seed{seed}.json"


def _digest(values: npt.NDArray[Any]) -> str:
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()


def record(
    setting: Setting,
    template: ResultRow,
    predicted: npt.NDArray[Any] | None,
    say: Say,
    *,
    params: Mapping[str, Any],
    error: str = "",
    tracker: Tracker | None = None,
) -> None:
    """Score predictions, keep the rows, and log them to the child run of this cell."""
    template = replace(template, started_at=datetime.now(UTC).isoformat(timespec="seconds"))
    if predicted is None:
        rows = failed_rows(template, error)
    else:
        truth = setting.truth
        scores = setting.unit.score(truth, predicted, setting.targets.classes)
        template = replace(template, predictions_sha256=_digest(predicted))
        rows = rows_of(template, scores)
    if setting.tracker is not None:
        own = tracker is None
        child = tracker or Tracker.start(
            setting.tracker.uri,
            experiment=experiment_name(setting.run),
            name=f"{template.method}-seed{template.seed}",
            parent=setting.tracker.run_id,
        )
        rows = [replace(row, run_id=child.run_id) for row in rows]
        _log_child(setting, child, template, rows, predicted, params, error)
        if own:
            child.end("FAILED" if predicted is None else "FINISHED")
    file = kept_file(setting, template.method, template.seed or 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    if predicted is not None:
        frame = pd.DataFrame({"joinid": setting.split.test, "predicted": predicted})
        frame.to_csv(file.with_suffix(".csv"), index=False)
        headline = next(r for r in rows if r.metric_id == setting.unit.headline)
        title = METRICS[headline.metric_id].title if headline.metric_id in METRICS else "score"
        say(f"{template.method} seed {template.seed}: {title} {headline.value:.4f}")
        file.write_text(json.dumps([asdict(row) for row in rows]))
    else:
        say(f"{template.method} seed {template.seed}: failed: {error}")
        file.with_suffix(".failed").write_text(json.dumps([asdict(row) for row in rows]))


def _log_child(
    setting: Setting,
    child: Tracker,
    template: ResultRow,
    rows: list[ResultRow],
    predicted: npt.NDArray[Any] | None,
    params: Mapping[str, Any],
    error: str,
) -> None:
    child.params(flatten(params))
    child.tag("cellray.method", template.method)
    child.tag("cellray.row", json.dumps(asdict(template)))
    if predicted is None:
        child.tag("cellray.error", error[:2000])
        return
    child.metrics({row.metric_id: float(row.value or 0.0) for row in rows})
    frame = pd.DataFrame(
        {"joinid": setting.split.test, "truth": setting.truth, "predicted": predicted}
    )
    child.table(frame, "tables/predictions.json")


def rows_from_children(setting: Setting) -> list[ResultRow]:
    """The long table, from the parent's children alone (from kept files without tracking)."""
    rows: list[ResultRow] = []
    wanted = [
        (m, s) for m in [*setting.run.baselines, *setting.run.methods] for s in setting.run.seeds
    ]
    if setting.tracker is None:
        for method, seed in wanted:
            file = kept_file(setting, method, seed)
            file = file if file.is_file() else file.with_suffix(".failed")
            rows += [ResultRow(**row) for row in json.loads(file.read_text())]
        return rows
    newest: dict[tuple[str, int], Any] = {}
    for child in setting.tracker.children():
        if "cellray.row" in child.data.tags:
            row = json.loads(child.data.tags["cellray.row"])
            newest.setdefault((row["method"], row["seed"]), (row, child))
    for key in wanted:
        if key in newest:
            rows += _child_rows(*newest[key])
    return rows


def _child_rows(row: dict[str, Any], child: Any) -> list[ResultRow]:
    template = ResultRow(**row | {"run_id": child.info.run_id})
    if "cellray.error" in child.data.tags:
        return failed_rows(template, child.data.tags["cellray.error"])
    scores = {k: v for k, v in child.data.metrics.items() if k in METRICS}
    return rows_of(template, scores)
