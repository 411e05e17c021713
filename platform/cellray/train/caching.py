"""Giving a training job its token cache before its workers start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cellray.data.pipeline import write_cache
from cellray.train.job import TrainJob

__all__ = ["with_cache"]

Say = Callable[[str], None]


def with_cache(job: TrainJob, say: Say) -> TrainJob:
    """The job reading from the cache of ``data.cache``, which is written first if need be.

    Raises:
        DataError: the folder holds a cache of something else, or cannot be written.
    """
    data = job.data
    if not data.cache:
        return job
    source = write_cache(
        data.source,
        cells=data.source.joinids,
        fingerprint=data.fingerprint,
        folder=data.cache,
        say=lambda line: say(f"{job.name}: {line}"),
    )
    return replace(job, data=replace(data, source=source))
