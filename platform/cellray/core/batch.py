"""A mini-batch as the model sees it, and what the model gives back.

Legend: B cells in a batch, T tokens per cell (padded to the longest of the batch), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

__all__ = ["CellBatch", "ModelOutput"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class CellBatch:
    """B padded cells with what an objective added to them.

    Shapes:
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

    def __len__(self) -> int:
        return int(self.cell_ids.shape[0])

    @property
    def num_targets(self) -> int:
        """How many positions the loss is summed over; 0 if no objective has touched the batch."""
        return 0 if self.target_mask is None else int(self.target_mask.sum())

    @property
    def num_real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str) -> CellBatch:
        """The same batch on ``device``."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        covariates = {k: v.to(device, non_blocking=True) for k, v in self.covariates.items()}
        return replace(self, covariates=covariates, **moved)


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass gives.

    Shapes:
        hidden: (B, T, D) last hidden states.
        cell: (B, D) cell embedding used for training heads.
        predictions: name -> tensor; each objective names the prediction it reads.
    """

    hidden: Tensor
    cell: Tensor
    predictions: Mapping[str, Tensor] = field(default_factory=dict)
