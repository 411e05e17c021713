"""The Performer encoder that scBERT and scFoundation's decoder share: pre-norm blocks of FAVOR+.

Legend: B cells, T tokens, D width, F inner width of the feed-forward layer, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from cellray.nn.favor import FavorAttention, KeyMax

__all__ = ["Performer", "PerformerBlock", "PerformerSpec", "RedrawSchedule"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class PerformerSpec:
    """Sizes of a stack.

    Attributes:
        width: D.
        num_layers: blocks.
        num_heads: H.
        head_width: width of a head; H * ``head_width`` need not be D.
        ffn_width: F.
        bias: whether queries, keys and values have biases.
        dropout: after attention and after the feed-forward layer.
        key_max: see :func:`cellray.nn.favor.favor_attention`.
        redraw_every: optimizer steps between two draws of random features; 0 keeps the first.
    """

    width: int
    num_layers: int
    num_heads: int
    head_width: int
    ffn_width: int
    bias: bool
    dropout: float = 0.0
    key_max: KeyMax = "cell"
    redraw_every: int = 1000


class PerformerBlock(nn.Module):
    """``x = x + attention(norm(x)); x = x + feed_forward(norm(x))``, with GELU."""

    recomputable: ClassVar[bool] = True

    def __init__(self, spec: PerformerSpec) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(spec.width)
        self.attention = FavorAttention(
            spec.width,
            num_heads=spec.num_heads,
            head_width=spec.head_width,
            bias=spec.bias,
            key_max=spec.key_max,
        )
        self.ffn_norm = nn.LayerNorm(spec.width)
        self.expand = nn.Linear(spec.width, spec.ffn_width)
        self.activation = nn.GELU()
        self.contract = nn.Linear(spec.ffn_width, spec.width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        hidden_BTD = hidden_BTD + self.dropout(self.attention(self.attention_norm(hidden_BTD)))
        inner_BTF = self.activation(self.expand(self.ffn_norm(hidden_BTD)))
        out_BTD: Tensor = hidden_BTD + self.dropout(self.contract(inner_BTF))
        return out_BTD


class Performer(nn.Module):
    """A stack of blocks whose random features are drawn anew now and then in training.

    Args:
        spec: sizes.
    """

    def __init__(self, spec: PerformerSpec) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PerformerBlock(spec) for _ in range(spec.num_layers))
        self.schedule = RedrawSchedule(spec.redraw_every)
        self.redraw()

    def forward(self, hidden_BTD: Tensor, *, step: int = 0) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            hidden_BTD: what the blocks read.
            step: the optimizer step, in training.
        """
        if self.training and self.schedule.due(step):
            self.redraw()
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return hidden_BTD

    def redraw(self) -> None:
        """Draw the features of every layer for the schedule's current state."""
        for number, block in enumerate(self.blocks):
            assert isinstance(block, PerformerBlock)
            block.attention.redraw(self.schedule.layer_seed(number))

    def weights(self, hidden_BTD: Tensor, *, layer: int) -> tuple[Tensor, Tensor]:
        """Factors of one layer's attention, see :func:`cellray.nn.favor.favor_weights`."""
        index = range(len(self.blocks))[layer]
        for block in self.blocks[:index]:
            hidden_BTD = block(hidden_BTD)
        block = self.blocks[index]
        assert isinstance(block, PerformerBlock)
        return block.attention.weights(block.attention_norm(hidden_BTD))


_SAVED = ("seed", "base", "redraws", "calls")


class RedrawSchedule(nn.Module):
    """Says when a stack of FAVOR+ layers takes new features: a pure function of the step.

    The source counts forward passes; then accumulation and the number of workers would change what
    is drawn. Here features number ``base + (calls + step) // every`` are used at a step. The
    numbers are part of the state dict, so that a run that goes on draws what the unbroken one
    would have; they live on the host, so that nothing waits for a GPU.

    Args:
        every: optimizer steps between two draws; 0 never draws again.

    Attributes:
        seed: of all features.
        base: number of the features a run began with.
        redraws: number of the features in use.
        calls: passes since the last draw when published weights were saved.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.base = self.redraws = self.calls = 0
        drawn = torch.randint(1 << 31, (1,))
        self.seed = 0 if drawn.is_meta else int(drawn)

    def due(self, step: int) -> bool:
        """True if other features are to be drawn before a training pass of this step."""
        if not self.every:
            return False
        wanted = self.base + (self.calls + step) // self.every
        due, self.redraws = wanted != self.redraws, wanted
        return due

    def begin_run(self) -> None:
        """A new run starts from loaded weights: its steps count from 0, its features go on."""
        self.base = self.redraws

    def layer_seed(self, layer: int) -> int:
        """The seed of one layer's features now."""
        return (self.seed * 1_000_003 + self.redraws * 8_191 + layer) % (1 << 63)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _SAVED:
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=torch.int64)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        rest = dict(state_dict)
        for name in _SAVED:
            value = rest.pop(prefix + name, None)
            if value is not None and not value.is_meta:
                setattr(self, name, int(value))
        super()._load_from_state_dict(rest, prefix, *args)
