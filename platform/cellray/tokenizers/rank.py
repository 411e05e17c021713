"""Rank-value encoding: a cell as its genes in descending order of median-normalised counts.

The encoding of Geneformer (doi:10.1038/s41586-023-06139-9): the value of gene g in a cell is
``count_g / library_size * 10,000 / median_g``, with ``median_g`` the corpus-wide non-zero median of
the 10,000-normalised counts and the library size over all genes of the store. Within a cell the
order depends on ``count_g / median_g`` alone.

Precision: the score is the float32 quotient of the float32 count and the float32 median; genes
whose scores are equal in float32 stand in vocabulary order. The value emitted is
``score * float32(10,000 / library_size)``, a float32 product, so it never increases along a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw
from cellray.core.errors import DataError
from cellray.data.vocab import Vocab
from cellray.tokenizers._kernels import rank_cells
from cellray.tokenizers.base import TokenizerConfig, TokenizerUnit

__all__ = ["TARGET_SUM", "TOKENIZER", "RankConfig", "RankTokenizer"]

TARGET_SUM = 10_000.0


class RankConfig(TokenizerConfig):
    """Rank-value encoding.

    Attributes:
        name: ``rank``.
        max_tokens: tokens per cell at most, specials included; 2,048 (V1) or 4,096 (V2). The
            lowest-ranked genes are cut.
        specials: put ``<cls>`` first and ``<eos>`` last (V2); False gives genes only (V1).
    """

    name: str = "rank"
    max_tokens: int = Field(default=2048, ge=1)
    specials: bool = False

    @model_validator(mode="after")
    def _room_for_genes(self) -> RankConfig:
        if self.specials and self.max_tokens < 3:
            raise ValueError(
                f"max_tokens = {self.max_tokens} leaves no room for genes beside <cls> and <eos>; "
                "set it to 3 or more"
            )
        return self


@dataclass(frozen=True)
class RankTokenizer:
    """Blocks of cells to ranked gene tokens.

    A cell without a vocabulary gene gives ``<cls> <eos>`` with specials and no token without.

    Attributes:
        config: see :class:`RankConfig`.
        vocab: a vocabulary with corpus medians.
    """

    config: RankConfig
    vocab: Vocab

    def __call__(self, block: CellBlock, draw: Draw) -> TokenBlock:
        """Tokenise the N cells of ``block``; nothing is drawn.

        Raises:
            DataError: a cell has counts but a library size that is not above 0.
        """
        assert self.vocab.medians is not None
        specials = self.config.specials
        lengths = np.diff(block.indptr)
        kept = np.minimum(lengths, self.config.max_tokens - 2 * specials)
        indptr = np.zeros(len(block) + 1, dtype=np.int64)
        np.cumsum(kept + 2 * specials, out=indptr[1:])
        tokens = np.empty(indptr[-1], dtype=np.int32)
        values = np.zeros(indptr[-1], dtype=np.float32)
        rank_cells(
            block.indptr,
            block.genes,
            block.counts,
            self.vocab.medians,
            _scales(block, lengths),
            self.vocab.gene_tokens,
            indptr,
            int(specials),
            kept,
            tokens,
            values,
        )
        if specials:
            tokens[indptr[:-1]] = self.vocab.special("<cls>")
            tokens[indptr[1:] - 1] = self.vocab.special("<eos>")
        return TokenBlock(joinids=block.joinids, indptr=indptr, tokens=tokens, values=values)


def _scales(block: CellBlock, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(N,) float32 10,000 / library size; 0 for cells without counts."""
    wrong = (lengths > 0) & ~(block.library_sizes > 0)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"cell {block.joinids[first]} has counts but a library size of "
            f"{block.library_sizes[first]}; the library size is the sum over all genes and must be "
            "above 0: ingest the store again from raw counts"
        )
    sizes = np.where(lengths > 0, block.library_sizes, 1).astype(np.float64)
    return np.where(lengths > 0, TARGET_SUM / sizes, 0).astype(np.float32)


def _build(config: RankConfig, vocab: Vocab) -> RankTokenizer:
    """Raises DataError if the vocabulary has no usable medians or lacks a special."""
    if vocab.medians is None:
        raise DataError(
            "the 'rank' tokenizer needs corpus medians and the vocabulary has none; let the run "
            "build the vocabulary (data.vocab = 'store') or give one saved with medians"
        )
    wrong = np.flatnonzero(~(np.isfinite(vocab.medians) & (vocab.medians > 0)))
    if len(wrong):
        raise DataError(
            f"{len(wrong)} medians of the vocabulary are not above 0, the first of gene "
            f"'{vocab.gene_ids[wrong[0]]}' ({vocab.medians[wrong[0]]}); genes that were never seen "
            "take 1.0"
        )
    if config.specials:
        vocab.special("<cls>")
        vocab.special("<eos>")
    return RankTokenizer(config, vocab)


TOKENIZER = TokenizerUnit(
    name="rank",
    config=RankConfig,
    specials=("<pad>", "<mask>", "<cls>", "<eos>"),
    needs_medians=True,
    build=_build,
    value_dtype=lambda config: "int8",  # all 0
    max_genes=lambda config: config.max_tokens - 2 * config.specials,
    when_longer="their lowest-ranked genes are cut",
)
