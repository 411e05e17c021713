"""A fixed gene panel with log2 bins: the encoding of scBERT (doi:10.1038/s42256-022-00534-z).

A cell is its panel genes with ``min(floor(log2(1 + 10,000 * count / total)), num_bins)``. Genes
whose bin is 0 (not expressed, or below one count in 10,000) are the same to the model, and are not
among the tokens: the model fills the panel up with bin 0. So a block stays sparse, although the
model reads all genes in vocabulary order.

All arithmetic is float32 in the order of the source (scale, log1p, divide by ln 2, truncate), so
that values on the edge of a bin fall as they do there. Precision at an edge: one unit in the last
place of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw
from cellray.data.vocab import Vocab
from cellray.tokenizers._values import Library, keep_sample, lay_tokens, normalised, totals
from cellray.tokenizers.base import TokenizerConfig, TokenizerUnit

__all__ = ["SAMPLE_STREAM", "TOKENIZER", "PanelConfig", "PanelTokenizer"]

SAMPLE_STREAM = "panel.sample"


class PanelConfig(TokenizerConfig):
    """log2 bins over a fixed panel.

    Attributes:
        name: ``panel``.
        max_tokens: genes of bin 1 or more that a cell may keep; longer cells keep a keyed sample.
            The default keeps all of any human panel.
        num_bins: the highest bin; 5 in the published model.
        library: what a cell is scaled by: its counts on the panel, as the source does after it has
            cut the data to the panel, or on all genes of the store.
    """

    name: str = "panel"
    max_tokens: int = Field(default=1 << 16, ge=1)
    num_bins: int = Field(default=5, ge=1, le=31)
    library: Library = "panel"


@dataclass(frozen=True)
class PanelTokenizer:
    """Blocks of cells to genes with bins 1 .. ``num_bins``.

    Attributes:
        config: see :class:`PanelConfig`.
        vocab: the panel.
    """

    config: PanelConfig
    vocab: Vocab

    def __call__(self, block: CellBlock, draw: Draw) -> TokenBlock:
        """Tokenise the N cells of ``block``; draws only for cells longer than ``max_tokens``."""
        scaled = normalised(block, totals(block, self.config.library))
        levels = np.log1p(scaled)
        levels /= np.float32(np.log(2.0))
        bins = np.minimum(np.trunc(levels), np.float32(self.config.num_bins))
        tokens = self.vocab.gene_tokens[block.genes]
        found = lay_tokens(block, tokens, bins, bins > 0)
        if not (np.diff(found.indptr) > self.config.max_tokens).any():
            return found
        again = CellBlock(
            joinids=block.joinids,
            indptr=found.indptr,
            genes=block.genes[bins > 0],
            counts=found.values.astype(np.float32),
            library_sizes=block.library_sizes,
        )
        most = self.config.max_tokens
        keep = keep_sample(again, self.vocab, draw, stream=SAMPLE_STREAM, most=most)
        return lay_tokens(again, found.tokens.astype(np.int32), again.counts, keep)


def _build(config: PanelConfig, vocab: Vocab) -> PanelTokenizer:
    return PanelTokenizer(config, vocab)


TOKENIZER = TokenizerUnit(
    name="panel",
    config=PanelConfig,
    specials=("<pad>",),
    needs_medians=False,
    build=_build,
    value_dtype=lambda config: "int8",
)
