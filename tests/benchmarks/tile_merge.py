"""Why stores are read without TileDB's merge of tiles: crashes, and what reading costs either way.

Run: ``python tests/benchmarks/tile_merge.py STORE [--rounds 5] [--processes 8] [--seconds 100]``.
STORE is one that cellray wrote. Blocks of cells are read in interleaved rounds with the merge
(TileDB's default) and without it, in CPU-seconds; then as many processes as asked for read a table
of thirty rows over and over, on fewer cores than there are of them, and those that crash are
counted. glibc fills freed memory in them (``MALLOC_PERTURB_``), so that its use shows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import tiledbsoma
from _common import hardware

from cellray.data.soma import Store, open_store
from cellray.data.storage import context

KEY = "sm.query.sparse_global_order.preprocess_tile_merge"
WAYS = {"with the merge": "32768", "without": "0"}
BLOCK_CELLS = 4096
CHUNK_CELLS = 64


def read(store: Store, cells: np.ndarray) -> float:
    """Cells a CPU-second."""
    genes = np.arange(store.num_genes, dtype=np.int32)
    began = time.process_time()
    for start in range(0, len(cells), BLOCK_CELLS):
        store.read_block(cells[start : start + BLOCK_CELLS], genes)
    return len(cells) / (time.process_time() - began)


def speed(uri: str, rounds: int) -> None:
    stores = {name: open_store(uri, tiledb={KEY: value}) for name, value in WAYS.items()}
    num_cells = next(iter(stores.values())).num_cells
    cells = np.arange(min(num_cells, 16 * BLOCK_CELLS))
    chunks = cells[: len(cells) // CHUNK_CELLS * CHUNK_CELLS].reshape(-1, CHUNK_CELLS)
    shuffled = np.random.default_rng(0).permutation(chunks).ravel()
    orders = {"sequential": cells, f"chunks of {CHUNK_CELLS} cells": shuffled}
    for order, rows in orders.items():
        found: dict[str, list[float]] = {name: [] for name in stores}
        for number in range(rounds + 1):
            for name, store in stores.items():
                rate = read(store, rows)
                if number:  # the first fills the caches
                    found[name].append(rate)
        rates = {name: statistics.median(values) for name, values in found.items()}
        told = ", ".join(f"{name} {rate:,.0f} cells/CPU-s" for name, rate in rates.items())
        ratio = rates["without"] / rates["with the merge"]
        print(f"{order}: {told}; without / with {ratio:.2f}", flush=True)


def make_table(folder: str) -> str:
    """A SOMA table of thirty rows: a read of it is over before the task that TileDB left."""
    rows = pa.table({"soma_joinid": pa.array(range(30), pa.int64())})
    where = f"{folder}/table"
    tiledbsoma.DataFrame.create(where, schema=rows.schema, domain=[(0, 29)]).close()
    with tiledbsoma.open(where, "w") as table:
        table.write(rows)
    return where


def stress(table: str, value: str, seconds: float) -> None:
    """Read some rows until the time is up; prints how often."""
    ours = context(((KEY, value),))
    until, reads = time.perf_counter() + seconds, 0
    with tiledbsoma.open(table, context=ours) as opened:
        while time.perf_counter() < until:
            opened.read((slice(0, 4),), column_names=["soma_joinid"]).concat()
            reads += 1
    print(reads)


def crashes(processes: int, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        count(make_table(folder), processes, seconds)


def count(table: str, processes: int, seconds: float) -> None:
    for name, value in WAYS.items():
        words = [sys.executable, __file__, table, "--stress", value, "--seconds", str(seconds)]
        environment = {**os.environ, "MALLOC_PERTURB_": "165"}
        running = [
            subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(processes)
        ]
        said = [process.communicate()[0] for process in running]
        gone = sum(process.returncode < 0 for process in running)
        reads = sum(int(s) for s in said if s.strip())
        print(f"{name}: {gone} of {processes} processes crashed; {reads:,} reads of the others")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--stress")
    given = parser.parse_args()
    if given.stress is not None:
        stress(given.store, given.stress, given.seconds)
        return
    print(hardware(), "; cellray reads with", KEY, "=", dict(context().tiledb_config)[KEY])
    speed(given.store, given.rounds)
    crashes(given.processes, given.seconds)


if __name__ == "__main__":
    main()
