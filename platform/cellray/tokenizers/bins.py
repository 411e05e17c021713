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

from cellray.core.blocks import CellBlock, TokenBlock, row_ids
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
        include_zeros: all genes of the vocabulary are tokens, with bin 0 where they have no count
            (scGPT's integration recipe, on some 1,200 variable genes).
    """

    name: str = "bins"
    max_tokens: int = Field(default=1200, ge=2)
    num_bins: int = Field(default=51, ge=3)
    cls_value: float = -2.0
    include_zeros: bool = False


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
        if not self.config.include_zeros:
            return self._expressed(block, draw, self.config.max_tokens - 1)
        every = self._expressed(block, draw, len(self.vocab))
        return self._with_zeros(every, draw)

    def _with_zeros(self, block: TokenBlock, draw: Draw) -> TokenBlock:
        """The same cells with all genes of the vocabulary, in its order, or a sample of them."""
        num_cells, num_genes = len(block), len(self.vocab)
        column = np.full(self.vocab.num_tokens, num_genes, dtype=np.int64)  # of <cls>: the last
        column[self.vocab.gene_tokens] = np.arange(num_genes)
        values = np.zeros((num_cells, num_genes + 1), dtype=np.float32)
        values[row_ids(block.indptr), column[block.tokens]] = block.values
        genes = np.broadcast_to(np.arange(num_genes), (num_cells, num_genes))
        most = min(self.config.max_tokens - 1, num_genes)
        if most < num_genes:
            tokens = self.vocab.gene_tokens[None, :]
            keys = draw.bits(SAMPLE_STREAM, block.joinids[:, None], tokens)
            genes = np.sort(np.argpartition(keys, most, axis=1)[:, :most], axis=1)
        tokens = np.empty((num_cells, most + 1), dtype=np.int32)
        tokens[:, 0] = self.vocab.special("<cls>")
        tokens[:, 1:] = self.vocab.gene_tokens[genes]
        chosen = np.take_along_axis(values, genes, axis=1)
        first = np.full((num_cells, 1), self.config.cls_value, dtype=np.float32)
        indptr = np.arange(num_cells + 1, dtype=np.int64) * (most + 1)
        flat = np.concatenate([first, chosen], axis=1).reshape(-1)
        return TokenBlock(block.joinids, indptr, tokens.reshape(-1), flat)

    def _expressed(self, block: CellBlock, draw: Draw, most: int) -> TokenBlock:
        kept = np.minimum(np.diff(block.indptr), most)
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
    max_genes=lambda config: config.max_tokens - 1,
    with_zeros=lambda config: config.include_zeros,
)
