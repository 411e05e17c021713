"""Rules between sections of a training run, checked before anything is opened or started."""

from __future__ import annotations

from cellray.core.errors import ConfigError
from cellray.data.config import DataSection
from cellray.data.plan import default_lanes
from cellray.train.config import BatchSection, ScaleSection

__all__ = ["check_batch"]


def check_batch(batch: BatchSection, scale: ScaleSection, data: DataSection) -> None:
    """The rules between batch, workers and lanes.

    Raises:
        ConfigError: ``cells_global`` is not a multiple of ``cells_micro x workers``, or the lanes
            do not fit the workers.
    """
    per_pass = batch.cells_micro * scale.workers
    if batch.cells_global % per_pass:
        below = batch.cells_global // per_pass * per_pass
        fits = [str(n) for n in (below, below + per_pass) if n]
        raise ConfigError(
            f"batch.cells_global = {batch.cells_global} is not a multiple of batch.cells_micro x "
            f"scale.workers = {batch.cells_micro} x {scale.workers} = {per_pass}; the nearest that "
            f"fit: {' or '.join(fits)}"
        )
    lanes = data.lanes or default_lanes(batch.cells_global)
    if batch.cells_global % lanes or lanes % scale.workers:
        fits = [
            str(n)
            for n in range(scale.workers, batch.cells_global + 1, scale.workers)
            if batch.cells_global % n == 0
        ]
        raise ConfigError(
            f"data.lanes = {lanes} must divide batch.cells_global = {batch.cells_global} and be a "
            f"multiple of scale.workers = {scale.workers}; allowed: {', '.join(fits[:8])}"
        )
