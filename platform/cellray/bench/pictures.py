"""What a benchmark shows beside its tables: confusion matrices, coverage curves, UMAP pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.bench.entries import Entry
from cellray.bench.record import kept_answer
from cellray.bench.report import plot_confusion
from cellray.bench.setting import Setting
from cellray.bench.umap import plot_umap, umap_embedding
from cellray.bench.work import answering_model, tokens_of
from cellray.infer.embed import embed_cells
from cellray.infer.pictures import plot_curves
from cellray.metrics.refusal import coverage_curve
from cellray.tasks.base import Split

__all__ = ["pictures_of", "split_names"]

F32 = npt.NDArray[np.float32]
_MOST_CELLS = 20_000  # a picture does not gain by more, and UMAP's time does not fit a demo's
_MOST_PICTURES = 16
_MOST_CLASSES = 60  # of a confusion matrix that can be read
_SHOWN = ("foundation_ft", "foundation_zs", "baseline", "control")


def split_names(cells: npt.NDArray[np.int64], split: Split) -> npt.NDArray[Any]:
    """``training``, ``validation`` or ``test`` for each joinid."""
    names = np.full(len(cells), "training", dtype=object)
    names[np.isin(cells, split.validation)] = "validation"
    names[np.isin(cells, split.test)] = "test"
    return names


def _ranked(board: pd.DataFrame, entries: Sequence[Entry], families: Sequence[str]) -> list[Entry]:
    """Entries of these families that have results, best first."""
    good = board[(board["provenance"] != "reported") & (board["n_seeds"] > 0)]
    by_name = {entry.name: entry for entry in entries}
    found = [by_name[name] for name in good["method"] if name in by_name]
    return [entry for entry in found if entry.family in families]


def _confusions(setting: Setting, shown: Sequence[Entry], folder: Path) -> dict[str, Path]:
    """The confusion matrix of each entry's first seed."""
    found = {}
    for entry in shown[:_MOST_PICTURES]:
        answer = kept_answer(setting, entry, setting.first)
        if answer is None or answer.labels is None:
            continue
        truth = setting.truth(answer.joinids)
        if len(set(truth) | set(answer.labels)) > _MOST_CLASSES:
            continue
        title = f"{entry.name}, seed {setting.first.seed}"
        found[f"Confusion matrix: {title}"] = plot_confusion(
            truth,
            answer.labels,
            path=folder / f"confusion_{entry.name}.png",
            title=f"{title}: test cells of {setting.name}",
        )
    return found


def _coverage(setting: Setting, shown: Sequence[Entry], folder: Path) -> dict[str, Path]:
    """Accuracy against coverage of every entry that says how sure it is, in one picture."""
    curves = {}
    for entry in shown[:_MOST_PICTURES]:
        answer = kept_answer(setting, entry, setting.first)
        if answer is not None and answer.labels is not None and answer.confidence is not None:
            truth = setting.truth(answer.joinids)
            curves[entry.name] = coverage_curve(truth, answer.labels, answer.confidence)
    if not curves:
        return {}
    path = folder / "coverage.png"
    plot_curves(curves, path=path, title=f"{setting.name}: refusing the least sure cells")
    return {"Accuracy of the cells that are not refused": path}


def _thinned(num: int) -> npt.NDArray[np.int64]:
    """Positions of the cells that are drawn."""
    if num <= _MOST_CELLS:
        return np.arange(num)
    return np.linspace(0, num - 1, _MOST_CELLS).astype(np.int64)


def _draw(
    setting: Setting,
    joinids: npt.NDArray[np.int64],
    embedding: F32,
    *,
    path: Path,
    title: str,
    more: Mapping[str, Sequence[str | None]] | None = None,
) -> Path:
    colours: dict[str, Any] = {setting.config.label: setting.truth(joinids).tolist()}
    column = setting.batch_column
    if column and column != setting.config.label:
        colours[column] = setting.column(column, joinids).tolist()
    colours |= dict(more or {})
    coords = umap_embedding(embedding, seed=0)
    plot_umap(coords, colours=colours, path=path, title=title)
    return path


def _embedding_umaps(setting: Setting, shown: Sequence[Entry], folder: Path) -> dict[str, Path]:
    """One picture an entry: its embedding by label and by batch."""
    found = {}
    for entry in shown[:_MOST_PICTURES]:
        answer = kept_answer(setting, entry, setting.first)
        if answer is None or answer.embedding is None:
            continue
        rows = _thinned(len(answer.joinids))
        found[f"UMAP: {entry.name}"] = _draw(
            setting,
            answer.joinids[rows],
            answer.embedding[rows],
            path=folder / f"umap_{entry.name}.png",
            title=f"{entry.name}, seed {setting.first.seed}, {setting.name}",
        )
    return found


def _model_umap(setting: Setting, entry: Entry, folder: Path) -> dict[str, Path]:
    """The embedding of the best model over all parts of the split, with what it predicted."""
    split, seed = setting.first.split, setting.first.seed
    model = answering_model(setting, entry, seed)
    answer = kept_answer(setting, entry, setting.first)
    if model is None or answer is None or answer.labels is None:
        return {}
    joinids = np.sort(np.concatenate([split.train, split.validation, split.test]))
    joinids = joinids[_thinned(len(joinids))]
    source = tokens_of(setting, entry, seed, model)
    said = dict(zip(answer.joinids.tolist(), answer.labels.tolist(), strict=True))
    more = {
        "part of the split": split_names(joinids, split).tolist(),
        "predicted (test cells)": [said.get(int(j)) for j in joinids],
    }
    path = _draw(
        setting,
        joinids,
        embed_cells(model, source, joinids),
        path=folder / "umap.png",
        title=f"{entry.name}, seed {seed}: cell embedding, {setting.name}",
        more=more,
    )
    return {f"UMAP: cell embedding of {entry.name}": path}


def pictures_of(setting: Setting, entries: Sequence[Entry], board: pd.DataFrame) -> dict[str, Path]:
    """Draw a data set's pictures into its directory; title -> PNG."""
    folder = setting.directory / "report"
    folder.mkdir(parents=True, exist_ok=True)
    shown = _ranked(board, entries, _SHOWN)
    if setting.unit.answers == "embedding":
        return _embedding_umaps(setting, shown, folder)
    models = [e for e in _ranked(board, entries, (*_SHOWN, "from_scratch")) if e.kind != "baseline"]
    found = _model_umap(setting, models[0], folder) if models else {}
    return found | _coverage(setting, shown, folder) | _confusions(setting, shown, folder)
