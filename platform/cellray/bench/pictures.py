"""What a benchmark shows beside its table: a model's cell embedding as a UMAP picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.bench.umap import plot_umap, umap_embedding
from cellray.infer.embed import embed_cells, token_source
from cellray.infer.load import load
from cellray.tasks.base import Split
from cellray.train.prepare import Cells

__all__ = ["draw_umap", "split_names"]

_MOST_CELLS = 20_000  # a picture does not gain by more, and UMAP's time does not fit a demo's


def split_names(cells: npt.NDArray[np.int64], split: Split) -> npt.NDArray[Any]:
    """``training``, ``validation`` or ``test`` for each joinid."""
    names = np.full(len(cells), "training", dtype=object)
    names[np.isin(cells, split.validation)] = "validation"
    names[np.isin(cells, split.test)] = "test"
    return names


def draw_umap(
    model_dir: str,
    cells: Cells,
    split: Split,
    *,
    label: str,
    predictions: Mapping[int, str],
    title: str,
    path: Path,
) -> Path:
    """Embed labelled cells with a model and draw them by label, split and prediction.

    Args:
        model_dir: exported model.
        cells: the selection.
        split: which of them were trained on.
        label: obs column with the truth.
        predictions: joinid -> predicted label, of the test cells.
        title: names the model.
        path: PNG to write.

    Returns:
        The path.
    """
    joinids = np.sort(np.concatenate([split.train, split.validation, split.test]))
    if len(joinids) > _MOST_CELLS:
        joinids = joinids[np.linspace(0, len(joinids) - 1, _MOST_CELLS).astype(np.int64)]
    model = load(model_dir)
    source, _ = token_source(model, cells)
    coords = umap_embedding(embed_cells(model, source, joinids), seed=0)
    rows = np.searchsorted(cells.joinids, joinids)
    truth: pd.Series[Any] = cells.obs[label].astype(str).iloc[rows]
    colours = {
        label: truth.tolist(),
        "part of the split": split_names(joinids, split).tolist(),
        "predicted (test cells)": [predictions.get(int(j)) for j in joinids],
    }
    plot_umap(coords, colours=colours, path=path, title=title)
    return path
