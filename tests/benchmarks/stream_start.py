"""What a stream costs before and beside its cells: many windows of a small store.

Run: ``python tests/benchmarks/stream_start.py STORE [--steps 4000] [--concurrency N]``.
Prints seconds to the first step, seconds to step ``take``, and the most processes of Ray seen in
the meantime. ``--concurrency 0`` leaves the naming of windows unbounded, as it was before.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import psutil
import ray
from data_path import prepare

import cellray.data.pipeline as pipeline


def workers() -> int:
    lines = (" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    return sum("ray::" in line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--take", type=int, default=200)
    parser.add_argument("--concurrency", type=int)
    given = parser.parse_args()
    if given.concurrency == 0:
        plain = ray.data.read_datasource
        pipeline.ray.data.read_datasource = lambda *a, **k: plain(*a, **(k | {"concurrency": None}))
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    setup = prepare(given.store, 1 << 40, Path(), labelled=False)
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            most[0] = max(most[0], workers())

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    stream = pipeline.token_stream(
        setup.source, setup.plan, first_step=0, last_step=given.steps, actors=1
    )
    next(stream)
    first = time.perf_counter() - began
    for _ in range(given.take - 1):
        next(stream)
    whole = time.perf_counter() - began
    done.set()
    print(
        f"first step {first:.1f} s, step {given.take} {whole:.1f} s, "
        f"at most {most[0]} processes of Ray, CPU of this one {time.process_time():.1f} s"
    )


if __name__ == "__main__":
    main()
