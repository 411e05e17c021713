"""One cell of a benchmark's table: kept on disk, scored, logged to MLflow, and read back.

Answers are written and hashed before the truth is opened: what is scored is what was answered.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.bench.children import ERROR_TAG, ROW_TAG, row_tag, rows_of_children
from cellray.bench.entries import Entry
from cellray.bench.rows import (
    ResultRow,
    Status,
    failed_rows,
    kept_rows,
    own_fields,
    rows_of,
    scores_of,
    seedless,
)
from cellray.bench.setting import Part, Setting
from cellray.bench.work import Answer, Outcome
from cellray.core.errors import DataError
from cellray.core.section import flatten
from cellray.guards.answers import check_predictions, near_constant
from cellray.metrics.bootstrap import MATRIX_SCORES, bootstrap_units
from cellray.metrics.refusal import score_refusal
from cellray.tasks.base import score_labels
from cellray.train.tracking import Tracker

__all__ = [
    "check_answer",
    "kept_answer",
    "kept_file",
    "log_kept",
    "read_rows",
    "record",
    "record_failure",
]

_ANSWERS = (".csv", ".npy", ".probe")  # labels, vectors, scores of a method without an embedding


def kept_file(setting: Setting, entry: Entry, seed: int) -> Path:
    """Where the result of one cell of the table is kept."""
    return setting.directory / "results" / f"{entry.name}-seed{seed}.json"


def _written(file: Path, write: Any) -> Path:
    """A file that appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    write(partial)
    os.replace(partial, file)
    return file


def _save(path: Path, vectors: npt.NDArray[Any]) -> None:
    with path.open("wb") as file:  # by name, NumPy would add a suffix
        np.save(file, vectors)


def _keep_answer(setting: Setting, entry: Entry, seed: int, answer: Answer) -> tuple[Path, str]:
    """Write what was answered; returns the file and its SHA-256."""
    file = kept_file(setting, entry, seed)
    if answer.labels is not None:
        columns: dict[str, Any] = {"joinid": answer.joinids, "predicted": answer.labels}
        if answer.confidence is not None:
            columns["confidence"] = answer.confidence
        frame = pd.DataFrame(columns)
        _written(file.with_suffix(".csv"), lambda path: frame.to_csv(path, index=False))
        file = file.with_suffix(".csv")
    elif answer.embedding is not None:
        vectors = answer.embedding
        _written(file.with_suffix(".npy"), lambda path: _save(path, vectors))
        file = file.with_suffix(".npy")
    else:
        scores = json.dumps(dict(answer.probed or {}))
        _written(file.with_suffix(".probe"), lambda path: path.write_text(scores))
        file = file.with_suffix(".probe")
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def kept_answer(setting: Setting, entry: Entry, part: Part) -> Answer | None:
    """The answer of a finished cell of the table, None if there is none.

    Raises:
        DataError: it is damaged.
    """
    file = kept_file(setting, entry, part.seed)
    try:
        return _read_answer(file, part)
    except (OSError, ValueError, KeyError) as error:  # pandas' and NumPy's among them
        raise DataError(
            f"the answers beside '{file}' are damaged: {error}; remove that file, and the same "
            "benchmark does that cell of the table again"
        ) from error


def check_answer(setting: Setting, entry: Entry, row: ResultRow) -> None:
    """Refuse answers that are not those that were scored.

    Raises:
        DataError: they are gone, or another file than the one whose hash is in the row.
    """
    assert row.seed is not None
    file = kept_file(setting, entry, row.seed)
    answers = [f for f in map(file.with_suffix, _ANSWERS) if f.is_file()]
    if row.predictions_sha256 not in [hashlib.sha256(f.read_bytes()).hexdigest() for f in answers]:
        raise DataError(
            f"the answers beside '{file}' are not those that were scored (SHA-256 "
            f"{row.predictions_sha256[:12]}); restore them, or remove that file, and the same "
            "benchmark does that cell of the table again"
        )


def _read_answer(file: Path, part: Part) -> Answer | None:
    if file.with_suffix(".csv").is_file():
        frame = pd.read_csv(
            file.with_suffix(".csv"), dtype={"predicted": str}, keep_default_na=False
        )
        confidence = frame["confidence"].to_numpy(np.float64) if "confidence" in frame else None
        return Answer(
            frame["joinid"].to_numpy(np.int64), frame["predicted"].to_numpy(object), confidence
        )
    if file.with_suffix(".npy").is_file():
        return Answer(part.asked, embedding=np.load(file.with_suffix(".npy")))
    return None


def _unit_intervals(
    setting: Setting, part: Part, answer: Answer, truth: npt.NDArray[Any]
) -> dict[str, float]:
    """Ends of the intervals over donors (or batches) of the test cells, beside their metrics."""
    draws, column = setting.run.bootstrap_draws, setting.donor_column
    if not draws or not column or answer.labels is None:
        return {}
    units = setting.column(column, answer.joinids)
    if len(set(units)) < 2:
        return {}
    ends = {}
    for name in MATRIX_SCORES:
        found = bootstrap_units(truth, answer.labels, units, name, draws=draws, seed=part.seed)
        ends[f"{name}/unit_ci95_low"] = found.ci95_low
        ends[f"{name}/unit_ci95_high"] = found.ci95_high
    return ends


def _scores(setting: Setting, part: Part, answer: Answer) -> dict[str, float]:
    """Every metric of an answer; this is where the truth is opened."""
    unit = setting.unit
    if answer.probed is not None:
        return dict(answer.probed)
    if unit.answers == "embedding":
        assert unit.score_embedding is not None
        assert answer.embedding is not None
        obs = setting.cells.obs.iloc[setting.rows(answer.joinids)].reset_index(drop=True)
        return unit.score_embedding(
            obs, setting.config, answer.embedding, setting.before, part.seed
        )
    assert answer.labels is not None
    truth = setting.truth(answer.joinids)
    obs = setting.cells.obs.iloc[setting.rows(answer.joinids)].reset_index(drop=True)
    classes = part.targets.classes
    scores = score_labels(unit, obs, setting.config, truth, answer.labels, classes)
    if answer.confidence is not None:
        scores |= score_refusal(
            truth,
            answer.labels,
            answer.confidence,
            train_classes=part.targets.classes,
            threshold=answer.cutoff,
        )
    return scores | _unit_intervals(setting, part, answer, truth)


def _constant(setting: Setting, entry: Entry, answer: Answer) -> list[str]:
    """A remark on a method that says the same of all cells."""
    given = answer.embedding if answer.labels is None else answer.labels
    if entry.kind == "baseline" and answer.labels is not None:
        return []  # the majority does so by design
    assert given is not None
    truth = None if answer.labels is None else setting.truth(answer.joinids)
    return ["near-constant: one answer for all cells"] if near_constant(given, truth) else []


def _finite(scores: Mapping[str, float]) -> tuple[dict[str, float], tuple[str, ...]]:
    """The values that are numbers, and a remark on those that are not: shown, never 0."""
    good = {name: value for name, value in scores.items() if np.isfinite(value)}
    lost = sorted(set(scores) - set(good))
    return good, ((f"not a number: {', '.join(lost)}",) if lost else ())


def record(setting: Setting, part: Part, entry: Entry, outcome: Outcome) -> list[ResultRow]:
    """Keep an answer, score it, and log both to the child run of this cell.

    Raises:
        DataError: an answer that cannot be scored: missing labels, vectors that are no numbers.
    """
    answer = outcome.answer
    remarks = list(outcome.remarks)
    if answer.probed is None:
        num = len(answer.joinids)
        check_predictions(answer.labels, answer.confidence, answer.embedding, num)
        remarks += _constant(setting, entry, answer)
    file, digest = _keep_answer(setting, entry, part.seed, answer)
    scores, lost = _finite(_scores(setting, part, answer))
    if answer.probed is None and setting.unit.headline not in scores:
        raise DataError(f"{setting.unit.headline} of '{entry.name}' is not a number")
    template = replace(
        outcome.row,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        predictions_sha256=digest,
        predictions_uri=str(file.relative_to(setting.directory.parent)),
        config_sha256=hashlib.sha256(seedless(outcome.row.params_json).encode()).hexdigest(),
        remarks=(*remarks, *lost),
    )
    child = _child(setting, entry, part.seed, outcome.child_run_id)
    if child is not None:
        template = replace(template, run_id=child.run_id)
    rows = rows_of(template, scores)
    if child is not None:
        _log(child, template, scores, outcome.params)
        child.untag(ERROR_TAG)  # of an earlier attempt that failed
        child.artifact(file, "answers")
        child.end("FINISHED")
    text = json.dumps([asdict(row) for row in rows])
    _written(kept_file(setting, entry, part.seed), lambda path: path.write_text(text))
    kept_file(setting, entry, part.seed).with_suffix(".failed").unlink(missing_ok=True)
    return rows


def record_failure(
    setting: Setting, part: Part, entry: Entry, error: str, *, status: Status = "failed"
) -> list[ResultRow]:
    """Keep and log that a cell of the table failed: it is shown as failed, never as zero."""
    template = replace(
        setting.template,
        method=entry.name,
        method_family=entry.family,
        base_method=entry.base,
        seed=part.seed,
        seed_scope="failed",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    rows = failed_rows(template, error, status=status)
    begun = setting.directory / f"{entry.name}-seed{part.seed}" / "mlflow.json"
    try:
        known = str(json.loads(begun.read_text())["run_id"]) if begun.is_file() else ""
    except (ValueError, KeyError, TypeError):  # damaged: the failure is logged to a run of its own
        known = ""
    child = _child(setting, entry, part.seed, known)
    if child is not None:
        rows = [replace(row, run_id=child.run_id) for row in rows]
        _log(child, rows[0], {}, {})
        child.tag(ERROR_TAG, error[:2000])
        child.end("FAILED")
    text = json.dumps([asdict(row) for row in rows])
    file = kept_file(setting, entry, part.seed).with_suffix(".failed")
    _written(file, lambda path: path.write_text(text))
    return rows


def log_kept(setting: Setting, entries: Sequence[Entry]) -> int:
    """Log finished cells that the parent has no child of: kept without tracking, or elsewhere.

    Returns:
        How many.
    """
    if setting.parent is None:
        return 0
    parent = Tracker(setting.parent.uri, setting.parent.run_id)
    there = {run.info.run_id for run in parent.children()}
    logged = 0
    for entry in entries:
        for seed in setting.run.seeds:
            file = kept_file(setting, entry, seed)
            rows = kept_rows(file) if file.is_file() else []
            if not rows or rows[0].run_id in there:
                continue
            child = _child(setting, entry, seed, "")
            assert child is not None
            _log(child, replace(own_fields(rows[0]), run_id=child.run_id), scores_of(rows), {})
            for suffix in _ANSWERS:
                if file.with_suffix(suffix).is_file():
                    child.artifact(file.with_suffix(suffix), "answers")
            child.end("FINISHED")
            text = json.dumps([asdict(replace(row, run_id=child.run_id)) for row in rows])
            _written(file, lambda path, text=text: path.write_text(text))
            logged += 1
    return logged


def _child(setting: Setting, entry: Entry, seed: int, run_id: str) -> Tracker | None:
    """The MLflow run of a cell of the table: the one that training made, else a new one."""
    if setting.parent is None:
        return None
    if run_id:
        return Tracker(setting.parent.uri, run_id)
    return Tracker.start(
        setting.parent.uri,
        experiment=setting.parent.experiment,
        name=f"{entry.name}-seed{seed}",
        parent=setting.parent.run_id,
    )


def _log(
    child: Tracker, template: ResultRow, scores: Mapping[str, float], params: Mapping[str, Any]
) -> None:
    child.params(flatten(params))
    child.tag("cellray.method", template.method)
    child.tag(ROW_TAG, row_tag(template))
    if scores:
        child.metrics(scores)


def read_rows(setting: Setting, entries: Sequence[Entry]) -> list[ResultRow]:
    """The long table of a data set: from the parent's children alone; kept files without tracking.

    A cell that was tried several times counts once, as it ended last.
    """
    if setting.parent is not None:
        parent = Tracker(setting.parent.uri, setting.parent.run_id)
        names = {entry.name for entry in entries}
        rows = rows_of_children(parent.children())
        return [row for row in rows if row.method in names and row.seed in setting.run.seeds]
    found: list[ResultRow] = []
    for entry in entries:
        for seed in setting.run.seeds:
            file = kept_file(setting, entry, seed)
            file = file if file.is_file() else file.with_suffix(".failed")
            if file.is_file():
                found += kept_rows(file)
    return found
