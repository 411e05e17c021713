"""The trials of a sweep as a table, on disk as ``trials.csv`` and ``trials.json``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cellray.tune.ledger import FAILED, Ledger
from cellray.tune.space import Space

if TYPE_CHECKING:
    from cellray.runs import TuneRun

__all__ = ["TuneResult", "best_trial", "trial_table", "write_tables"]

_ERROR_CHARS = 160


@dataclass(frozen=True)
class TuneResult:
    """What a sweep found.

    Attributes:
        best_config: TOML file that ``cellray finetune`` takes as it is.
        best_trial: its number.
        best_value: the metric of the best trial.
        metric: what trials were compared by.
        table: one row a trial: ``trial``, the searched values, the metric, ``reports``, ``state``
            (finished, stopped early, failed, not finished), ``seconds`` and ``error``.
        picture: PNG with the trials as lines over the searched keys.
        complete: whether every trial has ended, well or not.
        mlflow_run_id: the parent run, "" if tracking is off.
    """

    best_config: str
    best_trial: int
    best_value: float
    metric: str
    table: pd.DataFrame
    picture: str
    complete: bool
    mlflow_run_id: str = ""

    def lines(self) -> list[str]:
        """What the command line prints."""
        shown = self.table.drop(columns="error")
        failed = self.table[self.table["state"] == FAILED]
        told = [
            shown.to_string(index=False, na_rep="-", float_format=lambda x: f"{x:.5g}"),
            *(f"trial {r['trial']} failed: {r['error']}" for _, r in failed.iterrows()),
            f"best: trial {self.best_trial}, {self.metric} = {self.best_value:.5g}",
            f"picture: {self.picture}",
            f"next: cellray finetune {self.best_config}",
        ]
        if not self.complete:
            told.append("some trials have not finished; the same command goes on with them")
        return told


def trial_table(run: TuneRun, space: Space, ledger: Ledger, every: int) -> pd.DataFrame:
    """One row for each trial that was proposed, in the order of their numbers.

    Args:
        run: the sweep.
        space: what it searches.
        ledger: of its trials.
        every: steps between two reports.
    """
    rows = []
    for trial in ledger.known():
        noted, point = ledger.read(trial), ledger.point(trial)
        value = ledger.value(trial, run.metric, run.mode, every=every, last=run.scheduler == "pbt")
        state = ledger.state(trial)
        rows.append(
            {
                "trial": trial,
                **{key: point.get(key) for key in space},
                run.metric: value,
                "reports": len(ledger.reports(trial, every)),
                "state": state,
                "seconds": round(float(noted.get("seconds", 0.0)), 1),
                "error": str(noted.get("error", ""))[:_ERROR_CHARS] if state == FAILED else "",
            }
        )
    columns = ["trial", *space, run.metric, "reports", "state", "seconds", "error"]
    return pd.DataFrame(rows, columns=columns)


def best_trial(table: pd.DataFrame, metric: str, mode: str) -> int | None:
    """Number of the best trial that did not fail; None if none has reported."""
    scored = table[(table["state"] != FAILED) & table[metric].notna()]
    if scored.empty:
        return None
    order = scored[metric]
    return int(scored.loc[order.idxmin() if mode == "min" else order.idxmax(), "trial"])


def write_tables(
    run: TuneRun, table: pd.DataFrame, best: int | None, ledger: Ledger, every: int
) -> list[Path]:
    """Write ``trials.csv`` and ``trials.json``.

    The JSON file has what a picture of the sweep needs: ``metric``, ``mode``, ``search`` (as in the
    configuration), ``best`` and ``trials``, each with the table's columns, ``curve`` (step and
    metric of each report) and ``changes`` (of population based training).

    Returns:
        Their paths.
    """
    folder = ledger.root.parent
    trials = []
    for row in json.loads(table.to_json(orient="records")):
        number = int(row["trial"])
        curve = [
            [report.step, _number(report.metrics.get(run.metric))]
            for report in ledger.reports(number, every)
        ]
        trials.append({**row, "curve": curve, "changes": ledger.changes(number)})
    facts: dict[str, Any] = {
        "name": run.name,
        "metric": run.metric,
        "mode": run.mode,
        "algorithm": run.algorithm,
        "scheduler": run.scheduler,
        "search": run.search,
        "best": best,
        "trials": trials,
    }
    paths = [folder / "trials.csv", folder / "trials.json"]
    table.to_csv(paths[0], index=False)
    paths[1].write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return paths


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
