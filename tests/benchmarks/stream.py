"""Cells per second from a SOMA store to tokenised batches, beside the raw read of the same rows.

Run: ``python tests/benchmarks/stream.py [STORE]`` (default: a store made of the demo's cells,
repeated). One run prints all figures, so that their ratios mean something on a shared machine.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cellray.core.draw import Draw
from cellray.data.config import DataSection
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.plan import EpochPlan, default_lanes
from cellray.data.tokens import TokenSource, make_tokenizer
from cellray.data.vocab import Vocab
from cellray.train.prepare import gene_map, select_cells

ROOT = Path(__file__).resolve().parents[2]


def timed(name: str, work: Callable[[], Iterator[int]]) -> float:
    """Cells per CPU-second of this process over one pass."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    started = time.perf_counter()
    cells = sum(work())
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    wall = time.perf_counter() - started
    print(f"{name:34}{cells / wall:10,.0f} cells/s {cells / cpu:10,.0f} cells/CPU-s")
    return cells / cpu


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        uri = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/store"
        if len(sys.argv) == 1:
            ingest(IngestConfig(files=[str(ROOT / "tests/data/pancreas/*.h5ad")], uri=uri))
        cells = select_cells(DataSection(uri=uri))
        var = cells.store.var()
        specials = ("<pad>", "<cls>", "<eoc>", "<mask>")
        vocab = Vocab.from_genes(
            list(var["feature_id"]), list(var["feature_name"]), specials=specials
        )
        mapping = gene_map(cells.store, vocab)
        plan = EpochPlan(
            joinids=cells.joinids,
            lengths=cells.lengths(1200),
            seed=0,
            cells_global=64,
            lanes=default_lanes(64),
        )
        config = {"name": "bins", "max_tokens": 1200}
        source = TokenSource(cells.store, mapping, vocab, config, cells.joinids)
        tokenizer = make_tokenizer(config, vocab)
        tokenizer(cells.store.read_block(cells.joinids[:64], mapping), Draw(0))  # compile
        whole = cells.joinids

        def raw() -> Iterator[int]:
            experiment = cells.store._experiment
            for start in range(0, len(whole), 2048):
                rows = whole[start : start + 2048]
                x = experiment.ms["RNA"].X["raw"]
                list(x.read((slice(int(rows[0]), int(rows[-1])),)).tables())
                yield len(rows)

        def shuffled(tokenise: bool) -> Iterator[int]:
            for first in range(0, plan.batches_per_epoch, plan.window_batches):
                last = min(first + plan.window_batches, plan.batches_per_epoch)
                rows = plan.rows(0, first, last).reshape(-1)
                if tokenise:
                    source.tokens(rows, epoch=0, tokenizer=tokenizer)
                else:
                    cells.store.read_block(rows, mapping)
                yield len(rows)

        floor = timed("raw SOMA read, sequential", raw)
        read = timed("read_block in the plan's order", lambda: shuffled(False))
        full = timed("read and tokenise (51 bins)", lambda: shuffled(True))
        print(f"share of the raw read: blocks {read / floor:.2f}, tokens {full / floor:.2f}")
        print(f"mean non-zero genes per cell: {np.mean(cells.obs['nnz']):.0f}")


if __name__ == "__main__":
    main()
