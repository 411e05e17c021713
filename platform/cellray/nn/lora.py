"""Low-rank factors beside linear layers (LoRA), and their way back into plain weights.

``y = W x + b + scale * U D dropout(x)`` with ``D`` (R, in) drawn and ``U`` (out, R) zero at the
start, so that a layer begins as it was (arXiv:2106.09685). The factors are a module of their own
beside the layer's weights: names of the layer's own weights stay as they are, and what a layer
returns in parts (queries, keys, values) is added to in parts.

Legend: R rank, in and out: widths of the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["LowRank", "add_factors", "has_factors", "merge_factors"]

Tensor = torch.Tensor

_MODULE = "lora"
_SCALE = f".{_MODULE}.scale"


class LowRank(nn.Module):
    """``scale * up(down(dropout(x)))`` without biases; zero at the start.

    Args:
        num_inputs: width of what the layer reads.
        num_outputs: width of what it returns.
        rank: R.
        alpha: ``scale`` is alpha / R.
        dropout: on what the factors read, in training.
        generator: draws ``down``.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Parameter(torch.empty(rank, num_inputs))
        self.up = nn.Parameter(torch.zeros(num_outputs, rank))
        nn.init.uniform_(
            self.down, -1 / math.sqrt(num_inputs), 1 / math.sqrt(num_inputs), generator=generator
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        inner = functional.linear(self.dropout(x), self.down)
        return self.scale * functional.linear(inner, self.up)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # not a buffer: an engine may round those to half precision
        destination[prefix + "scale"] = torch.tensor(self.scale, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        rest = dict(state_dict)
        rest.pop(prefix + "scale", None)
        super()._load_from_state_dict(rest, prefix, *args)


def _add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    factors = module.get_submodule(_MODULE)
    added = factors(inputs[0])
    if not isinstance(output, tuple):
        return output + added
    return tuple(
        part + more for part, more in zip(output, added.chunk(len(output), -1), strict=True)
    )


def add_factors(
    layer: nn.Linear, *, rank: int, alpha: float, dropout: float, generator: torch.Generator
) -> LowRank:
    """Put factors beside a linear layer; its own weights are frozen.

    Args:
        layer: in place.
        rank: R.
        alpha: the factors' product is scaled by alpha / R.
        dropout: on what the factors read, in training.
        generator: draws the first factor.
    """
    factors = LowRank(
        layer.in_features,
        layer.out_features,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        generator=generator,
    ).to(layer.weight.device)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer.add_module(_MODULE, factors)
    layer.register_forward_hook(_add)
    return factors


def has_factors(names: Iterable[str]) -> bool:
    """Whether a state dict of these names holds low-rank factors."""
    return any(name.endswith(_SCALE) for name in names)


def merge_factors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every layer's factors multiplied out (in float64) into its weights.

    Without factors it is returned as it is. No tensor is changed in place.
    """
    merged = dict(weights)
    for name in [n for n in merged if n.endswith(_SCALE)]:
        layer = name.removesuffix(_SCALE)
        scale = float(merged.pop(name))
        down = merged.pop(f"{layer}.{_MODULE}.down")
        up = merged.pop(f"{layer}.{_MODULE}.up")
        weight = merged[f"{layer}.weight"]
        whole = weight.double() + scale * (up.double() @ down.double())
        merged[f"{layer}.weight"] = whole.to(weight.dtype)
    return merged
