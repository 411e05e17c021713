"""Steps whose loss is no number or explodes: the policy, and what is kept of them."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cellray.core.batch import CellBatch
from cellray.core.errors import StoppedError
from cellray.train.engine import StepStats

__all__ = ["LossGuard", "write_bad_step"]

_REMEMBERED = 50
_ENOUGH = 20
_HIGH = 2.0  # times the highest of the first losses, which knew nothing


class LossGuard:
    """Knows what a loss may be, from those before it; the same on every rank.

    Args:
        policy: ``stop`` or ``skip``.
        factor: a loss above this many times the median of the last 50 has exploded, once there
            are 20, if it is also above twice the highest of the run's first 20: a model that has
            learnt its cells by heart is not stopped by a hard one; 0 never.
        most: bad steps in a row that ``skip`` puts up with.
        state: what :meth:`state` gave when the checkpoint was written, {} for a new run.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"],
        *,
        factor: float,
        most: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        before = state or {}
        self._policy, self._factor, self._most = policy, factor, most
        self._recent: deque[float] = deque(before.get("recent_losses", []), maxlen=_REMEMBERED)
        self._began: float | None = before.get("loss_at_first")
        self._in_a_row = int(before.get("bad_in_a_row", 0))
        self.bad_steps = int(before.get("bad_steps", 0))

    @property
    def limit(self) -> float:
        """The highest loss the next step may have."""
        if not self._factor or self._began is None:
            return math.inf
        median = statistics.median(self._recent)
        return max(self._factor * median, _HIGH * self._began) if median > 0 else math.inf

    def state(self) -> dict[str, Any]:
        """What a run that goes on must know."""
        return {
            "recent_losses": list(self._recent),
            "loss_at_first": self._began,
            "bad_in_a_row": self._in_a_row,
            "bad_steps": self.bad_steps,
        }

    def observe(self, stats: StepStats) -> None:
        """Take note of a step."""
        if stats.taken:
            self._recent.append(stats.loss)
            if self._began is None and len(self._recent) == _ENOUGH:
                self._began = max(self._recent)
            self._in_a_row = 0
        else:
            self._in_a_row += 1
            self.bad_steps += 1

    def judge(self, step: int, stats: StepStats, where: str) -> None:
        """Decide what follows from a step that was left out.

        Raises:
            StoppedError: the policy is to stop, or there were too many in a row.
        """
        if stats.taken or (self._policy == "skip" and self._in_a_row < self._most):
            return
        seen = _words(stats, self.limit)
        text = f"step {step}: {seen}; the step was not taken. The ids of its cells are in '{where}'"
        if self._policy == "stop":
            advice = (
                "look at those cells, lower optim.lr or optim.clip_norm, or set train.bad_steps = "
                "'skip' to leave such steps out; the same command goes on from the last checkpoint"
            )
        else:
            advice = (
                f"it was bad step number {self._in_a_row} in a row (train.max_bad_steps = "
                f"{self._most}); lower optim.lr, or go back to a checkpoint before"
            )
        raise StoppedError(f"{text}; {advice}")


def _words(stats: StepStats, limit: float) -> str:
    if not math.isfinite(stats.loss):
        return f"the loss is {stats.loss}"
    if stats.loss > limit:
        return (
            f"the loss exploded: {stats.loss:.6g}, more than {limit:.6g} "
            "(train.explosion_factor x the median of the steps before, at least twice the "
            "highest of the first ones)"
        )
    return f"the gradient's norm is {stats.gradient_norm} (loss {stats.loss:.6g})"


def write_bad_step(
    run_dir: str | Path,
    *,
    step: int,
    epoch: int,
    rank: int,
    batches: Sequence[CellBatch],
    stats: StepStats,
    lr: float,
) -> Path:
    """Keep what a rank saw in a bad step: cell ids by micro-batch, with their losses."""
    folder = Path(run_dir) / "bad_steps"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "step": step,
        "epoch": epoch,
        "rank": rank,
        "loss": stats.loss,
        "gradient_norm": stats.gradient_norm,
        "learning_rate": lr,
        "micro_batches": [
            {"loss_sum": loss, "num_targets": b.num_targets, "cell_ids": b.cell_ids.tolist()}
            for b, loss in zip(batches, stats.losses, strict=True)
        ],
    }
    file = folder / f"step-{step:08d}-rank-{rank:05d}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1))
    os.replace(partial, file)
    return folder
