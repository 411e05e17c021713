"""Log-normalised expression: each non-zero gene with ``ln(1 + 10,000 * count / library size)``.

What TOSICA (doi:10.1038/s41467-023-35923-4) is fed. Genes without counts have the value 0 and are
not among the tokens; the model fills its matrix up.
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

__all__ = ["SAMPLE_STREAM", "TOKENIZER", "LognormConfig", "LognormTokenizer"]

SAMPLE_STREAM = "lognorm.sample"


class LognormConfig(TokenizerConfig):
    """Log-normalised values.

    Attributes:
        name: ``lognorm``.
        max_tokens: genes a cell may keep; longer cells keep a keyed sample. The default keeps all.
        library: what a cell is scaled by: its counts on all genes of the store, or on the
            vocabulary's genes only.
    """

    name: str = "lognorm"
    max_tokens: int = Field(default=1 << 16, ge=1)
    library: Library = "all"


@dataclass(frozen=True)
class LognormTokenizer:
    """Blocks of cells to genes with log-normalised values.

    Attributes:
        config: see :class:`LognormConfig`.
        vocab: the gene space.
    """

    config: LognormConfig
    vocab: Vocab

    def __call__(self, block: CellBlock, draw: Draw) -> TokenBlock:
        """Tokenise the N cells of ``block``; draws only for cells longer than ``max_tokens``."""
        values = np.log1p(normalised(block, totals(block, self.config.library)))
        most = self.config.max_tokens
        keep = keep_sample(block, self.vocab, draw, stream=SAMPLE_STREAM, most=most)
        return lay_tokens(block, self.vocab.gene_tokens[block.genes], values, keep)


def _build(config: LognormConfig, vocab: Vocab) -> LognormTokenizer:
    return LognormTokenizer(config, vocab)


TOKENIZER = TokenizerUnit(
    name="lognorm",
    config=LognormConfig,
    specials=("<pad>",),
    needs_medians=False,
    build=_build,
)
