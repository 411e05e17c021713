"""Continuous expression with read-depth tokens: the encoding of scFoundation.

(doi:10.1038/s41592-024-02305-7.) A cell is its non-zero panel genes with
``ln(1 + 10,000 * count / total)``, then two tokens: ``<T>`` with the log10 of the total count that
is wanted, ``<S>`` with the log10 of the total count that is given. Totals are over the panel. A
token whose log10 is not above 0 is left out, as genes without counts are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw
from cellray.data.vocab import Vocab
from cellray.tokenizers._values import keep_sample, lay_tokens, normalised, totals
from cellray.tokenizers.base import TokenizerConfig, TokenizerUnit

__all__ = [
    "SAMPLE_STREAM",
    "SOURCE",
    "TARGET",
    "TOKENIZER",
    "DepthConfig",
    "DepthTokenizer",
    "wanted_depth",
]

SAMPLE_STREAM = "depth.sample"
TARGET, SOURCE = "<T>", "<S>"
_DEPTH = re.compile(r"^[tfa]\d+(\.\d+)?$")


class DepthConfig(TokenizerConfig):
    """Log-normalised values with T and S.

    Attributes:
        name: ``depth``.
        max_tokens: tokens a cell may keep, T and S included; longer cells keep a keyed sample of
            their genes. 15,000 in the published model.
        target_depth: what T is, written as the source writes it: ``t4`` is T = 4 (10,000 counts),
            ``f5`` is T = log10(5 x total), ``a1`` is T = S + 1 (ten times the total).
        bulk: bulk samples: T and S are both the log10 of the sum of the log-normalised values.
    """

    name: str = "depth"
    max_tokens: int = Field(default=15_000, ge=3)
    target_depth: str = "f1"
    bulk: bool = False

    @field_validator("target_depth")
    @classmethod
    def _readable(cls, text: str) -> str:
        if not _DEPTH.fullmatch(text) or (text[0] in "tf" and float(text[1:]) == 0):
            raise ValueError(
                f"target_depth = '{text}': write t, f or a and a number, e.g. 't4' (log10 of the "
                "wanted total), 'f5' (a multiple of the total), 'a1' (decades above it)"
            )
        return text


def wanted_depth(source: npt.NDArray[np.float64], target_depth: str) -> npt.NDArray[np.float64]:
    """(N,) T tokens for S tokens ``source``, see :class:`DepthConfig`."""
    number = float(target_depth[1:])
    if target_depth[0] == "t":
        return np.full_like(source, number)
    return source + (np.log10(number) if target_depth[0] == "f" else number)


@dataclass(frozen=True)
class DepthTokenizer:
    """Blocks of cells to genes with values, T and S.

    Attributes:
        config: see :class:`DepthConfig`.
        vocab: a panel with ``<T>`` and ``<S>``.
    """

    config: DepthConfig
    vocab: Vocab

    def __call__(self, block: CellBlock, draw: Draw) -> TokenBlock:
        """Tokenise the N cells of ``block``; draws only for cells longer than ``max_tokens``."""
        sums = totals(block, "panel")
        values = np.log1p(normalised(block, sums))
        most = self.config.max_tokens - 2
        keep = keep_sample(block, self.vocab, draw, stream=SAMPLE_STREAM, most=most)
        genes = lay_tokens(block, self.vocab.gene_tokens[block.genes], values, keep)
        if self.config.bulk:
            ends = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
            logs = np.log10(np.maximum(np.diff(ends[block.indptr]), 1.0))
            return self._with_depth(genes, logs, logs)
        source = np.log10(np.maximum(sums, 1.0))
        return self._with_depth(genes, wanted_depth(source, self.config.target_depth), source)

    def _with_depth(
        self,
        genes: TokenBlock,
        target: npt.NDArray[np.float64],
        source: npt.NDArray[np.float64],
    ) -> TokenBlock:
        """The block with T and S behind every cell's genes, where they are above 0."""
        lengths = np.diff(genes.indptr)
        present = np.stack([target > 0, source > 0], axis=1) & (lengths > 0)[:, None]
        indptr = np.zeros(len(genes) + 1, dtype=np.int64)
        np.cumsum(lengths + present.sum(axis=1), out=indptr[1:])
        tokens = np.empty(indptr[-1], dtype=np.int32)
        values = np.empty(indptr[-1], dtype=np.float32)
        shift = np.repeat(indptr[:-1] - genes.indptr[:-1], lengths)
        places = np.arange(len(genes.tokens)) + shift
        tokens[places], values[places] = genes.tokens, genes.values
        behind = indptr[:-1] + lengths
        names = (TARGET, SOURCE)
        for column, (name, numbers) in enumerate(zip(names, (target, source), strict=True)):
            rows = np.flatnonzero(present[:, column])
            where = behind[rows] + present[rows, :column].sum(axis=1)
            tokens[where] = self.vocab.special(name)
            values[where] = numbers[rows]
        return TokenBlock(genes.joinids, indptr, tokens, values)


def _build(config: DepthConfig, vocab: Vocab) -> DepthTokenizer:
    """Raises DataError if the vocabulary lacks ``<T>`` or ``<S>``."""
    vocab.special(TARGET)
    vocab.special(SOURCE)
    return DepthTokenizer(config, vocab)


TOKENIZER = TokenizerUnit(
    name="depth",
    config=DepthConfig,
    specials=("<pad>", TARGET, SOURCE),
    needs_medians=False,
    build=_build,
    max_genes=lambda config: config.max_tokens - 2,
)
