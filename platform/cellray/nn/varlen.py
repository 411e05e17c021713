"""Attention over packed cells in one kernel: FlashAttention's variable-length form, or Flex.

Both are for GPUs. The variable-length kernels are those of the package ``flash-attn`` where it is
installed (only they drop attention weights out), else torch's own; they take half precision. The
generative mask needs no mask there: a cell's keys are its known tokens and one virtual key, which
carries each unknown query's own logit (see :func:`cellray.nn.attention.generative_attention`).

Legend: B cells, P tokens of all cells, H heads, K width of a head.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from cellray.core.packing import Packing

__all__ = ["flex_packed", "known_keys", "varlen_packed", "varlen_serves"]

Tensor = torch.Tensor
# (q, k, v, cumulative query lengths, cumulative key lengths, longest of each, scale, dropout)
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, float], Tensor]

EXTRA_COLUMNS = 8
NEVER = -30_000.0


def varlen_serves(device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    """Whether a variable-length kernel takes tensors of this kind here."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return _has_flash_attn() or (dropout == 0 and _has_torch_varlen())


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@cache
def _has_torch_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    dropout: float,
) -> Tensor:
    """The kernel that is installed."""
    if _has_flash_attn():
        flash: Any = importlib.import_module("flash_attn")
        out: Tensor = flash.flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=dropout, softmax_scale=scale
        )
        return out
    module: Any = importlib.import_module("torch.nn.attention.varlen")
    out = module.varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale)
    return out


def known_keys(packing: Packing, unknown_P: Tensor) -> tuple[Tensor, Tensor]:
    """Where a cell's keys come from when unknown tokens are none: indices, cumulative lengths.

    The indices are into (P + 1) tokens, the last being the virtual key that ends every cell.
    """
    known_P = ~unknown_P
    num_cells = len(packing.starts)
    counts_B = torch.zeros(num_cells, dtype=torch.int64, device=known_P.device)
    counts_B = counts_B.index_add(0, packing.rows, known_P.long()) + 1
    cu_K = functional.pad(torch.cumsum(counts_B, 0), (1, 0))
    index = torch.full((int(cu_K[-1]),), len(known_P), dtype=torch.int64, device=known_P.device)
    order_P = torch.cumsum(known_P.long(), 0) - 1 + packing.rows  # one virtual key a cell before
    index[order_P[known_P]] = torch.nonzero(known_P).squeeze(-1)
    return index, cu_K.to(torch.int32)


def varlen_packed(
    q_PHK: Tensor,
    k_PHK: Tensor,
    v_PHK: Tensor,
    packing: Packing,
    unknown_P: Tensor | None = None,
    *,
    dropout: float = 0.0,
    kernel: Kernel = _kernel,
) -> Tensor:
    """Attention of every token to the (known) tokens of its cell, (P, H, K).

    Args:
        q_PHK: queries.
        k_PHK: keys.
        v_PHK: values.
        packing: where the cells lie.
        unknown_P: bool; the generative mask.
        dropout: probability of dropping an attention weight.
        kernel: the variable-length attention to use.
    """
    width = q_PHK.shape[-1]
    scale, longest = 1 / math.sqrt(width), packing.max_length
    cu_q = packing.cu_lengths
    if unknown_P is None:
        return kernel(q_PHK, k_PHK, v_PHK, cu_q, cu_q, longest, longest, scale, dropout)
    own_PH = (q_PHK.float() * k_PHK.float()).sum(-1)
    own_PH = own_PH.masked_fill(~unknown_P[:, None], NEVER)
    first_PH = own_PH.to(q_PHK.dtype)
    q = functional.pad(q_PHK, (0, EXTRA_COLUMNS))
    q[..., width] = first_PH
    q[..., width + 1] = (own_PH - first_PH.float()).to(q_PHK.dtype)
    k = functional.pad(k_PHK, (0, EXTRA_COLUMNS, 0, 0, 0, 1))
    k[-1, :, width : width + 2] = 1.0
    v = functional.pad(v_PHK, (0, EXTRA_COLUMNS, 0, 0, 0, 1))
    v[-1, :, width] = 1.0
    index, cu_k = known_keys(packing, unknown_P)
    out = kernel(q, k[index], v[index], cu_q, cu_k, longest, longest + 1, scale, dropout)
    return out[..., :width] + out[..., width, None] * v_PHK


def flex_packed(
    q_PHK: Tensor,
    k_PHK: Tensor,
    v_PHK: Tensor,
    packing: Packing,
    unknown_P: Tensor | None = None,
) -> Tensor:
    """The same through FlexAttention, without dropout; on a CPU without gradients."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = packing.rows, len(packing.rows)

    def same_cell(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = rows[query] == rows[key]
        if unknown_P is not None:
            allowed = allowed & (~unknown_P[key] | (query == key))
        return allowed

    mask = create_block_mask(same_cell, None, None, length, length, device=str(q_PHK.device))
    q, k, v = (x.transpose(0, 1)[None] for x in (q_PHK, k_PHK, v_PHK))
    out: Tensor = _flex(q_PHK.device.type)(q, k, v, block_mask=mask)
    return out[0].transpose(0, 1)


@cache
def _flex(device: str) -> Callable[..., Any]:
    """FlexAttention, compiled where it has a kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cuda":
        return flex_attention
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled
