"""Peak memory of an ingest of few and of many cells of the same width, in processes of their own.

    python tests/benchmarks/ingest_memory.py [FOLDER] [SMALL LARGE [FORM]]

Writes made h5ad files under FOLDER (default: a temporary one), ingests each in a fresh process
with ``workers = 1``, and prints one JSON line a size: cells, peak resident memory in MB, seconds,
and how much the larger took in relation to the smaller. FORM: ``csr`` (default), ``csc`` or
``dense``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np

NUM_GENES = 20_000
GENES_PER_CELL = 1_000
_CELLS_AT_ONCE = 10_000

INGEST = """
import json, resource, sys, time
from cellray.data.ingest import IngestConfig, ingest
started = time.monotonic()
report = ingest(IngestConfig(files=[sys.argv[1]], uri=sys.argv[2], workers=1, organism="human"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"cells": report.num_cells, "peak_mb": round(peak, 1),
                  "seconds": round(time.monotonic() - started, 1)}))
"""


def _strings(group: h5py.Group, name: str, values: list[str]) -> None:
    node = group.create_dataset(name, data=values, dtype=h5py.string_dtype())
    node.attrs["encoding-type"], node.attrs["encoding-version"] = "string-array", "0.2.0"


def _frame(file: h5py.File, name: str, ids: list[str], columns: dict[str, list[str]]) -> None:
    group = file.create_group(name)
    group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0"})
    group.attrs["_index"] = "_index"
    group.attrs["column-order"] = list(columns)
    _strings(group, "_index", ids)
    for column, values in columns.items():
        _strings(group, column, values)


def _sparse(file: h5py.File, num_cells: int, form: str) -> None:
    """Rows of distinct genes; ``csc`` means the same arrays read as columns of cells."""
    outer, inner = (num_cells, NUM_GENES) if form == "csr" else (NUM_GENES, num_cells)
    per = GENES_PER_CELL if form == "csr" else GENES_PER_CELL * num_cells // NUM_GENES
    rng, x = np.random.default_rng(0), file.create_group("X")
    x.attrs.update({"encoding-type": f"{form}_matrix", "encoding-version": "0.1.0"})
    x.attrs["shape"] = (num_cells, NUM_GENES)
    x["indptr"] = np.arange(outer + 1, dtype=np.int64) * per
    data = x.create_dataset("data", (outer * per,), dtype="f4", chunks=(1 << 18,))
    indices = x.create_dataset("indices", (outer * per,), dtype="i4", chunks=(1 << 18,))
    at_once = max(1, _CELLS_AT_ONCE * GENES_PER_CELL // per)
    step = inner / per
    for first in range(0, outer, at_once):
        rows = min(at_once, outer - first)
        # one in each stretch of inner / per: ascending and distinct
        found = (np.arange(per) * step + rng.random((rows, per)) * (step - 1)).astype(np.int32)
        part = slice(first * per, (first + rows) * per)
        indices[part] = found.ravel()
        data[part] = rng.integers(1, 9, rows * per).astype(np.float32)


def _dense(file: h5py.File, num_cells: int) -> None:
    rng = np.random.default_rng(0)
    node = file.create_dataset(
        "X", (num_cells, NUM_GENES), "f4", chunks=(64, NUM_GENES), compression="lzf"
    )
    node.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for first in range(0, num_cells, 1000):
        block = np.zeros((min(1000, num_cells - first), NUM_GENES), np.float32)
        block[:, rng.integers(0, NUM_GENES, GENES_PER_CELL)] = 1
        node[first : first + len(block)] = block


def write(path: Path, num_cells: int, form: str) -> None:
    """Write an h5ad of ``num_cells`` made cells without holding it."""
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        if form == "dense":
            _dense(file, num_cells)
        else:
            _sparse(file, num_cells, form)
        donors = [f"donor{i % 20}" for i in range(num_cells)]
        _frame(file, "obs", [f"cell{i:07d}" for i in range(num_cells)], {"donor": donors})
        _frame(file, "var", [f"ENSG{i:011d}" for i in range(NUM_GENES)], {})


def main() -> None:
    """Measure both sizes."""
    given = sys.argv[1:]
    folder = Path(given[0] if given else tempfile.mkdtemp(prefix="ingest-memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [int(n) for n in given[1:3]] or [20_000, 500_000]
    form = given[3] if len(given) > 3 else "csr"
    peaks = []
    for num_cells in sizes:
        path = folder / f"{form}{num_cells}.h5ad"
        if not path.exists():
            write(path, num_cells, form)
        store = tempfile.mkdtemp(prefix="store-", dir=folder)
        command = [sys.executable, "-c", INGEST, str(path), f"{store}/s"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout)
        peaks.append(figures["peak_mb"])
        sys.stdout.write(json.dumps({"form": form, **figures}) + "\n")
        sys.stdout.flush()
    sys.stdout.write(json.dumps({"large_over_small": round(peaks[-1] / peaks[0], 3)}) + "\n")


if __name__ == "__main__":
    main()
