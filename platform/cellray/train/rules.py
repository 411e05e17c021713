"""Rules between sections of a training run, checked before anything is opened or started."""

from __future__ import annotations

from cellray.core.errors import ConfigError
from cellray.data.config import DataSection
from cellray.data.plan import default_lanes, rank_lanes
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


def uneven_shares(batch: BatchSection, scale: ScaleSection, data: DataSection) -> str:
    """A word on workers that do not divide a global batch evenly, "" where they do."""
    lanes = data.lanes or default_lanes(batch.cells_global)
    if lanes % scale.workers == 0:
        return ""
    per_lane = batch.cells_global // lanes
    shares = [
        len(rank_lanes(lanes, rank, scale.workers)) * per_lane for rank in (0, scale.workers - 1)
    ]
    return (
        f"{scale.workers} workers share {lanes} lanes unevenly: {shares[0]} cells a step for some, "
        f"{shares[1]} for others, and all wait for the slowest; numbers of workers that divide "
        f"{lanes} share evenly"
    )
