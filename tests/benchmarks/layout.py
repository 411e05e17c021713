"""Which TileDB layout of X reads fastest in shuffled runs of 64 cells, and what it costs on disk.

Run: ``python tests/benchmarks/layout.py [--cells 16384] [--rounds 3] [--only NAME ...]``. Writes
``results/layout.json``. All variants hold the same cells; rounds are interleaved; the figures are
medians, in cells per CPU-second of this process.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiledbsoma
from _common import NUM_GENES, hardware, synthetic_blocks

RUN = 64
WINDOW = 4096  # cells of one read, as our stream reads them
SETTINGS = {
    "sm.compute_concurrency_level": "1",
    "sm.io_concurrency_level": "1",
    "soma.init_buffer_bytes": str(4 << 20),
    "sm.mem.tile_upper_memory_limit": str(8 << 20),
}


def zstd(level: int) -> dict[str, Any]:
    """A zstd filter."""
    return {"_type": "ZstdFilter", "level": level}


LZ4: dict[str, Any] = {"_type": "LZ4Filter", "level": 1}
RLE: dict[str, Any] = {"_type": "RleFilter", "level": 0}
SHUFFLE, BITSHUFFLE = "ByteShuffleFilter", "BitShuffleFilter"
DELTA, WIDTH, POSITIVE = "DoubleDeltaFilter", "BitWidthReductionFilter", "PositiveDeltaFilter"


def options(
    rows: list[Any],
    genes: list[Any],
    data: list[Any],
    *,
    tile: int = 64,
    gene_tile: int = 1 << 20,
    capacity: int = 65_536,
    order: str = "row-major",
) -> dict[str, Any]:
    """Creation options of one variant."""
    return {
        "capacity": capacity,
        "allows_duplicates": True,
        "cell_order": order,
        "tile_order": "row-major",
        "dims": {
            "soma_dim_0": {"tile": tile, "filters": rows},
            "soma_dim_1": {"tile": gene_tile, "filters": genes},
        },
        "attrs": {"soma_data": {"filters": data}},
    }


def variants() -> dict[str, dict[str, Any]]:
    """Name -> creation options."""
    z3, z1 = zstd(3), zstd(1)
    base = {"rows": [z3], "genes": [SHUFFLE, z3], "data": [SHUFFLE, z3]}

    def but(**changes: Any) -> dict[str, Any]:
        return options(**{**copy.deepcopy(base), **changes})

    found = {
        "zstd3 (as before)": but(),
        "zstd1": options([z1], [SHUFFLE, z1], [SHUFFLE, z1]),
        "lz4": options([LZ4], [SHUFFLE, LZ4], [SHUFFLE, LZ4]),
        "none": options([], [], []),
        "rows lz4": but(rows=[LZ4]),
        "rows rle": but(rows=[RLE]),
        "rows rle+zstd3": but(rows=[RLE, z3]),
        "rows doubledelta": but(rows=[DELTA]),
        "rows doubledelta+zstd3": but(rows=[DELTA, z3]),
        "rows byteshuffle+lz4": but(rows=[SHUFFLE, LZ4]),
        "rows delta+bitwidth": but(rows=[POSITIVE, WIDTH]),
        "genes lz4": but(genes=[SHUFFLE, LZ4]),
        "genes zstd1": but(genes=[SHUFFLE, z1]),
        "genes bitwidth": but(genes=[WIDTH]),
        "genes bitwidth+zstd1": but(genes=[WIDTH, z1]),
        "genes bitwidth+lz4": but(genes=[WIDTH, LZ4]),
        "genes bitshuffle+lz4": but(genes=[BITSHUFFLE, LZ4]),
        "genes none": but(genes=[]),
        "data lz4": but(data=[SHUFFLE, LZ4]),
        "data zstd1": but(data=[SHUFFLE, z1]),
        "data zstd1 plain": but(data=[z1]),
        "data lz4 plain": but(data=[LZ4]),
        "data bitshuffle+lz4": but(data=[BITSHUFFLE, LZ4]),
        "data none": but(data=[]),
        "capacity 16k": but(capacity=16_384),
        "capacity 32k": but(capacity=32_768),
        "capacity 131k": but(capacity=131_072),
        "capacity 262k": but(capacity=262_144),
        "tile 32": but(tile=32),
        "tile 32, capacity 32k": but(tile=32, capacity=32_768),
        "tile 128": but(tile=128, capacity=131_072),
        "tile 256": but(tile=256, capacity=262_144),
        "hilbert": but(order="hilbert"),
        "census": options(
            [zstd(9)], [SHUFFLE, zstd(9)], [SHUFFLE, zstd(9)], tile=2048, gene_tile=2048
        ),
    }
    mixes = {
        "all byteshuffle+lz4": (
            [SHUFFLE, LZ4],
            [SHUFFLE, LZ4],
            [SHUFFLE, LZ4],
        ),
        "rows lz4, genes lz4, data zstd1": ([LZ4], [SHUFFLE, LZ4], [SHUFFLE, z1]),
        "rows zstd1, genes bitwidth, data lz4": ([z1], [WIDTH], [SHUFFLE, LZ4]),
        "rows lz4, genes bitwidth+lz4, data bitshuffle+lz4": (
            [LZ4],
            [WIDTH, LZ4],
            [BITSHUFFLE, LZ4],
        ),
    }
    found.update({name: options(*filters) for name, filters in mixes.items()})
    return found


def write(
    path: Path, create: dict[str, Any], blocks: list[Any], cells: int, *, num_genes: int = NUM_GENES
) -> tuple[float, int]:
    """Write all cells; returns CPU-seconds and bytes on disk."""
    started = time.process_time()
    tiledbsoma.SparseNDArray.create(
        str(path),
        type=pa.float32(),
        shape=(cells, num_genes),
        platform_config={"tiledb": {"create": create}},
    ).close()
    spans = create["dims"]["soma_dim_1"]["tile"] >= num_genes and create["cell_order"] != "hilbert"
    ordered = tiledbsoma.TileDBWriteOptions(sort_coords=not spans)
    context = tiledbsoma.SOMATileDBContext(tiledb_config=SETTINGS)
    with tiledbsoma.open(str(path), "w", context=context) as x:
        first = 0
        for block in blocks:
            rows = np.arange(first, first + block.shape[0], dtype=np.int64)
            columns = {
                "soma_dim_0": np.repeat(rows, np.diff(block.indptr)),
                "soma_dim_1": block.indices.astype(np.int64),
                "soma_data": block.data,
            }
            x.write(pa.table(columns), platform_config=ordered)
            first += block.shape[0]
    spent = time.process_time() - started
    return spent, sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def windows(cells: int, seed: int) -> list[np.ndarray]:
    """Rows of every window of one shuffled pass: whole runs of 64, ascending within a window."""
    runs = np.random.default_rng(seed).permutation(cells // RUN)
    each = WINDOW // RUN
    return [
        np.sort((runs[i : i + each, None] * RUN + np.arange(RUN)).reshape(-1))
        for i in range(0, len(runs), each)
    ]


def read(x: Any, requests: list[Any]) -> float:
    """CPU-seconds of reading the requests, every value delivered."""
    started = time.process_time()
    for coords in requests:
        for table in x.read((coords,)).tables():
            table.column(2).to_numpy()
    return time.process_time() - started


def main() -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "layout.json"))
    given = parser.parse_args()
    blocks = list(synthetic_blocks(given.cells))
    nonzeros = sum(b.nnz for b in blocks) / given.cells
    folder = Path(tempfile.mkdtemp(prefix="layout"))
    chosen = {n: v for n, v in variants().items() if not given.only or n in given.only}
    arrays, results = {}, {}
    try:
        for place, (name, create) in enumerate(chosen.items()):
            path = folder / str(place)
            cpu, size = write(path, create, blocks, given.cells)
            results[name] = {"write": given.cells / cpu, "bytes_per_cell": size / given.cells}
            context = tiledbsoma.SOMATileDBContext(tiledb_config=SETTINGS)
            arrays[name] = tiledbsoma.open(str(path), context=context)
            read(arrays[name], [slice(0, 255)])
        ahead = [slice(i, i + WINDOW - 1) for i in range(0, given.cells, WINDOW)]
        times: dict[str, dict[str, list[float]]] = {
            n: {"random": [], "sequential": []} for n in chosen
        }
        for turn in range(given.rounds):
            shuffled = [pa.array(w) for w in windows(given.cells, turn)]
            for name, x in arrays.items():
                times[name]["random"].append(given.cells / read(x, shuffled))
                times[name]["sequential"].append(given.cells / read(x, ahead))
        for name, found in times.items():
            results[name].update({k: statistics.median(v) for k, v in found.items()})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{'cells per CPU-second':52}{'random':>9}{'ahead':>9}{'write':>9}{'B/cell':>9}")
    for name, r in sorted(results.items(), key=lambda kv: -kv[1]["random"]):
        figures = (r["random"], r["sequential"], r["write"], r["bytes_per_cell"])
        print(f"{name:52}" + "".join(f"{f:9,.0f}" for f in figures))
    report = {
        "hardware": hardware(),
        "cells": given.cells,
        "nonzeros_per_cell": round(nonzeros),
        "rounds": given.rounds,
        "unit": "cells per CPU-second",
        "variants": {n: {k: round(v) for k, v in r.items()} for n, r in results.items()},
    }
    Path(given.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
