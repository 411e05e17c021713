"""FAVOR+: softmax attention by positive random features, linear in the number of tokens.

From the formulae of the Performer paper (arXiv:2009.14794). With ``x' = x / K^(1/4)`` and random
rows ``w``, ``phi(x) = exp(w . x' - |x'|^2 / 2 - M) + 1e-4`` and
``out_i = phi(q_i) . sum_j phi(k_j) v_j / (phi(q_i) . sum_j phi(k_j))``. The maximum M keeps the
exponential in range. For a query it is over its own features; for keys there are two conventions:
one for each cell, over its heads, tokens and features (``cell``), or one over the whole tensor
(``tensor``), under which a cell depends slightly on the cells beside it, through the 1e-4. Features
are scaled by ``1 / sqrt(M)`` in the paper; the factor cancels.

The features of T tokens take 266 numbers a token and head, several times the rest. They are made
for a slice of tokens at a time, and again in the backward pass, so that memory is that of q, k and
v, and a slice stays in the processor's cache.

Legend: B cells, H heads, T tokens, K width of a head, M random features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

__all__ = [
    "FavorAttention",
    "KeyMax",
    "favor_attention",
    "favor_weights",
    "num_features",
    "orthogonal_features",
]

Tensor = torch.Tensor
KeyMax = Literal["cell", "tensor"]

_FLOOR = 1e-4
# Numbers of a slice's features: about a megabyte on a CPU; on a GPU launches cost more than memory.
_SLICE = {"cpu": 1 << 19}
_SLICE_ELSEWHERE = 1 << 27


def num_features(head_width: int) -> int:
    """``floor(K ln K)``, the number of features that scBERT and scFoundation use: 266 for 64."""
    return int(head_width * math.log(head_width))


def orthogonal_features(count: int, head_width: int, *, seed: int) -> Tensor:
    """(count, K) random rows: orthogonal in blocks of K, each as long as a Gaussian vector.

    Args:
        count: M.
        head_width: K.
        seed: the same seed gives the same rows on every worker.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def gaussian(rows: int) -> Tensor:
        return torch.randn(rows, head_width, generator=generator, device="cpu")

    blocks = [torch.linalg.qr(gaussian(head_width))[0].T for _ in range(-(-count // head_width))]
    lengths = torch.linalg.vector_norm(gaussian(count), dim=1, keepdim=True)
    rows: Tensor = torch.cat(blocks)[:count] * lengths
    return rows


def _exponents(x_BHTK: Tensor, features_MK: Tensor) -> tuple[Tensor, Tensor]:
    """``w . x'`` (B, H, T, M) and ``|x'|^2 / 2`` (B, H, T, 1)."""
    scale = x_BHTK.shape[-1] ** -0.25
    dots = x_BHTK @ (features_MK * scale).T
    return dots, x_BHTK.square().sum(-1, keepdim=True) * (0.5 * scale * scale)


def _query_exponentials(q: Tensor, features: Tensor) -> Tensor:
    dots, half = _exponents(q, features)
    return dots.sub_(half + dots.amax(-1, keepdim=True)).exp_()


def _key_exponentials(k: Tensor, features: Tensor, key_max: Tensor) -> Tensor:
    dots, half = _exponents(k, features)
    return dots.sub_(half + key_max).exp_()


def _slices(x_BHTK: Tensor, count: int) -> Iterator[slice]:
    """Ranges of tokens whose features are made together."""
    batch, heads, length, _ = x_BHTK.shape
    most = _SLICE.get(x_BHTK.device.type, _SLICE_ELSEWHERE)
    step = max(16, most // max(1, batch * heads * count))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


class _Largest:
    """The keys' maximum while slices of tokens go by, and where it is.

    Attributes:
        value: (B, 1, 1, 1), or (1, 1, 1, 1) for the ``tensor`` convention.
        places: (B, 4) or (1, 4): (cell, head, token, feature) of each maximum.
    """

    def __init__(self, k_BHTK: Tensor, convention: KeyMax) -> None:
        self._together = convention == "tensor"
        num = 1 if self._together else len(k_BHTK)
        self.value = k_BHTK.new_full((num, 1, 1, 1), -math.inf)
        self.places = torch.zeros(num, 4, dtype=torch.int64, device=k_BHTK.device)

    def see(self, dots_BHtM: Tensor, first: int) -> Tensor:
        """Take a slice into account; gives what sums up to now must be multiplied with."""
        before = self.value
        rows = dots_BHtM.reshape(1, -1) if self._together else dots_BHtM.flatten(1)
        here = rows.amax(1)
        better = here > before.reshape(-1)
        if bool(better.any()):
            flat = rows.argmax(1)
            _, heads, tokens, count = dots_BHtM.shape
            feature, flat = flat % count, flat // count
            token, flat = flat % tokens + first, flat // tokens
            head, cell = flat % heads, flat // heads
            if not self._together:
                cell = torch.arange(len(rows), device=rows.device)
            found = torch.stack([cell, head, token, feature], dim=1)
            self.places = torch.where(better[:, None], found, self.places)
            self.value = torch.where(better, here, before.reshape(-1)).reshape(-1, 1, 1, 1)
        return (before - self.value).exp()


def _key_sums(
    k: Tensor, v: Tensor, features: Tensor, convention: KeyMax
) -> tuple[Tensor, Tensor, _Largest]:
    """``sum_j phi(k_j) v_j`` (B, H, M, K) and ``sum_j phi(k_j)`` (B, H, M), in one pass.

    The maximum is known at the end only: sums made so far are rescaled when it grows.
    """
    count, (batch, heads, length, width) = len(features), v.shape
    largest = _Largest(k, convention)
    context, totals = v.new_zeros(batch, heads, count, width), v.new_zeros(batch, heads, count)
    for s in _slices(k, count):
        dots, half = _exponents(k[:, :, s], features)
        factor = largest.see(dots, s.start)
        phi = dots.sub_(half + largest.value).exp_()
        context = context * factor + phi.transpose(-1, -2) @ v[:, :, s]
        totals = totals * factor[..., 0] + phi.sum(-2)
    context += _FLOOR * v.sum(-2, keepdim=True)
    totals += _FLOOR * length
    return context, totals, largest


class _Favor(torch.autograd.Function):
    """The whole attention; the gradient goes through the maxima, too."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, features: Tensor, convention: KeyMax
    ) -> Tensor:
        context, totals, largest = _key_sums(k, v, features, convention)
        out = torch.empty_like(v)
        for s in _slices(q, len(features)):
            phi = _query_exponentials(q[:, :, s], features).add_(_FLOOR)
            out[:, :, s] = (phi @ context) / (phi @ totals[..., None])
        saved = (largest.value, largest.places, context, totals, out)
        ctx.save_for_backward(q, k, v, features, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, features, key_max, places, context, totals, out = ctx.saved_tensors
        (grad,) = grads
        scaled = features * features.shape[1] ** -0.25
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_context, d_totals = torch.zeros_like(context), torch.zeros_like(totals)
        for s in _slices(q, len(features)):
            exp = _query_exponentials(q[:, :, s], features)
            largest = exp.argmax(-1)
            phi = exp + _FLOOR
            d_sum = grad[:, :, s] / (phi @ totals[..., None])
            d_weight = -(d_sum * out[:, :, s]).sum(-1, keepdim=True)
            d_phi = d_sum @ context.transpose(-1, -2) + d_weight * totals[:, :, None]
            d_context += phi.transpose(-1, -2) @ d_sum
            d_totals += (phi * d_weight).sum(-2)
            d_exp = d_phi.mul_(exp)
            through_max = d_exp.sum(-1, keepdim=True) * scaled[largest]
            dq[:, :, s] = _through(d_exp, q[:, :, s], scaled) - through_max
        d_max = torch.zeros(len(k), device=k.device, dtype=k.dtype)
        for s in _slices(k, len(features)):
            exp = _key_exponentials(k[:, :, s], features, key_max)
            d_phi = v[:, :, s] @ d_context.transpose(-1, -2) + d_totals[:, :, None]
            dv[:, :, s] = (exp + _FLOOR) @ d_context
            d_exp = d_phi.mul_(exp)
            d_max -= d_exp.sum((1, 2, 3))
            dk[:, :, s] = _through(d_exp, k[:, :, s], scaled)
        cells, heads, tokens, chosen = places.unbind(1)
        share = d_max if len(places) == len(d_max) else d_max.sum()[None]
        dk[cells, heads, tokens] += share[:, None] * scaled[chosen]
        return dq, dk, dv, None, None


def _through(d_exponent: Tensor, x: Tensor, scaled: Tensor) -> Tensor:
    """The gradient of x from that of ``w . x' - |x'|^2 / 2``."""
    factor = x.shape[-1] ** -0.5
    grad: Tensor = d_exponent @ scaled - d_exponent.sum(-1, keepdim=True) * (x * factor)
    return grad


def favor_attention(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, features_MK: Tensor, *, key_max: KeyMax = "cell"
) -> Tensor:
    """Attention of every token to all tokens of its cell, (B, H, T, K), in float32.

    Args:
        q_BHTK: queries.
        k_BHTK: keys.
        v_BHTK: values.
        features_MK: random rows of one layer.
        key_max: over what the keys' maximum is taken, see the module.
    """
    with torch.autocast(q_BHTK.device.type, enabled=False):
        args = (q_BHTK.float(), k_BHTK.float(), v_BHTK.float(), features_MK.float())
        out: Tensor = _Favor.apply(*args, key_max)  # type: ignore[no-untyped-call]
        return out.to(v_BHTK.dtype)


def favor_weights(
    q_BHTK: Tensor, k_BHTK: Tensor, features_MK: Tensor, *, key_max: KeyMax = "cell"
) -> tuple[Tensor, Tensor]:
    """What :func:`favor_attention` weighs by, as factors.

    Returns:
        Queries (B, H, T, M), already divided by their sums, and keys (B, H, T, M), float32: the
        product of the one with the other's transpose is the (T, T) attention, whose rows sum to 1.
    """
    with torch.autocast(q_BHTK.device.type, enabled=False):
        q, k, features = q_BHTK.float(), k_BHTK.float(), features_MK.float()
        largest = _Largest(k, key_max)
        largest.see(_exponents(k, features)[0], 0)
        keys = _key_exponentials(k, features, largest.value) + _FLOOR
        queries = _query_exponentials(q, features) + _FLOOR
        return queries / (queries @ keys.sum(-2)[..., None]), keys


class FavorAttention(nn.Module):
    """Multi-head self-attention with random features.

    Args:
        width: D.
        num_heads: H.
        head_width: K; H * K need not be D.
        bias: whether queries, keys and values have biases.
        key_max: see :func:`favor_attention`.
    """

    features: Tensor

    def __init__(
        self, width: int, *, num_heads: int, head_width: int, bias: bool, key_max: KeyMax
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = head_width
        self.key_max: KeyMax = key_max
        self.qkv = nn.Linear(width, 3 * num_heads * head_width, bias=bias)
        self.out = nn.Linear(num_heads * head_width, width)
        self.register_buffer("features", torch.zeros(num_features(head_width), head_width))

    def heads(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, K)."""
        batch, length, _ = hidden_BTD.shape
        split = self.qkv(hidden_BTD).view(batch, length, 3, self.num_heads, self.head_width)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        mixed = favor_attention(*self.heads(hidden_BTD), self.features, key_max=self.key_max)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def weights(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the attention, see :func:`favor_weights`."""
        q, k, _ = self.heads(hidden_BTD)
        return favor_weights(q, k, self.features, key_max=self.key_max)

    def redraw(self, seed: int) -> None:
        """Take other random features, the same for the same seed on every worker."""
        if not self.features.is_meta:
            drawn = orthogonal_features(len(self.features), self.head_width, seed=seed)
            self.features.copy_(drawn)
