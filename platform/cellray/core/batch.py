"""A mini-batch as the model sees it, and what the model gives back.

A batch is padded (every cell as long as the longest) or packed (the cells end to end, no padding):
one class, because objectives and models differ between the two only where tokens of a cell meet.

Legend: B cells in a batch, T tokens per cell (padded to the longest of the batch), P tokens of all
cells of a packed batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from cellray.core.packing import Packing

__all__ = ["CellBatch", "ModelOutput", "pack", "unpack"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class CellBatch:
    """B cells with what an objective added to them.

    Shapes (in a packed batch P stands for (B, T), and ``packing`` says where each cell lies):
        cell_ids: (B,) int64 joinids.
        token_ids: (B, T) int64; padding holds the vocabulary's pad id.
        values: (B, T) float32; what the family's tokenizer put beside each token.
        attention_mask: (B, T) bool, True at real tokens.
        targets: (B, T) what to predict (int64 ids or float32 values), or (B,) class codes.
        target_mask: bool of ``targets``' shape, True where a loss is counted.
        unknown_mask: (B, T) bool, True at tokens whose value is hidden (generative objectives).
        covariates: name -> (B,) int64 codes (batch, modality, perturbation, label ...).
        step: the optimizer step the batch belongs to; 0 outside training.
        cell_prompt: ask a generative model for a second pass prompted by the cell embedding.
        packing: where the cells of a packed batch lie; None in a padded batch. A packed batch has
            no padding: its ``attention_mask`` is True everywhere.
        counts: targets and real tokens, counted on the host before the batch went to a GPU, so
            that nothing waits for it; None counts anew.
    """

    cell_ids: Tensor
    token_ids: Tensor
    values: Tensor
    attention_mask: Tensor
    targets: Tensor | None = None
    target_mask: Tensor | None = None
    unknown_mask: Tensor | None = None
    covariates: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    cell_prompt: bool = False
    packing: Packing | None = None
    counts: tuple[int, int] | None = None

    def __len__(self) -> int:
        return int(self.cell_ids.shape[0])

    @property
    def num_targets(self) -> int:
        """How many positions the loss is summed over; 0 if no objective has touched the batch."""
        if self.counts is not None:
            return self.counts[0]
        return 0 if self.target_mask is None else int(self.target_mask.sum())

    @property
    def num_real_tokens(self) -> int:
        """Tokens that are not padding."""
        if self.counts is not None:
            return self.counts[1]
        return int(self.attention_mask.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest cell (T of a padded batch)."""
        return int(self.token_ids.shape[1]) if self.packing is None else self.packing.max_length

    def token_rows(self) -> Tensor:
        """Number in the batch of every token's cell, int64 of ``token_ids``' shape."""
        if self.packing is not None:
            return self.packing.rows
        rows_B = torch.arange(len(self), device=self.token_ids.device)
        return rows_B[:, None].expand(self.token_ids.shape)

    def first_tokens(self, hidden: Tensor) -> Tensor:
        """What a (B, T, D) or (P, D) tensor holds at the first token of every cell, (B, D)."""
        return hidden[:, 0] if self.packing is None else hidden[self.packing.starts]

    def with_first_tokens(self, hidden: Tensor, first_BD: Tensor) -> Tensor:
        """A (B, T, D) or (P, D) tensor with other first tokens."""
        if self.packing is None:
            return torch.cat([first_BD[:, None], hidden[:, 1:]], dim=1)
        return hidden.index_copy(0, self.packing.starts, first_BD)

    def to_tokens(self, cells_BD: Tensor) -> Tensor:
        """A vector per cell laid beside its tokens: (B, 1, D), which broadcasts, or (P, D)."""
        return cells_BD[:, None] if self.packing is None else cells_BD[self.packing.rows]

    def lengths(self) -> Tensor:
        """(B,) real tokens of every cell."""
        if self.packing is not None:
            return self.packing.cu_lengths.diff()
        return self.attention_mask.sum(1)

    def to(self, device: torch.device | str) -> CellBatch:
        """The same batch on ``device``."""
        if self.token_ids.device == torch.device(device):
            return self
        counts = (self.num_targets, self.num_real_tokens)
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, counts=counts)

    def pinned(self) -> CellBatch:
        """The same batch in host memory that a GPU copies from without waiting."""
        return self._each(lambda tensor: tensor.pin_memory())

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self._each(note)
        return found

    def _each(self, change: Callable[[Tensor], Tensor]) -> CellBatch:
        moved: dict[str, Any] = {
            f.name: change(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        covariates = {k: change(v) for k, v in self.covariates.items()}
        packing = None if self.packing is None else self.packing.each(change)
        return replace(self, covariates=covariates, packing=packing, **moved)


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass gives.

    Shapes:
        hidden: (B, T, D) last hidden states; (P, D) of a packed batch.
        cell: (B, D) cell embedding used for training heads.
        predictions: name -> tensor; each objective names the prediction it reads.
        panel: (B, S, D) last hidden states of a sequence of the model's own (a fixed gene panel,
            pathways), None for models that have none.
    """

    hidden: Tensor
    cell: Tensor
    predictions: Mapping[str, Tensor] = field(default_factory=dict)
    panel: Tensor | None = None


def _per_token(batch: CellBatch) -> dict[str, Tensor]:
    """The fields that hold something for every token, by name; class targets are none of them."""
    shape = batch.token_ids.shape
    names = ("token_ids", "values", "attention_mask", "targets", "target_mask", "unknown_mask")
    found = {name: getattr(batch, name) for name in names}
    return {k: v for k, v in found.items() if v is not None and v.shape == shape}


def pack(batch: CellBatch) -> CellBatch:
    """Lay the cells of a padded batch end to end; a packed batch is given back as it is.

    The inverse of :func:`unpack` for a batch padded to its longest cell with that pad id.
    """
    if batch.packing is not None:
        return batch
    mask_BT = batch.attention_mask
    flat: dict[str, Any] = {name: value[mask_BT] for name, value in _per_token(batch).items()}
    packing = Packing.of(mask_BT.sum(1).cpu().numpy()).to(mask_BT.device)
    return replace(batch, packing=packing, **flat)


def unpack(batch: CellBatch, *, pad: int) -> CellBatch:
    """Pad the cells of a packed batch to the longest; a padded batch is given back as it is.

    If every cell has one token, (B,) class targets cannot be told from targets per token, and both
    become (B, 1).

    Args:
        batch: packed or padded.
        pad: token id of ``<pad>``; values and masks are 0 and False at padding.
    """
    packing = batch.packing
    if packing is None:
        return batch
    padded: dict[str, Any] = {}
    for name, flat in _per_token(batch).items():
        fill = pad if flat.dtype == torch.int64 else 0
        padded[name] = flat.new_full((len(batch), packing.max_length), fill)
        padded[name][packing.rows, packing.positions] = flat
    return replace(batch, packing=None, **padded)
