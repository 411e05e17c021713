"""How well an order of cells is mixed, as numbers beside a uniform draw.

A mini-batch of a perfect shuffle is a uniform draw of cells. A stream reads runs of neighbouring
cells, so its batches are a little less varied; how much less is stated here for the labels that
matter: source files, donors, cell types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cellray.core.ids import without_repeats
from cellray.data.plan import Plan

__all__ = ["Mixing", "measure_mixing"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mixing:
    """The shuffle quality of an order.

    Attributes:
        distinct: label -> mean number of distinct values in a global batch.
        uniform: label -> the same for batches drawn uniformly from the selection.
        dispersion: variance of the batches' mean position in the store over that of uniform
            draws: 1 for a perfect shuffle, more where batches sit in one region.
        neighbours: share of a batch's cells that have another cell of the batch within 32 places
            in the store, less the share that uniform draws have: 0 for a perfect shuffle.
        batches: global batches that were looked at.
    """

    distinct: Mapping[str, float]
    uniform: Mapping[str, float]
    dispersion: float
    neighbours: float
    batches: int

    def lines(self) -> list[str]:
        """For people."""
        told = [
            f"a batch holds {self.distinct[name]:.1f} distinct {name} (uniform draw: "
            f"{self.uniform[name]:.1f})"
            for name in self.distinct
        ]
        told.append(
            f"dispersion {self.dispersion:.2f} (uniform draw: 1.00), neighbours in a batch "
            f"{self.neighbours:.1%} more than in a uniform draw"
        )
        return told


def _expected_distinct(codes: I64, batch: int) -> float:
    """Mean number of distinct labels among ``batch`` cells drawn without replacement."""
    sizes = np.bincount(codes)
    left = len(codes) - sizes[sizes > 0]  # cells that are not of the label
    steps = np.arange(min(batch, len(codes)), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.maximum(left[:, None] - steps, 0)) - np.log(len(codes) - steps)
    return float((1 - np.exp(logs.sum(axis=1))).sum())


def _near(places: I64, within: int = 32) -> float:
    """Mean share of a row's cells that have another one of the row within ``within`` places."""
    ordered = np.sort(places, axis=1)
    gap = np.diff(ordered, axis=1) <= within
    some = np.zeros(ordered.shape, dtype=bool)
    some[:, 1:] |= gap
    some[:, :-1] |= gap
    return float(some.mean())


def measure_mixing(
    plan: Plan, labels: Mapping[str, npt.NDArray[np.integer]], *, max_batches: int = 512
) -> Mixing:
    """Measure the order of the first batches of epoch 0.

    Args:
        plan: the order.
        labels: name -> (N,) codes aligned with the plan's ascending cells.
        max_batches: global batches looked at, evenly over the epoch in whole windows.
    """
    batches = min(plan.batches_per_epoch, max_batches)
    rows = plan.rows(0, 0, batches)
    cells = plan.joinids
    places = np.searchsorted(cells, without_repeats(rows)).astype(np.int64)
    size = plan.cells_global
    distinct, uniform = {}, {}
    for name, codes in labels.items():
        ordered = np.sort(np.asarray(codes, dtype=np.int64)[places], axis=1)
        distinct[name] = float((np.diff(ordered, axis=1) > 0).sum(axis=1).mean() + 1)
        uniform[name] = _expected_distinct(np.asarray(codes, dtype=np.int64), size)
    draws = np.random.default_rng(0).integers(0, len(cells), size=(batches, size))
    expected = (len(cells) ** 2 - 1) / 12 / size
    spread = float(((places.mean(axis=1) - (len(cells) - 1) / 2) ** 2).mean())
    return Mixing(
        distinct=distinct,
        uniform=uniform,
        dispersion=spread / expected,
        neighbours=_near(places) - _near(draws),
        batches=batches,
    )
