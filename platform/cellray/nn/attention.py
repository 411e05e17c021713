"""Exact multi-head attention: over a cell's tokens, and scGPT's generative block form.

Legend: B cells, T tokens, H heads, K width of a head, D width (H * K), P tokens of a packed batch.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from cellray.core.packing import Packing

__all__ = ["SelfAttention", "attention_probabilities", "generative_attention", "padded_attention"]

Tensor = torch.Tensor

# A logit (before scaling) that no softmax keeps, within the range of every float type.
_NEVER = -30_000.0
# Attention kernels want head widths in multiples of 8; two columns are used.
_EXTRA_COLUMNS = 8


def padded_attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, keys_BT: Tensor, *, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of every token to the tokens of its cell.

    Args:
        q_BHTK: queries.
        k_BHTK: keys.
        v_BHTK: values.
        keys_BT: bool, True at tokens that may be attended to; at least one per cell.
        dropout: probability of dropping an attention weight.
    """
    mask_B11T = keys_BT[:, None, None, :]
    return functional.scaled_dot_product_attention(
        q_BHTK, k_BHTK, v_BHTK, attn_mask=mask_B11T, dropout_p=dropout
    )


def generative_attention(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTK: Tensor,
    keys_BT: Tensor,
    unknown_BT: Tensor,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Attention to the known tokens of a cell; an unknown token also attends to itself.

    The mask of scGPT's generative pretraining (doi:10.1038/s41592-024-02201-0) in one call with a
    mask per key only. A (T, T) mask is never built: every query gets one virtual key whose logit is
    the query's own q . k, carried in an extra column of the queries, and whose value is a unit
    vector in an extra column of the values, so that the weight it got can be read off and given to
    the query's own value. For known queries, which are among the keys already, that logit is so low
    that the weight is exactly 0.

    Args:
        q_BHTK: queries.
        k_BHTK: keys.
        v_BHTK: values.
        keys_BT: bool, True at tokens that are not padding.
        unknown_BT: bool, True at tokens whose value is hidden.
        dropout: probability of dropping an attention weight.
    """
    width = q_BHTK.shape[-1]
    # Two columns hold the logit and what rounding took from it, to keep it exact in bfloat16.
    exact_BHT = (q_BHTK.float() * k_BHTK.float()).sum(-1)
    exact_BHT = exact_BHT.masked_fill(~unknown_BT[:, None, :], _NEVER)
    self_BHT = exact_BHT.to(q_BHTK.dtype)
    self_rest_BHT = (exact_BHT - self_BHT.float()).to(q_BHTK.dtype)
    q = functional.pad(q_BHTK, (0, _EXTRA_COLUMNS))
    q[..., width] = self_BHT
    q[..., width + 1] = self_rest_BHT
    # One row more for the virtual key and its value.
    k = functional.pad(k_BHTK, (0, _EXTRA_COLUMNS, 0, 1))
    k[..., -1, width : width + 2] = 1.0
    v = functional.pad(v_BHTK, (0, _EXTRA_COLUMNS, 0, 1))
    v[..., -1, width] = 1.0
    mask_B11T = functional.pad(keys_BT & ~unknown_BT, (0, 1), value=True)[:, None, None, :]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_B11T, dropout_p=dropout, scale=1 / math.sqrt(width)
    )
    return out[..., :width] + out[..., width, None] * v_BHTK


def attention_probabilities(q_BHTK: Tensor, k_BHTK: Tensor, keys_BT: Tensor) -> Tensor:
    """What :func:`padded_attention` weighs by, (B, H, T, T) float32; 0 at padding both ways."""
    logits = q_BHTK.float() @ k_BHTK.float().transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])
    logits = logits.masked_fill(~keys_BT[:, None, None, :], -math.inf)
    return torch.softmax(logits, dim=-1) * keys_BT[:, None, :, None]


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Args:
        width: D, a multiple of ``num_heads``.
        num_heads: H.
        dropout: probability of dropping an attention weight in training.
        project_unknown: whether the output projection is applied at unknown tokens, too.
            scGPT's published weights were trained without it.
    """

    def __init__(
        self, width: int, *, num_heads: int, dropout: float, project_unknown: bool = True
    ) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not a multiple of {num_heads} heads"
        self.num_heads = num_heads
        self.dropout = dropout
        self.project_unknown = project_unknown
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def heads(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, K)."""
        batch, length, width = hidden_BTD.shape
        split = self.qkv(hidden_BTD).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(
        self,
        hidden_BTD: Tensor,
        keys_BT: Tensor,
        unknown_BT: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (P, D) -> (P, D); with ``unknown_BT`` the generative form."""
        if packing is None:
            mixed_BTD = self._mix(*self.heads(hidden_BTD), keys_BT, unknown_BT)
        else:
            mixed_BTD = self._mix_packed(hidden_BTD, unknown_BT, packing)
        out_BTD: Tensor = self.out(mixed_BTD)
        if unknown_BT is None or self.project_unknown:
            return out_BTD
        return torch.where(unknown_BT[..., None], mixed_BTD.to(out_BTD.dtype), out_BTD)

    def _mix(
        self, q: Tensor, k: Tensor, v: Tensor, keys_BT: Tensor, unknown_BT: Tensor | None
    ) -> Tensor:
        """Values of a cell's tokens weighed by attention, (B, T, D)."""
        dropout = self.dropout if self.training else 0.0
        if unknown_BT is None:
            mixed = padded_attention(q, k, v, keys_BT, dropout=dropout)
        else:
            mixed = generative_attention(q, k, v, keys_BT, unknown_BT, dropout=dropout)
        return mixed.transpose(1, 2).flatten(2)

    def _mix_packed(self, hidden_PD: Tensor, unknown_P: Tensor | None, packing: Packing) -> Tensor:
        """The same over packed cells, (P, D), one call for each group of cells of like length.

        Projections see no padding; only inside a group is a cell filled up, by less than a fifth.
        """
        split_P3HK = self.qkv(hidden_PD).view(len(hidden_PD), 3, self.num_heads, -1)
        parts = []
        for group in packing.groups:
            q, k, v = split_P3HK[group.tokens_bt].permute(2, 0, 3, 1, 4).unbind(0)
            unknown_bt = None if unknown_P is None else unknown_P[group.tokens_bt]
            mixed_btD = self._mix(q, k, v, group.real_bt, unknown_bt)
            parts.append(mixed_btD[group.real_bt])
        return torch.cat(parts)[packing.restore]

    def probabilities(self, hidden_BTD: Tensor, keys_BT: Tensor) -> Tensor:
        """Attention weights without dropout, (B, H, T, T) float32."""
        q, k, _ = self.heads(hidden_BTD)
        return attention_probabilities(q, k, keys_BT)
