"""Floating-point operations that training needs, from sizes and real lengths.

A product of (a, b) and (b, c) is 2abc operations; training is three forward passes, because a
product's backward pass makes the gradients of both factors. Counted are products of matrices and
attention, at the cells' real tokens: the sum of n and of n^2 over cells, never padding, never what
is computed a second time. Looking up rows of embedding tables costs nothing; norms, activations and
the optimizer are left out, as is usual.

Legend: B cells, n tokens of a cell, d width, d_ff inner width of the feed-forward layers, m random
features, k width of a head.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import nn

__all__ = [
    "TRAINING",
    "encoder_flops",
    "favor_flops",
    "linear_flops",
    "performer_flops",
    "training_encoder_flops",
    "training_performer_flops",
]

# Forward passes that a forward and a backward pass are worth.
TRAINING = 3.0


def encoder_flops(
    lengths_B: npt.NDArray[np.int64], *, num_layers: int, width: int, ffn_width: int
) -> float:
    """A forward pass of exact attention: ``L (8 n d^2 + 4 n d d_ff + 4 n^2 d)`` over all cells.

    The generative mask needs fewer than n keys a token; how many is not known from the lengths, so
    it counts as full attention.

    Args:
        lengths_B: n of each cell.
        num_layers: L.
        width: d.
        ffn_width: d_ff.
    """
    lengths = np.asarray(lengths_B, dtype=np.float64)
    tokens, pairs = float(lengths.sum()), float(np.square(lengths).sum())
    per_token = 8.0 * width * width + 4.0 * width * ffn_width
    return num_layers * (tokens * per_token + 4.0 * pairs * width)


def training_encoder_flops(
    lengths_B: npt.NDArray[np.int64], *, num_layers: int, width: int, ffn_width: int
) -> float:
    """Forward and backward of :func:`encoder_flops`, three times that."""
    return TRAINING * encoder_flops(
        lengths_B, num_layers=num_layers, width=width, ffn_width=ffn_width
    )


def favor_flops(
    tokens: float, *, num_heads: int, head_width: int, num_features: int
) -> tuple[float, float]:
    """A forward pass of one layer's FAVOR+: (making the features, the sums over them).

    Features of queries and keys are ``4 n m k`` a head; keys times values and queries times that
    are ``4 n m k`` more, the sums that divide the rows ``2 n m``.
    """
    per_head = tokens * num_features
    features = 4.0 * per_head * head_width * num_heads
    sums = (4.0 * head_width + 2.0) * per_head * num_heads
    return features, sums


def _performer_products(
    tokens: float, *, width: int, num_heads: int, head_width: int, ffn_width: int
) -> float:
    """Queries, keys, values, the output projection and the feed-forward layers of one layer."""
    return tokens * (8.0 * width * num_heads * head_width + 4.0 * width * ffn_width)


def performer_flops(
    tokens: float,
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    head_width: int,
    ffn_width: int,
    num_features: int,
) -> float:
    """A forward pass of a Performer; linear in the tokens, so only their sum counts.

    Args:
        tokens: of all cells.
        num_layers: L.
        width: d.
        num_heads: heads.
        head_width: k; heads times k need not be d.
        ffn_width: d_ff.
        num_features: m.
    """
    products = _performer_products(
        tokens, width=width, num_heads=num_heads, head_width=head_width, ffn_width=ffn_width
    )
    favor = favor_flops(
        tokens, num_heads=num_heads, head_width=head_width, num_features=num_features
    )
    return num_layers * (products + sum(favor))


def training_performer_flops(
    tokens: float,
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    head_width: int,
    ffn_width: int,
    num_features: int,
) -> float:
    """Forward and backward of :func:`performer_flops`.

    Sums over features are three times their forward pass, ``12 n m k`` a head. The random rows are
    not trained, so features count twice, ``8 n m k`` a head; that the kernel makes them again in
    its backward pass is not needed work and not counted.
    """
    products = _performer_products(
        tokens, width=width, num_heads=num_heads, head_width=head_width, ffn_width=ffn_width
    )
    features, sums = favor_flops(
        tokens, num_heads=num_heads, head_width=head_width, num_features=num_features
    )
    return num_layers * (TRAINING * (products + sums) + 2.0 * features)


def linear_flops(module: nn.Module | None) -> float:
    """A forward pass of a module's linear layers on one row; 0 for None.

    Read off the layers' sizes, not their weights, of which a ZeRO-3 worker holds a part only.
    """
    if module is None:
        return 0.0
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return float(sum(2 * layer.in_features * layer.out_features for layer in layers))
