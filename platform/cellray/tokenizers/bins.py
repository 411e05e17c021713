"""Value binning: a cell as ``<cls>`` and its non-zero genes, each with a per-cell quantile bin.

The encoding of scGPT (doi:10.1038/s41592-024-02201-0). On the cell's own non-zero values: edges are
the linear-interpolation quantiles at ``num_bins - 1`` equally spaced levels of [0, 1], in float64.
With ``below`` edges < v and ``upto`` edges <= v, a value v falls into ``ceil(u * (below - upto) +
upto)``: bins 1 .. num_bins - 1, 0 being kept for genes that are not expressed. ``u`` is drawn from
(seed, epoch, cell, gene token), so it matters only where v equals repeated edges, and never depends
on which cells travel together.

All non-zero vocabulary genes of a cell take part in the binning. A cell with more than
``max_tokens - 1`` of them then keeps a keyed sample without replacement, another one each epoch.

There is no switch for the fine-tuning recipe's log1p of 10,000-normalised counts: the map is
monotone and interpolated edges fall between the same neighbours, so the bins are the same. The
exception is rounding where an inner edge lies exactly on a value (with 51 bins: cells whose number
of genes is 1 above a multiple of 7): it may then miss the value by one unit in the last place in
one of the two scales. About 1 % of such cells have a bin that differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw, splitmix64
from cellray.data.vocab import Vocab
from cellray.tokenizers._kernels import bin_cells
from cellray.tokenizers.base import TokenizerConfig, TokenizerUnit

__all__ = ["BIN_STREAM", "SAMPLE_STREAM", "TOKENIZER", "BinsConfig", "BinsTokenizer"]

BIN_STREAM = "bins"
SAMPLE_STREAM = "bins.sample"


class BinsConfig(TokenizerConfig):
    """Per-cell value binning.

    Attributes:
        name: ``bins``.
        max_tokens: tokens per cell at most, ``<cls>`` included; 1,200 in pretraining.
        num_bins: bins with the zero bin; 51 gives values 1..50.
        cls_value: the value beside ``<cls>``: -2 in pretraining and zero-shot use, 0 in the
            published fine-tuning scripts.
    """

    name: str = "bins"
    max_tokens: int = Field(default=1200, ge=2)
    num_bins: int = Field(default=51, ge=3)
    cls_value: float = -2.0


@dataclass(frozen=True)
class BinsTokenizer:
    """Blocks of cells to gene tokens with bins; a cell without a vocabulary gene is ``<cls>``.

    Attributes:
        config: see :class:`BinsConfig`.
        vocab: a vocabulary with ``<cls>``.
        levels: (num_bins - 1,) float64 quantile levels.
        token_hashes: (G,) uint64 half-finished draws of each gene.
    """

    config: BinsConfig
    vocab: Vocab
    levels: npt.NDArray[np.float64]
    token_hashes: npt.NDArray[np.uint64]

    def __call__(self, block: CellBlock, draw: Draw) -> TokenBlock:
        """Tokenise the N cells of ``block``."""
        kept = np.minimum(np.diff(block.indptr), self.config.max_tokens - 1)
        indptr = np.zeros(len(block) + 1, dtype=np.int64)
        np.cumsum(kept + 1, out=indptr[1:])
        tokens = np.empty(indptr[-1], dtype=np.int32)
        values = np.empty(indptr[-1], dtype=np.float32)
        bin_cells(
            block.indptr,
            block.genes,
            block.counts,
            self.levels,
            self.vocab.gene_tokens,
            self.token_hashes,
            draw.cell_keys(BIN_STREAM, block.joinids),
            draw.cell_keys(SAMPLE_STREAM, block.joinids),
            indptr,
            1,
            kept,
            tokens,
            values,
        )
        tokens[indptr[:-1]] = self.vocab.special("<cls>")
        values[indptr[:-1]] = self.config.cls_value
        return TokenBlock(joinids=block.joinids, indptr=indptr, tokens=tokens, values=values)


def _build(config: BinsConfig, vocab: Vocab) -> BinsTokenizer:
    """Raises DataError if the vocabulary has no ``<cls>``."""
    vocab.special("<cls>")
    return BinsTokenizer(
        config=config,
        vocab=vocab,
        levels=np.linspace(0.0, 1.0, config.num_bins - 1),
        token_hashes=splitmix64(vocab.gene_tokens.astype(np.uint64)),
    )


def _value_dtype(config: BinsConfig) -> str:
    whole = config.cls_value == int(config.cls_value) and -128 <= config.cls_value <= 127
    return "int8" if whole and config.num_bins <= 128 else "float32"


TOKENIZER = TokenizerUnit(
    name="bins",
    config=BinsConfig,
    specials=("<pad>", "<cls>", "<eoc>"),
    needs_medians=False,
    build=_build,
    value_dtype=_value_dtype,
)
