"""One peer over one epoch of shuffled batches, timed in its own process and environment.

Run by ``data_path.py``: ``python _peers.py NAME FOLDER CELLS BATCH``. FOLDER holds ``rows`` and
``census`` (SOMA, the two layouts) and ``cells.h5ad`` (uncompressed CSR) of the same cells; what a
peer needs beside that it writes there, untimed. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import Meter

Batches = Iterator[tuple[Any, Any]]  # (counts, store rows of the batch or None)


def tiledbsoma_ml(folder: Path, cells: int, batch: int, layout: str) -> Callable[[], Batches]:
    """TileDB-SOMA-ML, CSR out, chunks of 64, io batches of 16,384."""
    import tiledbsoma
    import tiledbsoma_ml

    experiment = tiledbsoma.open(str(folder / layout))

    def epoch() -> Batches:
        picked = tiledbsoma.AxisQuery(coords=(slice(0, cells - 1),))
        with experiment.axis_query("RNA", obs_query=picked) as query:
            dataset = tiledbsoma_ml.ExperimentDataset(
                query,
                layer_name="raw",
                obs_column_names=["soma_joinid"],
                batch_size=batch,
                io_batch_size=16_384,
                shuffle=True,
                shuffle_chunk_size=64,
                seed=0,
                return_sparse_X=True,
            )
            for counts, obs in dataset:
                yield counts, obs["soma_joinid"].to_numpy()

    return epoch


def annbatch(folder: Path, cells: int, batch: int) -> Callable[[], Batches]:
    """annbatch, SciPy CSR, chunks of 64, 16,384 cells ahead, a collection shuffled on disk."""
    import annbatch as peer

    place = folder / "annbatch.zarr"
    collection = peer.DatasetCollection(place)
    if collection.is_empty:
        collection.add_adatas([folder / "cells.h5ad"], rng=np.random.default_rng(0))

    def epoch() -> Batches:
        loader = peer.Loader(
            batch_size=batch,
            chunk_size=64,
            preload_nchunks=256,
            shuffle=True,
            drop_last=False,
            rng=np.random.default_rng(1),
        )
        loader.use_collection(collection)
        for found in loader:
            obs = found["obs"]
            yield found["X"], None if obs is None else obs["row"].to_numpy()

    return epoch


def scdataset(folder: Path, cells: int, batch: int) -> Callable[[], Batches]:
    """scDataset on the uncompressed h5ad, blocks of 64, fetches of 4,096."""
    import h5py
    from anndata.io import sparse_dataset
    from scdataset import BlockShuffling, scDataset

    class Rows:
        """What scDataset indexes: it asks for a length, which AnnData's backed CSR lacks."""

        def __init__(self) -> None:
            self.counts = sparse_dataset(h5py.File(folder / "cells.h5ad")["X"])

        def __len__(self) -> int:
            return cells

        def __getitem__(self, rows: Any) -> Any:
            return self.counts[np.asarray(rows)]

    counts = Rows()

    def epoch() -> Batches:
        dataset = scDataset(
            counts,
            BlockShuffling(block_size=64),
            batch_size=batch,
            fetch_factor=4096 // batch,
        )
        for found in dataset:
            yield found, None

    return epoch


def scdl(folder: Path, cells: int, batch: int) -> Callable[[], Batches]:
    """bionemo-scdl, memory-mapped, fully random rows, sparse collate."""
    import torch
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    place = folder / "scdl"
    made = place.exists()
    given = {"h5ad_path": str(folder / "cells.h5ad"), "use_X_not_raw": True}
    source = {} if made else given
    dataset = SingleCellMemMapDataset(str(place), **source)

    def epoch() -> Batches:
        order = np.random.default_rng(1).permutation(cells)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch,
            sampler=order.tolist(),
            collate_fn=collate_sparse_matrix_batch,
        )
        for number, found in enumerate(loader):
            yield found, order[number * batch : (number + 1) * batch]

    return epoch


PEERS: dict[str, Callable[..., Callable[[], Batches]]] = {
    "tiledbsoma-ml, our layout": lambda *a: tiledbsoma_ml(*a, layout="rows"),
    "tiledbsoma-ml, Census layout": lambda *a: tiledbsoma_ml(*a, layout="census"),
    "annbatch": annbatch,
    "scDataset": scdataset,
    "bionemo-scdl": scdl,
}


def main() -> None:
    """Time one epoch after an untimed one."""
    name, folder, cells, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    epoch = PEERS[name](folder, cells, batch)
    for _ in epoch():
        pass
    rows: list[list[int]] = []
    delivered = 0
    with Meter() as usage:
        for counts, ids in epoch():
            delivered += int(counts.shape[0])
            if ids is not None and len(rows) < 200:
                rows.append([int(i) for i in ids])
    found = {"cells": delivered, "wall": usage.wall, "cpu": usage.cpu, "peak_rss": usage.peak_rss}
    print(json.dumps({**found, "rows": rows}))


if __name__ == "__main__":
    main()
