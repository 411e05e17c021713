"""Bytes that a training pass keeps for its backward pass, from sizes and lengths.

Every term is a tensor that autograd saves, counted once however many operations save it. With N
tokens laid out (padding included in a padded batch), D width, F inner width, H heads, e bytes of an
activation (4, under bf16 2) and n bytes of a norm's input (4; 2 where bf16 weights run on a CPU):

    block       N (2 n D + e (3 D + F))    norms' inputs; what the three products read, activation
    attention   S (4 e D + 4 H)            queries, keys, values, output, log sum of exponentials
    generative  S (8 D + e (D + 2 D'))     float32 queries and keys, own values, D' = D + 8 H of
                + 2 S_k e D'               padded queries and output, of known keys and values
    dropout     N D m for each place       m bytes: 1 on a GPU, e on a CPU
    on a CPU    12 H sum(t s)              attention with dropout keeps its weights three times
    head        4 M V                      log softmax over V tokens at M targets

S is N, or the slots of a packed batch's groups of like length (short cells on a CPU); there the
output lies in order once more, e D. FAVOR+ keeps float32 queries, keys, values and output. Beside
what is kept something is
alive for a moment when the backward pass begins: a head's logits and their gradients, or one
block's gradients.

Legend: B cells, t tokens of a cell, s keys of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cellray.core.packing import Packing
from cellray.nn.attention import LONG_CELLS
from cellray.nn.varlen import EXTRA_COLUMNS

__all__ = [
    "Activations",
    "Work",
    "encoder_activations",
    "logits_activations",
    "performer_activations",
]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward pass.

    Attributes:
        saved: kept from the forward to the backward pass.
        passing: alive beside them at the worst moment.
    """

    saved: float = 0.0
    passing: float = 0.0

    @property
    def total(self) -> float:
        """Bytes at the worst moment."""
        return self.saved + self.passing

    def __add__(self, other: Activations) -> Activations:
        """Saved bytes add up; of the passing ones the larger counts, they come one by one."""
        return Activations(self.saved + other.saved, max(self.passing, other.passing))


@dataclass(frozen=True)
class Work:
    """A micro-batch, and how it is computed.

    Attributes:
        lengths: (B,) real tokens of each cell, before the objective.
        packed: whether the cells lie end to end.
        targets: positions predicted at, of all cells.
        hidden: tokens whose value is hidden, of all cells.
        added: tokens that the objective adds, of all cells.
        cell_prompt: whether the second pass prompted by the cell embedding runs.
        bf16: whether products run in bfloat16.
        bf16_weights: whether the weights are bfloat16, too (DeepSpeed), and not cast by autocast.
        on_gpu: which kernels run.
        varlen: whether packed cells go to a variable-length kernel.
        checkpointing: whether blocks keep their input alone and run again in the backward pass.
    """

    lengths: I64
    packed: bool = False
    targets: float = 0.0
    hidden: float = 0.0
    added: float = 0.0
    cell_prompt: bool = False
    bf16: bool = False
    bf16_weights: bool = False
    on_gpu: bool = False
    varlen: bool = False
    checkpointing: bool = False

    @property
    def cells(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def tokens(self) -> float:
        """N: tokens laid out, with padding if the batch is padded."""
        if self.packed:
            return float(np.sum(self.lengths)) + self.added
        return float(self.cells * self.longest)

    @property
    def longest(self) -> float:
        """Tokens of the longest cell, with those that the objective adds."""
        return float(np.max(self.lengths, initial=1)) + self.added / max(self.cells, 1)

    @property
    def by_cells(self) -> bool:
        """Whether packed attention takes cells one by one, as it does long ones on a CPU."""
        return self.packed and not self.on_gpu and self.tokens >= LONG_CELLS * self.cells

    @property
    def wide(self) -> int:
        """Bytes of an activation."""
        return 2 if self.bf16 else 4

    @property
    def norm(self) -> int:
        """Bytes of a norm's input."""
        return 2 if self.bf16 and self.bf16_weights and not self.on_gpu else 4

    @property
    def mask(self) -> int:
        """Bytes that dropout keeps of each number: torch keeps the noise itself on a CPU."""
        return 1 if self.on_gpu else self.wide

    def with_lengths(self, lengths: I64, *, packed: bool) -> Work:
        """The same work on another sequence."""
        return replace(self, lengths=lengths, packed=packed, added=0.0)

    def weights(self, model: Any) -> float:
        """Bytes of the bfloat16 copies that autocast makes of float32 matrices."""
        if not self.bf16 or self.bf16_weights:
            return 0.0
        from cellray.nn.flops import linear_flops

        return linear_flops(model)  # 2 bytes and 2 operations for every number


class _Calls(NamedTuple):
    """What the attention calls of a layer see: slots of queries, (query, key) pairs."""

    slots: float
    pairs: float


def _calls(work: Work) -> _Calls:
    if not work.packed:
        return _Calls(work.tokens, work.cells * work.longest**2)
    if work.varlen or work.by_cells:
        squares = float(np.square(np.asarray(work.lengths, dtype=np.float64)).sum())
        return _Calls(work.tokens, squares)
    slots = pairs = 0.0
    for group in Packing.of(work.lengths).groups:
        cells, longest = group.tokens_bt.shape
        slots += cells * longest
        pairs += cells * float(longest) ** 2
    return _Calls(slots, pairs)


def _attention(work: Work, *, width: int, num_heads: int, dropout: float) -> float:
    """Bytes that one layer's attention saves, its output projection's input included."""
    slots, pairs = _calls(work)
    wide, plain = work.wide, width
    kept = 0.0
    copied = work.packed and not work.varlen  # groups lie in order again
    weights = dropout > 0 and not work.on_gpu
    if work.hidden:
        padded = width + EXTRA_COLUMNS * num_heads
        share = 1 - work.hidden / max(work.tokens, 1.0)
        # Known keys are picked on a CPU and by variable-length kernels; a group has as many as its
        # fullest cell. On a GPU padded cells keep all.
        fewer = 1.0 if work.on_gpu else min(1.0, 0.5 + 0.5 * share)
        if work.varlen or work.by_cells:
            fewer = share
        pairs *= fewer
        kept += slots * (8.0 * plain + wide * plain)
        if work.bf16:
            kept += slots * wide * plain
        calls = 4 if weights else wide
        kept += slots * 2 * calls * padded + 2 * fewer * slots * calls * padded
        copied = True
    elif weights:
        # float32 scaled queries, keys, and values; the output is a tensor of its own
        kept += 3 * 4.0 * slots * plain
        copied = True
    else:
        kept += 4 * wide * slots * plain
    if weights:
        kept += 12.0 * num_heads * pairs
    else:
        kept += 4.0 * slots * num_heads
    return kept + (work.tokens * wide * plain if copied else 0.0)


def encoder_activations(
    work: Work,
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    ffn_width: int,
    activation: str = "relu",
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    inner_dropout: float = 0.0,
) -> Activations:
    """A stack of blocks of exact attention, post-norm or pre-norm.

    Args:
        work: the micro-batch.
        num_layers: blocks.
        width: D.
        num_heads: H.
        ffn_width: F.
        activation: ``relu``, whose output the next product keeps, or ``gelu``, whose input is kept
            besides.
        dropout: after attention and after the feed-forward layers.
        attention_dropout: on attention weights.
        inner_dropout: after the activation.
    """
    tokens, wide = work.tokens, work.wide
    read = 4 if work.bf16 and not work.on_gpu else 2  # a CPU casts what q, k and v read apiece
    block = tokens * (2.0 * work.norm * width + read * wide * width)
    block += tokens * ffn_width * wide * (2 if activation == "gelu" else 1)
    block += tokens * work.mask * width * 2 * bool(dropout)
    block += (
        tokens
        * ffn_width
        * (work.mask + (wide if activation == "relu" else 0))
        * bool(inner_dropout)
    )
    attention = _attention(work, width=width, num_heads=num_heads, dropout=attention_dropout)
    passing = tokens * (2.0 * wide * ffn_width + 2 * 4 * width)
    if attention_dropout and not work.on_gpu:
        passing = max(passing, 2 * 4.0 * num_heads * _calls(work).pairs)
    return _stacked(work, num_layers, block + attention, passing, width)


def performer_activations(
    work: Work,
    *,
    num_layers: int,
    width: int,
    num_heads: int,
    head_width: int,
    ffn_width: int,
    num_features: int,
    dropout: float = 0.0,
) -> Activations:
    """A stack of Performer blocks over the work's tokens.

    Args:
        work: the micro-batch on the Performer's own sequence.
        num_layers: blocks.
        width: D.
        num_heads: H.
        head_width: K.
        ffn_width: F.
        num_features: random features.
        dropout: after attention and after the feed-forward layers.
    """
    tokens, wide, inner = work.tokens, work.wide, num_heads * head_width
    block = tokens * (2.0 * work.norm * width + 2 * wide * width)
    block += tokens * 2 * wide * ffn_width
    block += tokens * work.mask * width * 2 * bool(dropout)
    block += tokens * (4 * 4.0 + (wide if work.bf16 else 0)) * inner
    block += work.cells * 4.0 * num_heads * num_features * (head_width + 1)
    passing = tokens * max(2.0 * wide * ffn_width, 5 * 4.0 * inner)
    return _stacked(work, num_layers, block, passing, width)


def logits_activations(work: Work, *, num_classes: int, width: int) -> Activations:
    """A head that names one of V classes at every target, D wide before the logits.

    The log softmax is kept. When the backward pass begins, the logits are alive, their gradient and
    that of the log softmax, in float32.

    Args:
        work: the micro-batch.
        num_classes: V.
        width: D.
    """
    logits = work.targets * num_classes
    return Activations(
        4.0 * logits + 3.0 * work.wide * work.targets * width, (8.0 + work.wide) * logits
    )


def _stacked(work: Work, num_layers: int, block: float, passing: float, width: int) -> Activations:
    """All blocks, or with checkpointing their inputs, and one block while it runs again."""
    if not work.checkpointing:
        return Activations(num_layers * block, passing)
    return Activations(num_layers * work.tokens * work.norm * width, block + passing)
