"""Exact multi-head attention: over a cell's tokens, and scGPT's generative block form.

:func:`attend` is the one call: padded or packed cells, with or without the generative mask, by the
kernel that serves best here. All give the same numbers up to rounding.

Legend: B cells, T tokens, H heads, K width of a head, D width (H * K), P tokens of a packed batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from cellray.core.errors import ConfigError
from cellray.core.packing import Packing
from cellray.nn.varlen import (
    EXTRA_COLUMNS,
    NEVER,
    flex_packed,
    varlen_packed,
    varlen_serves,
)

__all__ = [
    "LONG_CELLS",
    "Kernel",
    "SelfAttention",
    "attend",
    "attention_probabilities",
    "generative_attention",
    "padded_attention",
]

Tensor = torch.Tensor

Kernel = Literal["auto", "sdpa", "varlen", "flex"]

# Cells of so many tokens on average are worth a call each on a CPU; shorter ones go in groups.
LONG_CELLS = 64


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
    return functional.scaled_dot_product_attention(
        q_BHTK, k_BHTK, v_BHTK, attn_mask=_mask(keys_BT), dropout_p=dropout
    )


def _mask(keys_BS: Tensor) -> Tensor | None:
    """(B, 1, 1, S), None where every key is real: the kernel is faster without."""
    # Asking costs nothing on a CPU, and would make a GPU wait for the host.
    everything = keys_BS.device.type == "cpu" and bool(keys_BS.all())
    return None if everything else keys_BS[:, None, None, :]


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
    exact_BHT = exact_BHT.masked_fill(~unknown_BT[:, None, :], NEVER)
    self_BHT = exact_BHT.to(q_BHTK.dtype)
    self_rest_BHT = (exact_BHT - self_BHT.float()).to(q_BHTK.dtype)
    q = functional.pad(q_BHTK, (0, EXTRA_COLUMNS))
    q[..., width] = self_BHT
    q[..., width + 1] = self_rest_BHT
    k_BHSK, v_BHSK, keys_BS = _known_first(k_BHTK, v_BHTK, keys_BT & ~unknown_BT)
    # One row more for the virtual key and its value.
    k = functional.pad(k_BHSK, (0, EXTRA_COLUMNS, 0, 1))
    k[..., -1, width : width + 2] = 1.0
    v = functional.pad(v_BHSK, (0, EXTRA_COLUMNS, 0, 1))
    v[..., -1, width] = 1.0
    mask = _mask(functional.pad(keys_BS, (0, 1), value=True))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=1 / math.sqrt(width)
    )
    return out[..., :width] + out[..., width, None] * v_BHTK


def _known_first(k_BHTK: Tensor, v_BHTK: Tensor, known_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of known tokens only, S of the cell that has most, and which are real.

    A quarter to three quarters of a cell are unknown, and no query needs their keys. Counting
    them would make a GPU wait for the host, so there all stay and are masked.
    """
    if k_BHTK.device.type != "cpu":
        return k_BHTK, v_BHTK, known_BT
    if len(known_BT) == 1:
        index_S = torch.nonzero(known_BT[0])[:, 0]
        k_1HSK, v_1HSK = (x.index_select(2, index_S) for x in (k_BHTK, v_BHTK))
        return k_1HSK, v_1HSK, known_BT.new_ones(1, len(index_S))
    counts_B = known_BT.sum(1)
    most = int(counts_B.max())
    index_BS = torch.argsort(~known_BT, dim=1, stable=True)[:, :most]
    at_BHSK = index_BS[:, None, :, None].expand(-1, k_BHTK.shape[1], -1, k_BHTK.shape[3])
    keys_BS = torch.arange(most) < counts_B[:, None]
    return k_BHTK.gather(2, at_BHSK), v_BHTK.gather(2, at_BHSK), keys_BS


def attention_probabilities(q_BHTK: Tensor, k_BHTK: Tensor, keys_BT: Tensor) -> Tensor:
    """What :func:`padded_attention` weighs by, (B, H, T, T) float32; 0 at padding both ways."""
    with torch.autocast(q_BHTK.device.type, enabled=False):
        logits = q_BHTK.float() @ k_BHTK.float().transpose(-1, -2) / math.sqrt(q_BHTK.shape[-1])
    logits = logits.masked_fill(~keys_BT[:, None, None, :], -math.inf)
    return torch.softmax(logits, dim=-1) * keys_BT[:, None, :, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor | Packing,
    unknown: Tensor | None = None,
    *,
    dropout: float = 0.0,
    kernel: Kernel = "auto",
) -> Tensor:
    """Attention of every token to the tokens of its cell.

    Args:
        q: queries, (B, H, T, K) of padded cells, (P, H, K) of packed ones.
        k: keys, likewise.
        v: values, likewise.
        layout: of padded cells (B, T) bool, True at tokens that may be attended to; of packed cells
            where they lie.
        unknown: bool, True at tokens whose value is hidden: the generative mask, under which they
            are attended to by themselves only; None for full attention.
        dropout: probability of dropping an attention weight.
        kernel: ``sdpa``: torch's scaled dot product, for packed cells once for each group of like
            length; ``varlen``: FlashAttention's variable-length kernels and ``flex``:
            FlexAttention, for packed cells on a GPU; ``auto``: ``varlen`` where it serves, else
            ``sdpa``. Padded cells always take ``sdpa``.

    Returns:
        Of ``q``'s shape.

    Raises:
        ConfigError: the kernel does not serve here.
    """
    if not isinstance(layout, Packing):
        if unknown is None:
            return padded_attention(q, k, v, layout, dropout=dropout)
        return generative_attention(q, k, v, layout, unknown, dropout=dropout)
    serves = varlen_serves(q.device, q.dtype, dropout)
    if kernel == "varlen" and not serves:
        raise ConfigError(
            f"model.attention = 'varlen' needs a GPU, half precision and flash-attn (or no "
            f"dropout); here: {q.device.type}, {q.dtype}, dropout {dropout}; take 'auto'"
        )
    if kernel == "flex":
        if dropout:
            raise ConfigError(
                "model.attention = 'flex' has no dropout of attention weights; set the model's "
                "dropout to 0, or take 'auto'"
            )
        return flex_packed(q, k, v, layout, unknown)
    if kernel != "sdpa" and serves:
        return varlen_packed(q, k, v, layout, unknown, dropout=dropout)
    if q.device.type == "cpu" and len(q) >= LONG_CELLS * len(layout.starts):
        return _by_cells(q, k, v, layout, unknown, dropout)
    return _by_groups(q, k, v, layout, unknown, dropout)


def _by_cells(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, unknown: Tensor | None, dropout: float
) -> Tensor:
    """Packed attention, one call for each cell, (P, H, K): nothing is copied, filled up or masked.

    A cell of some length keeps a CPU busy by itself, and under the generative mask cells of one
    length have known tokens in very different numbers.
    """
    lengths = packing.cu_lengths.diff().tolist()
    hidden: Sequence[Tensor | None] = [None] * len(lengths)
    if unknown is not None:
        hidden = torch.split(unknown[None], lengths, dim=1)
    cells = zip(*(torch.split(x, lengths) for x in (q, k, v)), strict=True)
    parts = []
    for cell, hidden_1T in zip(cells, hidden, strict=True):
        ours, theirs, values = (x.transpose(0, 1)[None] for x in cell)
        real_1T = torch.ones((1, len(cell[0])), dtype=torch.bool)
        mixed = attend(ours, theirs, values, real_1T, hidden_1T, dropout=dropout)
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


def _by_groups(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, unknown: Tensor | None, dropout: float
) -> Tensor:
    """Packed attention, one call for each group of cells of like length, (P, H, K).

    Only inside a group is a cell filled up, by less than a fifth.
    """
    parts = []
    for group in packing.groups:
        ours, theirs, values = (x[group.tokens_bt].transpose(1, 2) for x in (q, k, v))
        hidden_bt = None if unknown is None else unknown[group.tokens_bt]
        mixed = attend(ours, theirs, values, group.real_bt, hidden_bt, dropout=dropout)
        parts.append(mixed.transpose(1, 2)[group.real_bt])
    return torch.cat(parts)[packing.restore]


class _Projection(nn.Linear):
    """(..., D) -> queries, keys and values, each (..., D).

    One product on a GPU. On a CPU three, whose results lie in memory as attention reads them.
    """

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        if hidden.device.type != "cpu":
            return super().forward(hidden).chunk(3, dim=-1)
        parts = zip(self.weight.chunk(3), self.bias.chunk(3), strict=True)
        return tuple(functional.linear(hidden, weight, bias) for weight, bias in parts)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    Args:
        width: D, a multiple of ``num_heads``.
        num_heads: H.
        dropout: probability of dropping an attention weight in training.
        project_unknown: whether the output projection is applied at unknown tokens, too.
            scGPT's published weights were trained without it.
        kernel: see :func:`attend`.
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        dropout: float,
        project_unknown: bool = True,
        kernel: Kernel = "auto",
    ) -> None:
        super().__init__()
        assert width % num_heads == 0, f"width {width} is not a multiple of {num_heads} heads"
        self.num_heads = num_heads
        self.dropout = dropout
        self.project_unknown = project_unknown
        self.kernel: Kernel = kernel
        self.qkv = _Projection(width, 3 * width)
        self.out = nn.Linear(width, width)

    def heads(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, K)."""
        q, k, v = (self._split(x).transpose(1, 2) for x in self.qkv(hidden_BTD))
        return q, k, v

    def _split(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H, K)."""
        return x.view(*x.shape[:-1], self.num_heads, -1)

    def forward(
        self,
        hidden_BTD: Tensor,
        keys_BT: Tensor,
        unknown_BT: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or (P, D) -> (P, D); with ``unknown_BT`` the generative form."""
        dropout = self.dropout if self.training else 0.0
        if packing is None:
            q, k, v = self.heads(hidden_BTD)
            mixed = attend(q, k, v, keys_BT, unknown_BT, dropout=dropout, kernel=self.kernel)
            mixed_BTD = mixed.transpose(1, 2).flatten(2)
        else:
            q, k, v = (self._split(x) for x in self.qkv(hidden_BTD))
            mixed = attend(q, k, v, packing, unknown_BT, dropout=dropout, kernel=self.kernel)
            mixed_BTD = mixed.flatten(1)
        out_BTD: Tensor = self.out(mixed_BTD)
        if unknown_BT is None or self.project_unknown:
            return out_BTD
        return torch.where(unknown_BT[..., None], mixed_BTD.to(out_BTD.dtype), out_BTD)

    def probabilities(self, hidden_BTD: Tensor, keys_BT: Tensor) -> Tensor:
        """Attention weights without dropout, (B, H, T, T) float32."""
        q, k, _ = self.heads(hidden_BTD)
        return attention_probabilities(q, k, keys_BT)
