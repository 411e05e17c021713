"""Stores with planted faults, and fine-tuning runs that are prepared but never started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from cellray.core.section import build_section
from cellray.data.soma import Store, open_store
from cellray.runs import FinetuneRun, build_run
from cellray.tasks.annotation import AnnotationConfig, annotation_split
from cellray.tasks.base import Split
from helpers_cells import known_cells


@dataclass(frozen=True)
class Selected:
    """All cells of a store, as a run selects them."""

    store: Store
    obs: pd.DataFrame

    @property
    def joinids(self) -> np.ndarray:
        return self.obs["soma_joinid"].to_numpy()

    def keyed(self) -> pd.DataFrame:
        return self.obs.assign(cellray_cell_key=self.store.cell_keys(self.joinids))


def selected(uri: str, *columns: str) -> Selected:
    store = open_store(uri)
    return Selected(store, store.obs(["cell_type", "donor", *columns]))


def config_of(**more: object) -> AnnotationConfig:
    split = {"column": "donor", "test_values": ["d3"], "validation_fraction": 0.2}
    raw = {"name": "annotation", "split": split}
    return build_section(AnnotationConfig, {**raw, **more})


def split_of(cells: Selected, config: AnnotationConfig) -> Split:
    return annotation_split(cells.keyed(), config, seed=0)


def with_copies(num: int = 3) -> ad.AnnData:
    """Known cells; the first ``num`` of donor d0 lie under other names in donor d3 too."""
    cells = known_cells()
    d0 = np.flatnonzero((cells.obs["donor"] == "d0").to_numpy())[:num]
    d3 = np.flatnonzero((cells.obs["donor"] == "d3").to_numpy())[:num]
    counts = cells.X.tolil()
    counts[d3] = counts[d0]
    cells.X = counts.tocsr()
    return cells


def finetune_run(uri: str, folder: Path, **more: dict) -> FinetuneRun:
    raw = {
        "name": "fine",
        "seed": 1,
        "data": {"uri": uri},
        "task": {
            "name": "annotation",
            "split": {"column": "donor", "test_values": ["d3"], "validation_fraction": 0.2},
        },
        "model": {
            "family": "geneformer", "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16,
        },
        "batch": {"cells_global": 12, "cells_micro": 12},
        "train": {"steps": 2},
        "engine": {"name": "torch"},
        "scale": {"workers": 1},
        "checkpoint": {"dir": str(folder)},
    }  # fmt: skip
    for key, value in more.items():
        raw[key] = {**raw.get(key, {}), **value}
    run = build_run("finetune", raw)
    assert isinstance(run, FinetuneRun)
    return run
