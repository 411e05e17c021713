"""Whether a model has trained at all, and on as many cells a step as its configuration says."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cellray.core.errors import ConfigError, DataError
from cellray.data.plan import Plan

__all__ = ["did_it_train", "effective_batch"]

_MARGIN = 0.02
_SIGMAS = 2.0
_FALL = 0.01  # share by which the loss must have fallen


def did_it_train(
    train_accuracy: float,
    majority_share: float,
    *,
    num_cells: int = 0,
    losses: Sequence[float] = (),
) -> str:
    """A remark on a model that knows its own training cells no better than one that learnt nothing.

    Args:
        train_accuracy: share of right labels among (a sample of) the training cells, 0..1.
        majority_share: share of the most frequent class among them.
        num_cells: cells of the sample: an advantage of less than two standard errors is none; 0
            leaves that out.
        losses: training losses, first to last; [] leaves them out.

    Returns:
        "" if the accuracy is above the majority share by 0.02 (where that leaves room: by half of
        what is left to 1) and by two standard errors, and the loss has fallen by 1 %.

    Raises:
        DataError: shares outside 0..1.
    """
    for name, value in (("train_accuracy", train_accuracy), ("majority_share", majority_share)):
        if not 0.0 <= value <= 1.0:
            raise DataError(f"{name} = {value} is not between 0 and 1")
    margin = min(_MARGIN, (1.0 - majority_share) / 2)
    if num_cells:
        margin = max(
            margin, _SIGMAS * math.sqrt(majority_share * (1.0 - majority_share) / num_cells)
        )
        margin = min(margin, 1.0 - majority_share)
    if train_accuracy < majority_share + margin:
        return (
            f"did not train: right on {train_accuracy:.1%} of its own training cells, where always "
            f"saying the most frequent class is right on {majority_share:.1%}"
        )
    if any(not math.isfinite(loss) for loss in losses):
        return "did not train: a loss is NaN or infinite"
    if len(losses) > 1 and losses[-1] > losses[0] * (1.0 - _FALL):
        return f"did not train: the loss went from {losses[0]:.4g} to {losses[-1]:.4g}"
    return ""


def effective_batch(plan: Plan, *, workers: int, cells_global: int) -> int:
    """Cells of one optimizer step over all workers, whatever their forward passes hold.

    Args:
        plan: the order of the training cells.
        workers: ranks that share a step.
        cells_global: what the configuration says.

    Raises:
        ConfigError: the shares of the workers do not add up to it.
    """
    cells = sum(plan.share(rank, workers) for rank in range(workers))
    if cells != cells_global:
        raise ConfigError(
            f"{workers} workers train on {cells} cells a step, batch.cells_global is "
            f"{cells_global}: results at another batch size are not comparable"
        )
    return cells
