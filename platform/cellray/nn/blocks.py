"""The post-norm transformer encoder that Geneformer and scGPT share.

Legend: B cells, T tokens, H heads, D width, F inner width of the feed-forward layer, P tokens of
a packed batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from cellray.core.packing import Packing
from cellray.nn.attention import Kernel, SelfAttention

__all__ = ["Activation", "BlockSpec", "Encoder", "EncoderBlock"]

Tensor = torch.Tensor
Activation = Literal["relu", "gelu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class BlockSpec:
    """Sizes and rates of a block.

    Attributes:
        width: D.
        num_heads: H.
        ffn_width: F.
        activation: of the feed-forward layer.
        dropout: after attention and after the feed-forward layer.
        attention_dropout: on attention weights.
        inner_dropout: after the feed-forward activation.
        layer_norm_eps: epsilon of both layer norms.
        project_unknown: see :class:`cellray.nn.attention.SelfAttention`.
        kernel: see :func:`cellray.nn.attention.attend`.
    """

    width: int
    num_heads: int
    ffn_width: int
    activation: Activation = "relu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    inner_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    project_unknown: bool = True
    kernel: Kernel = "auto"


class EncoderBlock(nn.Module):
    """``x = norm(x + attention(x)); x = norm(x + feed_forward(x))``."""

    recomputable: ClassVar[bool] = True

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.attention = SelfAttention(
            spec.width,
            num_heads=spec.num_heads,
            dropout=spec.attention_dropout,
            project_unknown=spec.project_unknown,
            kernel=spec.kernel,
        )
        self.attention_norm = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.expand = nn.Linear(spec.width, spec.ffn_width)
        self.activation = _ACTIVATIONS[spec.activation]()
        self.inner_dropout = nn.Dropout(spec.inner_dropout)
        self.contract = nn.Linear(spec.ffn_width, spec.width)
        self.ffn_norm = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(
        self,
        hidden_BTD: Tensor,
        keys_BT: Tensor,
        unknown_BT: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or packed (P, D) -> (P, D)."""
        mixed_BTD = self.attention(hidden_BTD, keys_BT, unknown_BT, packing)
        hidden_BTD = self.attention_norm(hidden_BTD + self.dropout(mixed_BTD))
        inner_BTF = self.inner_dropout(self.activation(self.expand(hidden_BTD)))
        out_BTD: Tensor = self.ffn_norm(hidden_BTD + self.dropout(self.contract(inner_BTF)))
        return out_BTD


class Encoder(nn.Module):
    """A stack of equal blocks.

    Args:
        spec: sizes of every block.
        num_layers: how many.
    """

    def __init__(self, spec: BlockSpec, *, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(spec) for _ in range(num_layers))

    def forward(
        self,
        hidden_BTD: Tensor,
        keys_BT: Tensor,
        unknown_BT: Tensor | None = None,
        *,
        packing: Packing | None = None,
        num_layers: int | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D), or packed (P, D); ``num_layers`` None takes every block."""
        for block in self.blocks[:num_layers]:
            hidden_BTD = block(hidden_BTD, keys_BT, unknown_BT, packing)
        return hidden_BTD

    def probabilities(self, hidden_BTD: Tensor, keys_BT: Tensor, *, layer: int) -> Tensor:
        """Attention weights of one layer (negative counts from the last), (B, H, T, T) float32."""
        index = range(len(self.blocks))[layer]
        hidden_BTD = self.forward(hidden_BTD, keys_BT, num_layers=index)
        block = self.blocks[index]
        assert isinstance(block, EncoderBlock)
        return block.attention.probabilities(hidden_BTD, keys_BT)
