"""Running the parts of an ingest: in this process, or side by side as Ray tasks.

Parts leave their results as files beside the store, so nothing of size travels through Ray; on
several machines the store's folder must be one that all of them see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cellray.core.errors import CellrayError, DataError

__all__ = ["CELLS_PER_WORKER", "Job", "num_workers", "run_jobs"]

CELLS_PER_WORKER = 20_000  # a process that reads fewer costs more than it saves

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to the network
    "RAY_AUTH_MODE": "disabled",  # no token file for a cluster that only this process uses
}


class Job(Protocol):
    """A piece of work that can be done anywhere, and twice."""

    @property
    def num_cells(self) -> int:
        """Cells that it reads."""
        ...

    def run(self, folder: Path, tick: Callable[[int], None]) -> None:
        """Do it under ``folder``; ``tick`` is told of cells that are done."""
        ...


J = TypeVar("J", bound=Job)


def num_workers(wanted: int, num_cells: int) -> int:
    """How many processes read ``num_cells`` cells: ``wanted``, or where that is 0, as many as pay.

    One for each CPU of this machine (of the Ray cluster, if one is joined), but none for fewer
    than 20,000 cells.
    """
    if wanted:
        return wanted
    return max(1, min(_cpus(), num_cells // CELLS_PER_WORKER))


def _cpus() -> int:
    import sys

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return int(ray.cluster_resources().get("CPU", 1))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    jobs: Sequence[J],
    folder: Path,
    *,
    workers: int,
    tick: Callable[[J, int], None],
) -> None:
    """Do all jobs; returns when the last is done.

    Args:
        jobs: what to do; those in front are begun first.
        folder: where their results go.
        workers: 1: one after another in this process; more: as many Ray tasks at a time.
        tick: is told of the cells of a job that are done.

    Raises:
        CellrayError: the first error of a job; jobs that had begun are finished, others are not
            begun.
        DataError: a worker died again and again, e.g. for want of memory.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            job.run(folder, lambda count, job=job: tick(job, count))  # type: ignore[misc]
        return
    with _ray(workers) as ray:
        _run_tasks(ray, jobs, folder, workers, tick)


@contextmanager
def _ray(workers: int) -> Iterator[Any]:
    """Ray: the cluster that is joined already, else one of this machine until the end."""
    import ray

    ours = not ray.is_initialized()
    if ours and os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning")
    elif ours:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _do(job: Job, folder: str) -> str:
    """One task: "" or what went wrong."""
    try:
        job.run(Path(folder), lambda _: None)
    except CellrayError as error:
        return str(error)
    return ""


def _run_tasks(
    ray: Any,
    jobs: Sequence[J],
    folder: Path,
    workers: int,
    tick: Callable[[J, int], None],
) -> None:
    task = ray.remote(num_cpus=1)(_do)
    waiting = list(reversed(jobs))
    running: dict[Any, J] = {}
    failed = ""
    while running or (waiting and not failed):
        while waiting and not failed and len(running) < workers:
            job = waiting.pop()
            running[task.remote(job, str(folder))] = job
        ready, _ = ray.wait(list(running), num_returns=1)
        job = running.pop(ready[0])
        try:
            error = ray.get(ready[0])
        except ray.exceptions.RayError as crash:
            raise DataError(f"a worker of the ingest died: {crash}") from crash
        failed = failed or error
        if not error:
            tick(job, job.num_cells)
    if failed:
        raise DataError(failed)
