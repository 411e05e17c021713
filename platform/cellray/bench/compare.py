"""``cellray compare``: tables of finished benchmarks, read from MLflow or disk, and one page.

A parent run holds one task, data set and split; its children hold the results. Benchmarks that
share all three are set side by side in one table, the others in a table each.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from cellray.bench.children import rows_of_children
from cellray.bench.facts import facts_of
from cellray.bench.render import render_across, render_terminal
from cellray.bench.report import Board, page
from cellray.bench.reported import reported, reported_for
from cellray.bench.rows import TABLE_NOTES, ResultRow, kept_rows, seedless
from cellray.bench.table import leaderboard
from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.core.jsonfile import read_table
from cellray.tasks.base import task
from cellray.train.tracking import Tracker, check_tracking

__all__ = ["compare", "merged"]

Say = Callable[[str], None]
_PAGE = "compare.html"
_SWEEP = "sweep.png"


@dataclass(frozen=True)
class Found:
    """The results of one parent run, or of one table of a run directory.

    Attributes:
        name: what a reader calls it.
        rows: measured.
        headline: the metric its table is sorted by.
        compulsory: methods without which it is not shown.
        warnings: what a reader must know first.
        folder: where its pictures may lie, besides its tracker.
        tracker: the parent run; None without tracking.
        links: run id -> address.
    """

    name: str
    rows: list[ResultRow]
    headline: str
    compulsory: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    folder: Path | None = None
    tracker: Tracker | None = None
    links: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What its table is of."""
        first = self.rows[0]
        return (
            first.task,
            first.dataset_id,
            first.split_id,
            first.dataset_sha256,
            first.split_sha256,
        )


def compare(
    sources: Sequence[str],
    say: Say,
    *,
    html: str = "",
    mlflow_uri: str = "",
    metrics: Sequence[str] | None = None,
) -> Path:
    """Print the tables of benchmarks, write them as one page, and log it to their parent runs.

    Args:
        sources: run directories, ``runs:/ID`` of parent runs, or names of experiments; directories
            of sweeps add their pictures.
        say: prints.
        html: where to write the page; by default ``compare.html`` in the first run directory,
            else in the current folder.
        mlflow_uri: tracking store of sources that are no directory.
        metrics: ids to show; by default each task's usual ones.

    Returns:
        The page.

    Raises:
        ConfigError: a source that is nothing of the three, or one that needs ``mlflow_uri``.
        DataError: a source without results, a table that may not be shown, or a metric that no
            table has.
        TrackingError: the store does not answer or has no such run.
    """
    sweeps = _sweeps(sources)
    sources = [source for source in sources if Path(source) not in sweeps.values()]
    found = [one for source in sources for one in _find(source, mlflow_uri)]
    if not found:
        raise DataError("only sweeps are given; name at least one benchmark to show them beside")
    groups: dict[tuple[str, ...], list[Found]] = {}
    for one in found:
        groups.setdefault(one.key, []).append(one)
    with tempfile.TemporaryDirectory() as scratch:
        boards = []
        for place, group in enumerate(groups.values()):
            folder = Path(scratch) / str(place)
            folder.mkdir()
            boards.append(_board(group, folder, metrics))
        _check_metrics(boards, metrics or ())
        _print(boards, say)
        named = [Path(source) for source in sources if Path(source).is_dir()]
        where = Path(html) if html else (named[0] / _PAGE if named else Path(_PAGE))
        if where.is_dir():
            raise ConfigError(
                f"'{where}' is a folder; name the page's file, e.g. '{where / _PAGE}'"
            )
        title = ", ".join(dict.fromkeys(one.name for one in found))
        shown = {str(board.table.attrs["dataset_id"]) for board in boards}
        tasks = {str(board.table.attrs["task"]) for board in boards}
        others = [r for r in reported().rows if r.task in tasks and r.dataset_id not in shown]
        where.parent.mkdir(parents=True, exist_ok=True)
        pictures = {heading: folder / _SWEEP for heading, folder in sweeps.items()}
        page(where, boards, title=title, reference=others, sweeps=pictures)
        _log(where, found, Path(scratch))
    say(f"page: {where}")
    return where


def _json(file: Path, what: str, *keys: str) -> dict[str, Any]:
    return read_table(file, *keys, what=what, cure="run the command that wrote it again")


def _sweeps(sources: Sequence[str]) -> dict[str, Path]:
    """Heading -> directory of the sources that are sweeps."""
    found = {}
    for source in map(Path, sources):
        if (source / _SWEEP).is_file() and (source / "trials.json").is_file():
            facts = _json(
                source / "trials.json",
                "list of a sweep's trials",
                "name",
                "trials",
                "metric",
                "best",
            )
            heading = f"{facts['name']}: {len(facts['trials'])} trials by {facts['metric']}"
            found[f"{heading}, best {facts['best']}"] = source
    return found


def _find(source: str, mlflow_uri: str) -> list[Found]:
    folder = Path(source)
    if folder.is_dir():
        tracked = folder / "mlflow.json"
        if tracked.is_file():
            known = _json(tracked, "note of an MLflow run", "uri", "run_id")
            return _tracked(known["uri"], known["run_id"], folder)
        inner = [f for f in sorted(folder.iterdir()) if (f / "results").is_dir()]
        if inner and not (folder / "results").is_dir():  # a benchmark: a folder a data set
            return [one for each in inner for one in _find(str(each), mlflow_uri)]
        return _kept(folder)
    if not mlflow_uri:
        raise ConfigError(
            f"'{source}' is no folder; for a run (runs:/ID) or an experiment give the tracking "
            "store: --mlflow-uri sqlite:///runs/mlflow.db"
        )
    check_tracking(mlflow_uri, make=False)
    if source.startswith("runs:/"):
        return _tracked(mlflow_uri, source.removeprefix("runs:/").strip("/"), None)
    parents = Tracker.find_parents(mlflow_uri, experiment=source, tags={"cellray.task": ""})
    return _newest(mlflow_uri, parents, None, f"experiment '{source}'")


def _tracked(uri: str, run_id: str, folder: Path | None) -> list[Found]:
    """A parent run and, if it is one of several of a benchmark, its siblings."""
    parent = Tracker(uri, run_id).run()
    benchmark = parent.data.tags.get("cellray.benchmark", "")
    parents = [parent]
    if benchmark:
        siblings = Tracker.find_parents(uri, tags={"cellray.benchmark": benchmark})
        parents += [run for run in siblings if run.info.run_id != run_id]
    return _newest(uri, parents, folder, f"run '{run_id}'")


def _newest(uri: str, parents: Sequence[Any], folder: Path | None, what: str) -> list[Found]:
    """The first of each task, data set and split, with its results, in the order of their start."""
    seen: dict[tuple[str, ...], tuple[int, Found]] = {}
    tagged: set[tuple[str, ...]] = set()
    for parent in parents:
        tags = parent.data.tags
        key = tuple(tags.get(f"cellray.{name}", "") for name in ("task", "dataset", "split"))
        if all(key) and key in tagged:
            continue
        one = _of_parent(uri, parent, folder)
        if one is not None:
            tagged.add(key)
            seen.setdefault(one.key, (parent.info.start_time, one))
    if not seen:
        raise DataError(f"{what} holds no results of a benchmark; give its parent run")
    return [one for _, one in sorted(seen.values(), key=lambda pair: pair[0])]


def _of_parent(uri: str, parent: Any, folder: Path | None) -> Found | None:
    tracker = Tracker(uri, parent.info.run_id)
    rows = rows_of_children(tracker.children())
    if not rows:
        return None
    tags = parent.data.tags
    unit = task(rows[0].task)
    compulsory = json.loads(tags.get("cellray.compulsory", json.dumps(unit.compulsory)))
    name = tags.get("cellray.benchmark") or tags.get("mlflow.runName", parent.info.run_id)
    place = parent.info.experiment_id
    links = {}
    if uri.startswith("http"):
        base = f"{uri.rstrip('/')}/#/experiments/{place}/runs"
        links = {row.run_id: f"{base}/{row.run_id}" for row in rows if row.run_id}
    return Found(
        name=name,
        rows=rows,
        headline=tags.get("cellray.headline", unit.headline),
        compulsory=tuple(compulsory),
        warnings=tuple(json.loads(tags.get("cellray.warnings", "[]"))),
        folder=folder,
        tracker=tracker,
        links=links,
    )


def _kept(folder: Path) -> list[Found]:
    """The tables of a run directory without tracking: a file for each cell that was finished."""
    rows: list[ResultRow] = []
    files = sorted((folder / "results").glob("*.json"))
    done = {file.stem for file in files}
    files += [f for f in sorted((folder / "results").glob("*.failed")) if f.stem not in done]
    for file in files:
        rows += kept_rows(file)
    if not rows:
        raise DataError(
            f"'{folder}' holds no results of a benchmark: neither mlflow.json nor results/*.json"
        )
    noted = folder / TABLE_NOTES
    notes = _json(noted, "notes of a table") if noted.is_file() else {}
    groups: dict[tuple[str, ...], Found] = {}
    for row in rows:
        unit = task(row.task)
        one = Found(
            folder.parent.name if (folder.parent / "run.json").is_file() else folder.name,
            [row],
            notes.get("headline", unit.headline),
            tuple(notes.get("compulsory", unit.compulsory)),
            tuple(notes.get("warnings", ())),
            folder=folder,
        )
        groups.setdefault(one.key, replace(one, rows=[])).rows.append(row)
    return list(groups.values())


def merged(groups: Sequence[tuple[str, Sequence[ResultRow]]]) -> list[ResultRow]:
    """Rows of several benchmarks on the same split as one table.

    A method that two of them have with the same configuration appears once, with the seeds of
    both; with another configuration it gets the benchmark's name behind its own.

    Args:
        groups: (name of the benchmark, its rows).
    """
    kept: dict[str, list[ResultRow]] = {}
    for name, rows in groups:
        by_method: dict[str, list[ResultRow]] = {}
        for row in rows:
            by_method.setdefault(row.method, []).append(row)
        renamed = {
            method: _free(method, name, kept) if _differ(kept.get(method), own) else method
            for method, own in by_method.items()
        }
        for method, own in by_method.items():
            mine = [
                replace(
                    row,
                    method=renamed[method],
                    base_method=", ".join(renamed.get(b, b) for b in row.bases),
                )
                for row in own
            ]
            there = kept.get(renamed[method], [])
            bases = dict.fromkeys(base for row in [*there, *mine] for base in row.bases)
            good = {row.seed for row in mine if row.status == "ok"}
            there = [row for row in there if row.status == "ok" or row.seed not in good]
            seeds = {row.seed for row in there}
            both = [*there, *(row for row in mine if row.seed not in seeds)]
            kept[renamed[method]] = [replace(row, base_method=", ".join(bases)) for row in both]
    return [row for rows in kept.values() for row in rows]


def _differ(there: Sequence[ResultRow] | None, own: Sequence[ResultRow]) -> bool:
    """Whether two methods of one name are not the same method."""

    def made_of(rows: Sequence[ResultRow]) -> set[tuple[str, ...]]:
        return {
            (r.method_family, r.config_sha256 or seedless(r.params_json), r.checkpoint_sha256)
            for r in rows
            if r.status == "ok"  # a run that failed does not say what it was made of
        }

    if there is None or not made_of(there) or not made_of(own):
        return False
    return made_of(there) != made_of(own)


def _free(method: str, name: str, kept: Mapping[str, object]) -> str:
    wanted, number = f"{method} [{name}]", 2
    while wanted in kept:
        wanted, number = f"{method} [{name}, {number}]", number + 1
    return wanted


def _board(group: Sequence[Found], folder: Path, metrics: Sequence[str] | None) -> Board:
    """The table of one task, data set and split, with the pictures of all its benchmarks."""
    first = group[0]
    rows = merged([(one.name, one.rows) for one in group])
    row = rows[0]
    every = [*rows, *reported_for(row.task, row.dataset_id)]
    shown = {r.metric_id for r in every if r.metric_id and r.higher_is_better is not None}
    shown |= {r.metric_id for r in every} & set(metrics or ())  # counts, if asked for
    table = leaderboard(
        every,
        headline=first.headline,
        metrics=sorted(shown),
        compulsory=tuple(dict.fromkeys(name for one in group for name in one.compulsory)),
    )
    pictures: dict[str, Path] = {}
    for place, one in enumerate(group):
        own = folder / str(place)
        own.mkdir()
        for title, path in _pictures(one, own).items():
            pictures[title if len(group) == 1 else f"{title} [{one.name}]"] = path
    split = f" ({row.split_id})" if row.split_id else ""
    return Board(
        table=table,
        title=f"{row.task}: {row.dataset_id}{split}",
        facts=facts_of(rows),
        pictures=pictures,
        warnings=tuple(dict.fromkeys(text for one in group for text in one.warnings)),
        metrics=_metrics_of(table, metrics),
        links={run: link for one in group for run, link in one.links.items()},
    )


def _metrics_of(table: pd.DataFrame, metrics: Sequence[str] | None) -> list[str] | None:
    """The metrics asked for that this table has: another task's are shown in its own tables."""
    chosen = [name for name in metrics or () if name in table.columns]
    return chosen or None


def _check_metrics(boards: Sequence[Board], metrics: Sequence[str]) -> None:
    there = dict.fromkeys(
        column.removesuffix(".sd")
        for board in boards
        for column in board.table.columns
        if column.endswith(".sd") and column != "delta.sd"
    )
    for name in metrics:
        if name not in there:
            raise DataError(
                f"no table has the metric '{name}'.{did_you_mean(name, there)} There are: "
                f"{', '.join(there)}"
            )


def _pictures(one: Found, folder: Path) -> dict[str, Path]:
    """Title -> PNG file of a parent's artifacts, or of a run directory."""
    files: list[Path] = []
    if one.tracker is not None:
        files = one.tracker.fetch("report", folder, suffixes=(".png", ".json"))
    elif one.folder is not None:
        files = [*sorted(one.folder.glob("*.png")), *sorted((one.folder / "report").glob("*"))]
    titles: dict[str, str] = {}
    for file in files:
        if file.name == "pictures.json":
            titles = _json(file, "list of pictures")
    pictures = [file for file in files if file.suffix == ".png"]
    order = list(titles)
    pictures.sort(key=lambda f: order.index(f.name) if f.name in order else len(order))
    return {titles.get(file.name, file.stem.replace("_", " ")): file for file in pictures}


def _print(boards: Sequence[Board], say: Say) -> None:
    for board in boards:
        say(board.title)
        for warning in board.warnings:
            say(f"warning: {warning}")
        say(render_terminal(board.table, metrics=board.metrics))
        say("")
    groups: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for board in boards:
        key = (str(board.table.attrs["task"]), str(board.table.attrs["headline"]))
        groups.setdefault(key, []).append(board.table)
    for (name, _), tables in groups.items():
        if len(tables) > 1:
            say(f"{name}: all data sets")
            say(render_across(tables))
            say("")


def _log(where: Path, found: Sequence[Found], scratch: Path) -> None:
    """The page as an artifact of each parent run, always under the same name."""
    copy = scratch / _PAGE
    shutil.copyfile(where, copy)
    for one in found:
        if one.tracker is not None:
            one.tracker.artifact(copy, "report")
