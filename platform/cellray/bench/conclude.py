"""The end of a benchmark: tables from the children, pictures, and what is logged to the parents."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cellray.bench.entries import Entry, compulsory_of, run_directory
from cellray.bench.facts import facts_of
from cellray.bench.pictures import pictures_of
from cellray.bench.record import kept_answer, read_rows
from cellray.bench.render import render_markdown, render_terminal
from cellray.bench.report import Board, page
from cellray.bench.reported import reported, reported_for
from cellray.bench.rows import TABLE_NOTES, ResultRow, to_frame
from cellray.bench.setting import Setting
from cellray.bench.table import control_scaled, leaderboard
from cellray.core.errors import CellrayError
from cellray.guards.answers import identical_methods
from cellray.train.tracking import Tracker

__all__ = ["Table", "conclude", "write_page"]


@dataclass(frozen=True)
class Table:
    """One data set's table with all that is shown beside it.

    Attributes:
        setting: the data set.
        rows: the long table, measured and reported.
        board: the leaderboard.
        text: the same for a terminal.
        pictures: title -> PNG.
        models: method -> exported model of its first seed.
        warnings: what a reader must know first.
    """

    setting: Setting
    rows: list[ResultRow]
    board: pd.DataFrame
    text: str
    pictures: Mapping[str, Path]
    models: Mapping[str, str]
    warnings: tuple[str, ...]


def _models(setting: Setting, entries: Sequence[Entry]) -> dict[str, str]:
    """Exported models of the first seed, of methods rather than their controls."""
    seed = setting.run.seeds[0]
    found = {}
    for entry in entries:
        model = run_directory(setting, entry, seed).model
        if entry.kind == "finetune" and not entry.base and model.is_dir():
            found[entry.name] = str(model)
    return found


def _unshown(setting: Setting) -> list[str]:
    """Seeds that were run and are not among those asked for now: which ones count was fixed."""
    found = (
        re.search(r"-seed(\d+)\.json$", f.name) for f in (setting.directory / "results").glob("*")
    )
    left = sorted({int(match[1]) for match in found if match} - set(setting.run.seeds))
    if not left:
        return []
    return [f"seeds {', '.join(map(str, left))} were run too and are not shown (seeds)"]


def _twins(setting: Setting, entries: Sequence[Entry]) -> list[str]:
    """Methods whose answers hardly differ (99.9 %): several names for one result."""
    answers = {}
    for entry in entries:
        answer = kept_answer(setting, entry, setting.first)
        if answer is not None and answer.labels is not None:
            answers[entry.name] = answer.labels
    groups: list[list[str]] = []
    for one, two, _ in identical_methods(answers):
        group = next((g for g in groups if one in g or two in g), None)
        if group is None:
            groups.append(group := [])
        group += [name for name in (one, two) if name not in group]
    return [f"these give nearly all test cells the same label: {', '.join(g)}" for g in groups]


def conclude(setting: Setting, entries: Sequence[Entry]) -> Table:
    """Aggregate a data set's children, draw, and log to its parent.

    Raises:
        DataError: the table may not be shown: a compulsory row is missing, or controls are out of
            order.
    """
    measured = control_scaled(read_rows(setting, entries))
    rows = measured + reported_for(setting.unit.name, setting.dataset_id)
    board = leaderboard(rows, headline=setting.unit.headline, compulsory=compulsory_of(setting))
    text = f"{setting.unit.name}, {setting.dataset_id}\n{render_terminal(board)}"
    warnings = (*setting.guards.warnings, *_unshown(setting), *_twins(setting, entries))
    _keep(setting, rows, board, warnings)
    try:
        pictures = pictures_of(setting, entries, board)
    except (CellrayError, RuntimeError, OSError, ValueError) as error:  # the table counts
        pictures, warnings = {}, (*warnings, f"pictures are missing: {error}")
    _keep_pictures(setting, pictures)
    models = _models(setting, entries)
    return Table(setting, rows, board, text, pictures, models, warnings)


def _keep(
    setting: Setting, rows: Sequence[ResultRow], board: pd.DataFrame, warnings: Sequence[str]
) -> None:
    """Write the table beside the results, and log it to the parent."""
    folder = setting.directory
    notes = {
        "headline": setting.unit.headline,
        "compulsory": compulsory_of(setting),
        "warnings": list(warnings),
    }
    (folder / TABLE_NOTES).write_text(json.dumps(notes, indent=1))
    (folder / "leaderboard.md").write_text(render_markdown(board) + "\n")
    board.to_csv(folder / "leaderboard.csv", index=False)
    if setting.parent is not None:
        tracker = Tracker(setting.parent.uri, setting.parent.run_id)
        tracker.table(to_frame(rows), "tables/results_long.json")
        tracker.table(board, "tables/leaderboard.json")
        tracker.note(render_markdown(board))
        tracker.tag("cellray.warnings", json.dumps(list(warnings)))


def _keep_pictures(setting: Setting, pictures: Mapping[str, Path]) -> None:
    """Write what each picture shows, and log all of them to the parent."""
    named = setting.directory / "report" / "pictures.json"
    named.parent.mkdir(parents=True, exist_ok=True)
    named.write_text(json.dumps({p.name: title for title, p in pictures.items()}, indent=1))
    if setting.parent is not None:
        tracker = Tracker(setting.parent.uri, setting.parent.run_id)
        for path in (*pictures.values(), named):
            tracker.artifact(path, "report")


def write_page(name: str, tables: Sequence[Table], path: Path) -> Path:
    """All tables of a benchmark as one self-contained page."""
    boards = [
        Board(
            table=table.board,
            title=f"{table.setting.unit.name}: {table.setting.dataset_id}",
            facts=facts_of([row for row in table.rows if row.provenance == "measured"]),
            pictures=table.pictures,
            warnings=table.warnings,
        )
        for table in tables
    ]
    shown = {table.setting.dataset_id for table in tables}
    tasks = {table.setting.unit.name for table in tables}
    others = [r for r in reported().rows if r.task in tasks and r.dataset_id not in shown]
    return page(path, boards, title=name, reference=others)
