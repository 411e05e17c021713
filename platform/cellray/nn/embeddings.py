"""From token ids and values to vectors.

Legend: B cells, T tokens, D width, V tokens of the vocabulary, P positions, C categories.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = [
    "ConditionEmbedding",
    "ContinuousValueEncoder",
    "NormedEmbedding",
    "RankedEmbedding",
    "SoftBinEmbedding",
]

Tensor = torch.Tensor


class RankedEmbedding(nn.Module):
    """Gene and rank position, added, normed, dropped out: BERT's embedding.

    BERT's token type is always 0 here, so row 0 of its table is one vector added to every token;
    the table is kept with both rows so that published weights fit.

    Args:
        num_tokens: V.
        num_positions: P.
        width: D.
        layer_norm_eps: epsilon of the norm.
        dropout: after the norm.
    """

    def __init__(
        self,
        num_tokens: int,
        *,
        num_positions: int,
        width: int,
        layer_norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(num_tokens, width)
        self.position = nn.Embedding(num_positions, width)
        self.token_type = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, token_ids_BT: Tensor, positions_T: Tensor | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, D), or packed (P,) with its (P,) positions -> (P, D)."""
        if positions_T is None:
            positions_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
        types_T = torch.zeros_like(positions_T)
        places_TD = self.position(positions_T) + self.token_type(types_T)
        embedded_BTD: Tensor = self.dropout(self.norm(self.token(token_ids_BT) + places_TD))
        return embedded_BTD


class NormedEmbedding(nn.Module):
    """A table lookup followed by a layer norm: scGPT's gene encoder.

    Args:
        num_tokens: V.
        width: D.
    """

    def __init__(self, num_tokens: int, *, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_tokens, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(...) int64 -> (..., D)."""
        embedded: Tensor = self.norm(self.table(token_ids))
        return embedded


class ContinuousValueEncoder(nn.Module):
    """A number to a vector: clip, two linear layers, norm, dropout.

    Args:
        width: D.
        dropout: after the norm.
        max_value: values above are clipped; 512 in scGPT.
    """

    def __init__(self, width: int, *, dropout: float, max_value: float = 512.0) -> None:
        super().__init__()
        self.max_value = max_value
        self.lift = nn.Linear(1, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, values_BT: Tensor) -> Tensor:
        """(B, T) float -> (B, T, D)."""
        clipped_BT1 = values_BT.clamp(max=self.max_value)[..., None]
        encoded_BTD: Tensor = self.dropout(self.norm(self.mix(torch.relu(self.lift(clipped_BT1)))))
        return encoded_BTD


class ConditionEmbedding(nn.Module):
    """A vector per category of a covariate; a cell whose category is unknown (-1) gets zeros.

    Args:
        num_categories: C.
        width: D.
    """

    def __init__(self, num_categories: int, *, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_categories, width)

    def forward(self, codes_B: Tensor) -> Tensor:
        """(B,) int64 -> (B, D); also (..., ) -> (..., D)."""
        known_B1 = (codes_B >= 0)[..., None]
        embedded_BD: Tensor = self.table(codes_B.clamp(min=0)) * known_B1
        return embedded_BD


class SoftBinEmbedding(nn.Module):
    """A number as a weighted mean of learnt vectors: scFoundation's auto-discretisation.

    ``h = leaky_relu(W1 v + b1); w = softmax(W2 h + b2 + alpha h); e = w^T E``.

    Args:
        width: D.
        num_bins: vectors to mix.
        alpha: weight of the residual.
    """

    def __init__(self, width: int, *, num_bins: int, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.lift = nn.Linear(1, num_bins)
        self.mix = nn.Linear(num_bins, num_bins)
        self.table = nn.Embedding(num_bins, width)
        self.mask = nn.Parameter(torch.randn(width))
        # Stands where a cell has nothing to read; nothing depends on it, so it is not trained.
        self.pad = nn.Parameter(torch.randn(width), requires_grad=False)

    def forward(self, values: Tensor, *, pad: Tensor | None = None, mask: bool = False) -> Tensor:
        """(...) float -> (..., D); the pad vector where ``pad``, the mask vector if ``mask``."""
        if mask:
            return self.mask.expand(*values.shape, -1)
        lifted = functional.leaky_relu(self.lift(values[..., None]), 0.1)
        weights = torch.softmax(self.mix(lifted) + self.alpha * lifted, dim=-1)
        embedded: Tensor = weights @ self.table.weight.to(weights.dtype)
        if pad is None:
            return embedded
        return torch.where(pad[..., None], self.pad.to(embedded.dtype), embedded)
