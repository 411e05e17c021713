"""Running statistics of batch norms: one set for all ranks, and back where a step is left out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["KeptStatistics", "share_statistics"]


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


class KeptStatistics:
    """The running statistics of one moment.

    Args:
        module: whose batch norms are looked at.
    """

    def __init__(self, module: nn.Module) -> None:
        buffers = [b for norm in _norms(module) for b in norm.buffers(recurse=False)]
        self._kept = [(buffer, buffer.clone()) for buffer in buffers]

    def put_back(self) -> None:
        """Let the batch norms forget what they have seen since."""
        for buffer, kept in self._kept:
            buffer.copy_(kept)


def share_statistics(module: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics; collective.

    A rank weighs as many batches as it has seen, so that one that never saw a technical batch says
    nothing about it. In training each rank norms by its own cells, as batch norm does; what is
    evaluated and saved is the same on all of them.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    norms = _norms(module)
    if not norms:
        return
    with torch.no_grad():
        for norm in norms:
            mean, variance, seen = norm.running_mean, norm.running_var, norm.num_batches_tracked
            assert mean is not None
            assert variance is not None
            assert seen is not None
            weight = seen.to(torch.float64)
            sums = torch.cat([mean.double() * weight, variance.double() * weight, weight[None]])
            dist.all_reduce(sums)
            total = sums[-1]
            if total == 0:
                continue
            width = len(mean)
            mean.copy_(sums[:width] / total)
            variance.copy_(sums[width : 2 * width] / total)
            seen.copy_((total / dist.get_world_size()).ceil().to(seen.dtype))
