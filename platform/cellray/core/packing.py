"""Where the cells of a packed batch lie, and which of them attention may take together.

Legend: B cells, P tokens of all cells laid end to end, b cells of a group, t tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["LengthGroup", "Packing"]

Tensor = torch.Tensor

# Cells of a group differ by less than this factor in length.
_SPREAD = 1.2


@dataclass(frozen=True)
class LengthGroup:
    """Cells of like length, which one attention call takes.

    Shapes:
        tokens_bt: (b, t) int64 places in the packed batch; past a cell's end some token of it.
        real_bt: (b, t) bool, False past a cell's end.
    """

    tokens_bt: Tensor
    real_bt: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> LengthGroup:
        """The same group of changed tensors."""
        return LengthGroup(change(self.tokens_bt), change(self.real_bt))


@dataclass(frozen=True)
class Packing:
    """Cells laid end to end.

    Shapes:
        cu_lengths: (B+1,) int32 cumulative lengths, from 0 to P.
        starts: (B,) int64 place of every cell's first token.
        rows: (P,) int64 number of each token's cell.
        positions: (P,) int64 position of each token within its cell.
        max_length: tokens of the longest cell.
        groups: the cells by length, every cell in one group; at most one group for each factor
            of 1.2 between the shortest and the longest cell.
        restore: (P,) int64; the groups' real tokens, one group after the other, taken at
            ``restore`` are in the batch's order again.
    """

    cu_lengths: Tensor
    starts: Tensor
    rows: Tensor
    positions: Tensor
    max_length: int
    groups: tuple[LengthGroup, ...]
    restore: Tensor

    @classmethod
    def of(cls, lengths: npt.NDArray[np.integer]) -> Packing:
        """The packing of cells of these (B,) lengths, each at least 1."""
        lengths = np.asarray(lengths, dtype=np.int64)
        assert lengths.min(initial=1) >= 1, "a cell has at least one token, a pad token if need be"
        ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
        rows = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
        positions = np.arange(ends[-1], dtype=np.int64) - ends[:-1][rows]
        bucket = np.floor(np.log(np.maximum(lengths, 1)) / np.log(_SPREAD)).astype(np.int64)
        groups, places = [], []
        for key in np.unique(bucket):
            cells = np.flatnonzero(bucket == key)
            columns = np.arange(lengths[cells].max())
            real = columns < lengths[cells, None]
            tokens = ends[cells, None] + np.minimum(columns, lengths[cells, None] - 1)
            places.append(tokens[real])
            groups.append(LengthGroup(torch.from_numpy(tokens), torch.from_numpy(real)))
        restore = np.empty(ends[-1], dtype=np.int64)
        if places:
            restore[np.concatenate(places)] = np.arange(ends[-1])
        return cls(
            cu_lengths=torch.from_numpy(ends.astype(np.int32)),
            starts=torch.from_numpy(ends[:-1].copy()),
            rows=torch.from_numpy(rows),
            positions=torch.from_numpy(positions),
            max_length=int(lengths.max(initial=1)),
            groups=tuple(groups),
            restore=torch.from_numpy(restore),
        )

    def to(self, device: torch.device | str) -> Packing:
        """The same packing on ``device``."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def each(self, change: Callable[[Tensor], Tensor]) -> Packing:
        """The same packing of changed tensors (elsewhere, pinned)."""
        return Packing(
            cu_lengths=change(self.cu_lengths),
            starts=change(self.starts),
            rows=change(self.rows),
            positions=change(self.positions),
            max_length=self.max_length,
            groups=tuple(group.each(change) for group in self.groups),
            restore=change(self.restore),
        )
