"""How much work a step was: cells, tokens, slots, floating-point operations, memory.

Operations are those that the model's arithmetic needs for the real tokens (:mod:`cellray.nn.flops`,
forward and backward); what a run executes besides (padding, recomputed blocks) counts as executed
only. Their rates over the GPU's peak are ``mfu`` and ``hfu``; a CPU has no such peak, and none is
reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
import psutil
import torch

from cellray.core.batch import CellBatch
from cellray.models.base import CellModel

__all__ = ["StepWork", "WorkCounter", "memory_bytes"]

_RECOMPUTED = 4 / 3  # one more forward pass beside forward and twice as much backward


@dataclass(frozen=True)
class StepWork:
    """Sums over cells.

    Attributes:
        cells: cells.
        tokens: real tokens.
        slots: tokens and padding.
        flops: floating-point operations that real tokens need.
        executed_flops: those of slots, and of what is computed twice.
    """

    cells: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    flops: float = 0.0
    executed_flops: float = 0.0

    def columns(self) -> list[float]:
        """The numbers, in order."""
        return list(astuple(self))

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(*(a + b for a, b in zip(self.columns(), other.columns(), strict=True)))


class WorkCounter:
    """Counts the work of micro-batches.

    Args:
        model: says what it computes; None counts no operations.
        device: where it is.
        peak_flops: of one worker's GPU, a second; None where there is none, or it is not known.
        workers: ranks, for the peak of all.
        recomputed: whether blocks are computed anew in the backward pass.
    """

    def __init__(
        self,
        model: CellModel | None,
        device: torch.device,
        *,
        peak_flops: float | None = None,
        workers: int = 1,
        recomputed: bool = False,
    ) -> None:
        self.device = device
        self._model = model
        self._peak = (peak_flops or 0.0) * workers
        self._factor = _RECOMPUTED if recomputed else 1.0

    def of(self, batches: Sequence[CellBatch]) -> StepWork:
        """The work of a rank's micro-batches, which are still in host memory."""
        total = StepWork()
        for batch in batches:
            slots = float(batch.attention_mask.numel())
            real = executed = 0.0
            if self._model is not None:
                lengths = self._model.read_lengths(batch)
                longest = int(lengths.max(initial=0))
                padded = np.full_like(lengths, longest) if batch.packing is None else lengths
                real = self._flops(batch, lengths)
                executed = self._factor * self._flops(batch, padded)
            total += StepWork(len(batch), batch.num_real_tokens, slots, real, executed)
        return total

    def _flops(self, batch: CellBatch, lengths_B: npt.NDArray[np.int64]) -> float:
        assert self._model is not None
        targets = batch.num_targets
        return self._model.training_flops(lengths_B, targets, cell_prompt=batch.cell_prompt)

    def rates(self, work: StepWork, elapsed_s: float) -> dict[str, float]:
        """``tflops_per_s`` of real tokens, and ``mfu`` and ``hfu`` where the peak is known."""
        found = {"tflops_per_s": work.flops / elapsed_s / 1e12}
        if self._peak:
            found["mfu"] = work.flops / elapsed_s / self._peak
            found["hfu"] = work.executed_flops / elapsed_s / self._peak
        return found


def memory_bytes(device: torch.device) -> float:
    """Peak bytes allocated on the GPU since the start; on a CPU the process's resident memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(psutil.Process().memory_info().rss)
