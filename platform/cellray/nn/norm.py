"""Batch norm as models here need it: counted in float32, and content with a single row."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["RowNorm"]

Tensor = torch.Tensor


class RowNorm(nn.BatchNorm1d):
    """Batch norm over rows, in float32 whatever the precision of rows and weights.

    A single row has no variance: in training it is normed by the running statistics and leaves
    them as they are. Parameters and buffers are those of ``nn.BatchNorm1d``.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N, D) of the same dtype."""
        assert self.num_batches_tracked is not None
        counts = self.training and len(rows) > 1
        if counts:
            self.num_batches_tracked.add_(1)
        weight, bias = (None if w is None else w.float() for w in (self.weight, self.bias))
        with torch.autocast(rows.device.type, enabled=False):
            normed = functional.batch_norm(
                rows.float(), self.running_mean, self.running_var, weight, bias,
                training=counts, momentum=self.momentum or 0.0, eps=self.eps,
            )  # fmt: skip
        return normed.to(rows.dtype)
