"""Projection of genes to pathways along given memberships, and the blocks TOSICA puts on it.

A dense layer times a mask would hold genes x pathways x width numbers, almost all of them masked
zeros. Here only memberships have weights: (N, W) for N (gene, pathway) pairs.

Legend: B cells, G genes, P pathways, N memberships, W width, L members of the largest pathway of a
group, p pathways of a group, T tokens (CLS and pathways), H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

__all__ = ["PathwayBlock", "PathwayProjection", "attention_rollout"]

Tensor = torch.Tensor

# Pathways of a group differ by less than this factor in size.
_SPREAD = 1.25


class PathwayProjection(nn.Module):
    """(B, G) -> (B, P, W): each pathway's vector from its member genes alone.

    Pathways of like size are multiplied together, a group in one call, so that the cost is that of
    the memberships and at most a fourth more.

    Args:
        members: of each pathway, ascending gene positions; a pathway without any is its bias.
        num_genes: G.
        width: W.
    """

    def __init__(self, members: Sequence[Sequence[int]], *, num_genes: int, width: int) -> None:
        super().__init__()
        self.num_genes = num_genes
        self.members = [tuple(genes) for genes in members]
        total = sum(len(genes) for genes in self.members)
        self.weight = nn.Parameter(torch.empty(total, width))
        self.bias = nn.Parameter(torch.empty(len(self.members), width))
        bound = 1 / math.sqrt(num_genes)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self._groups = _groups(self.members, num_genes)
        order = [index for pathways, _, _ in self._groups for index in pathways.tolist()]
        self._restore = torch.argsort(torch.tensor(order, device="cpu"))

    def forward(self, values_BG: Tensor) -> Tensor:
        """(B, G) -> (B, P, W)."""
        device = values_BG.device
        if self._restore.device != device:
            self._groups = [tuple(t.to(device) for t in group) for group in self._groups]  # type: ignore[misc]
            self._restore = self._restore.to(device)
        padded = functional.pad(values_BG, (0, 1))  # a column of zeros for short pathways
        parts = []
        for _, genes_pL, pairs_pL in self._groups:
            seen_pBL = padded[:, genes_pL].transpose(0, 1)
            parts.append(torch.bmm(seen_pBL, self.weight[pairs_pL].to(seen_pBL.dtype)))
        return torch.cat(parts)[self._restore].transpose(0, 1) + self.bias


def _groups(
    members: Sequence[Sequence[int]], num_genes: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pathways (p,), their genes (p, L) and places in the weight (p, L), by like size."""
    starts = [0]
    for genes in members:
        starts.append(starts[-1] + len(genes))
    buckets: dict[int, list[int]] = {}
    for index, genes in enumerate(members):
        buckets.setdefault(int(math.log(max(len(genes), 1), _SPREAD)), []).append(index)
    groups = []
    for key in sorted(buckets):
        pathways = buckets[key]
        longest = max(1, *(len(members[index]) for index in pathways))
        shape = (len(pathways), longest)
        genes_pL = torch.full(shape, num_genes, dtype=torch.int64, device="cpu")
        pairs_pL = torch.zeros(shape, dtype=torch.int64, device="cpu")
        for row, index in enumerate(pathways):
            length = len(members[index])
            genes_pL[row, :length] = torch.tensor(members[index], device="cpu")
            pairs_pL[row, :length] = torch.arange(starts[index], starts[index + 1], device="cpu")
        groups.append((torch.tensor(pathways, device="cpu"), genes_pL, pairs_pL))
    return groups


class PathwayBlock(nn.Module):
    """``x = x + attention(norm(x)); x = x + mlp(norm(x))``, each dropped whole now and then.

    Args:
        width: W, a multiple of ``num_heads``.
        num_heads: H.
        dropout: after attention, inside and after the mlp, and on attention weights.
        drop_path: probability that a cell skips a branch in training (stochastic depth).
    """

    recomputable: ClassVar[bool] = True

    def __init__(self, width: int, *, num_heads: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.drop_path = drop_path
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BTW: Tensor) -> Tensor:
        """(B, T, W) -> (B, T, W)."""
        q, k, v = self._heads(hidden_BTW)
        rate = self.dropout.p if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        out = self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        hidden_BTW = hidden_BTW + self._skip(out)
        inner = self.dropout(functional.gelu(self.expand(self.mlp_norm(hidden_BTW))))
        return hidden_BTW + self._skip(self.dropout(self.contract(inner)))

    def weights(self, hidden_BTW: Tensor) -> Tensor:
        """Attention weights without dropout, (B, H, T, T) float32."""
        q, k, _ = self._heads(hidden_BTW)
        with torch.autocast(q.device.type, enabled=False):
            logits = q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])
        return torch.softmax(logits, dim=-1)

    def _heads(self, hidden_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        split = self.qkv(self.attention_norm(hidden_BTW))
        split = split.view(*hidden_BTW.shape[:2], 3, self.num_heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _skip(self, branch_BTW: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch_BTW
        keep = 1 - self.drop_path
        kept_B11 = torch.rand(len(branch_BTW), 1, 1, device=branch_BTW.device) < keep
        return branch_BTW * (kept_B11 / keep).to(branch_BTW.dtype)


def attention_rollout(weights: Sequence[Tensor]) -> Tensor:
    """Attention followed through the layers and their residuals (arXiv:2005.00928).

    Per layer the mean over heads plus the identity, rows normalised; layers multiplied.

    Args:
        weights: of each layer, first to last, (B, H, T, T).

    Returns:
        (B, T, T); row i says what token i was made of.
    """
    joint: Tensor | None = None
    for layer_BHTT in weights:
        mean_BTT = layer_BHTT.mean(1)
        eye_TT = torch.eye(mean_BTT.shape[-1], device=mean_BTT.device, dtype=mean_BTT.dtype)
        step_BTT = mean_BTT + eye_TT
        step_BTT = step_BTT / step_BTT.sum(-1, keepdim=True)
        with torch.autocast(step_BTT.device.type, enabled=False):
            joint = step_BTT if joint is None else step_BTT @ joint
    assert joint is not None, "at least one layer"
    return joint
