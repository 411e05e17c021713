"""Rules between sections of a training run, checked before anything is opened or started."""

from __future__ import annotations

from cellray.core.errors import ConfigError
from cellray.data.config import DataSection
from cellray.data.plan import default_lanes
from cellray.train.config import BatchSection, ScaleSection

__all__ = ["check_batch", "uneven_shares"]


def check_batch(batch: BatchSection, scale: ScaleSection, data: DataSection) -> None:
    """The rules between batch, workers and lanes.

    Raises:
        ConfigError: the lanes do not divide a global batch, or there are more workers than lanes.
    """
    lanes = data.lanes or default_lanes(batch.cells_global)
    if batch.cells_global % lanes or scale.workers > lanes:
        fits = [
            str(n)
            for n in range(scale.workers, batch.cells_global + 1)
            if batch.cells_global % n == 0
        ]
        advice = f"allowed: {', '.join(fits[:8])}" if fits else "raise batch.cells_global"
        raise ConfigError(
            f"data.lanes = {lanes} must divide batch.cells_global = {batch.cells_global} and be at "
            f"least scale.workers = {scale.workers}; {advice}"
        )


def uneven_shares(largest: int, *, workers: int, cells_global: int) -> str:
    """A word on workers that do not share a global batch evenly, "" where they do.

    Args:
        largest: cells of a step that the worker with the most lanes gets.
        workers: number of workers.
        cells_global: cells of a step.
    """
    if largest * workers == cells_global:
        return ""
    return (
        f"{workers} workers share {cells_global} cells a step unevenly: {largest} for some, fewer "
        f"for others, and all wait for the slowest; set data.lanes to a multiple of {workers} that "
        "divides batch.cells_global, or, where there is none, to a larger divisor"
    )
