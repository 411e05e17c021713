"""What the benchmarks share: synthetic cells of realistic density, clocks, the machine in words."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil
from scipy import sparse

NUM_GENES = 32_000
NUM_TYPES = 24
_BLOCK = 512


def synthetic_blocks(
    cells: int, *, seed: int = 0, mean_genes: int = 1845, block: int = 4096
) -> Iterator[sparse.csr_matrix]:
    """Raw counts of (n, 32,000) cells, ``block`` at a time: Zipf genes, types, uneven depths.

    Args:
        cells: how many in all.
        seed: another seed gives other cells.
        mean_genes: about how many genes a cell has.
        block: cells a matrix.
    """
    rng = np.random.default_rng(seed)
    zipf = 1.0 / np.arange(1, NUM_GENES + 1) ** 0.9
    rates = zipf[rng.permutation(NUM_GENES)] * rng.gamma(2.0, 0.5, (NUM_TYPES, NUM_GENES))
    rates /= rates.sum(axis=1, keepdims=True)
    low, high = 100.0, 100_000.0  # counts a cell that give mean_genes detected genes
    for _ in range(40):
        middle = (low * high) ** 0.5
        found = float(np.mean(np.sum(1 - np.exp(-middle * rates), axis=1)))
        low, high = (middle, high) if found < mean_genes else (low, middle)
    for first in range(0, cells, block):
        size = min(block, cells - first)
        parts = []
        for begin in range(0, size, _BLOCK):
            n = min(_BLOCK, size - begin)
            kind = rng.integers(0, NUM_TYPES, n)
            depth = low * rng.lognormal(-0.08, 0.4, (n, 1))
            lam = (rates[kind] * depth).astype(np.float32)
            seen = rng.random((n, NUM_GENES), dtype=np.float32) < 1 - np.exp(-lam)
            row, gene = np.nonzero(seen)
            counts = (1 + rng.poisson(lam[row, gene])).astype(np.float32)
            parts.append(sparse.csr_matrix((counts, (row, gene)), shape=(n, NUM_GENES)))
        yield sparse.vstack(parts, format="csr")


def hardware() -> dict[str, object]:
    """The machine, for a result's heading."""
    model = platform.processor() or "unknown"
    with open("/proc/cpuinfo") as lines:
        model = next((x.split(":", 1)[1].strip() for x in lines if "model name" in x), model)
    return {
        "cpu": f"{os.cpu_count()} shared virtual cores, {model}",
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 1),
    }


def _tree() -> list[psutil.Process]:
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def tree_cpu() -> dict[int, float]:
    """CPU-seconds (user + system) of this process and each descendant, by pid."""
    found = {}
    for process in _tree():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        found[process.pid] = times.user + times.system
    return found


@dataclass
class Usage:
    """What a stretch of work took.

    Attributes:
        wall: seconds.
        cpu: CPU-seconds of the process tree.
        peak_rss: bytes, all processes of the tree added up, sampled ten times a second.
    """

    wall: float = 0.0
    cpu: float = 0.0
    peak_rss: int = 0


class Meter:
    """Measures a ``with`` block over the whole process tree.

    A child that ends inside the block counts up to its last sample.
    """

    def __init__(self, *, interval: float = 0.1) -> None:
        self.usage = Usage()
        self._interval = interval
        self._stop = threading.Event()

    def __enter__(self) -> Usage:
        self._before = tree_cpu()
        self._latest = dict(self._before)
        self._own = time.process_time()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._started = time.perf_counter()
        self._thread.start()
        return self.usage

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for process in _tree():
            try:
                total += process.memory_info().rss
                times = process.cpu_times()
            except psutil.Error:
                continue
            self._latest[process.pid] = times.user + times.system
        self.usage.peak_rss = max(self.usage.peak_rss, total)

    def __exit__(self, *_: object) -> None:
        self.usage.wall = time.perf_counter() - self._started
        own = time.process_time() - self._own
        self._stop.set()
        self._thread.join()
        self._sample()
        me = os.getpid()
        others = (t - self._before.get(p, 0.0) for p, t in self._latest.items() if p != me)
        self.usage.cpu = own + sum(others)
