"""From joinids to tokens in one call: what a tokenisation actor, or a notebook, holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cellray.core import registry
from cellray.core.blocks import CellBlock, TokenBlock, lay_out
from cellray.core.draw import Draw
from cellray.core.ids import without_repeats
from cellray.core.section import build_section
from cellray.data.cache import open_cache
from cellray.data.stores import AnyStore
from cellray.data.vocab import Vocab
from cellray.tokenizers.base import Tokenizer, TokenizerUnit

__all__ = ["TokenSource", "make_tokenizer", "tokenise_content", "tokenizer_unit"]

I64 = npt.NDArray[np.int64]

_READ_CELLS = 4096  # cells read and tokenised at a time


def tokenizer_unit(name: str) -> TokenizerUnit:
    """Find a tokenizer by its key or by ``module.path:TOKENIZER``."""
    unit: TokenizerUnit = registry.find("cellray.tokenizers", name, "TOKENIZER")
    return unit


def make_tokenizer(config: Mapping[str, Any], vocab: Vocab) -> Tokenizer:
    """Build the tokenizer that ``config["name"]`` names."""
    unit = tokenizer_unit(config["name"])
    return unit.build(build_section(unit.config, config), vocab)


def tokenise_content(tokenizer: Tokenizer, block: CellBlock) -> TokenBlock:
    """Tokenise for inference: a cell's tokens depend on its counts alone, not on where it lies.

    Draws (ties between bins, samples of long cells) are keyed by the gene only, so that a cell
    gives the same tokens in a store, in an AnnData and in any company.
    """
    alike = replace(block, joinids=np.zeros_like(block.joinids))
    return replace(tokenizer(alike, Draw(0)), joinids=block.joinids)


@dataclass(frozen=True)
class TokenSource:
    """Everything an actor needs to turn cell ids into tokens; picklable.

    Attributes:
        store: locator of the SOMA store, or of several.
        gene_map: (V,) int32 vocabulary index of each gene of the store, -1 where it has none.
        vocab: the gene space.
        tokenizer: the tokenizer's configuration, JSON-like.
        joinids: (N,) ascending int64, the cells that ``codes`` speak of.
        codes: name -> (N,) int64 covariate codes aligned with ``joinids``.
        seed: the run's seed.
        cache: folder of a token cache to read from instead of the store; "" for none.
    """

    store: AnyStore
    gene_map: npt.NDArray[np.int32]
    vocab: Vocab
    tokenizer: Mapping[str, Any]
    joinids: I64
    codes: Mapping[str, I64] = field(default_factory=dict)
    seed: int = 0
    cache: str = ""

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The narrowest type that holds every token id of the vocabulary."""
        return np.dtype(np.uint16 if self.vocab.num_tokens <= 1 << 16 else np.int32)

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """The type values travel in, as the tokenizer says."""
        unit = tokenizer_unit(self.tokenizer["name"])
        return np.dtype(unit.value_dtype(build_section(unit.config, self.tokenizer)))

    def covariates(self, joinids: I64) -> dict[str, I64]:
        """The codes of the given cells, in their order."""
        rows = np.searchsorted(self.joinids, without_repeats(joinids))
        return {name: codes[rows] for name, codes in self.codes.items()}

    def cells(self, joinids: I64) -> CellBlock:
        """Read cells, each as often as it is asked for."""
        plain = without_repeats(joinids)
        distinct, back = np.unique(plain, return_inverse=True)
        if len(distinct) == len(plain):
            return replace(self.store.read_block(plain, self.gene_map), joinids=joinids)
        block = self.store.read_block(distinct, self.gene_map)
        return replace(block.take(back), joinids=joinids)

    def tokens(self, joinids: I64, *, epoch: int, tokenizer: Tokenizer | None = None) -> TokenBlock:
        """Read and tokenise cells here and now, in the given order.

        Cells are read a few thousand at a time in the store's order, so that memory is bounded by
        the tokens of the request and little more.

        Args:
            joinids: (N,) cell ids; a cell may come more than once.
            epoch: the pass over the data, for draws; a cache's tokens are the same in every epoch.
            tokenizer: as from :func:`make_tokenizer`; None builds it.

        Returns:
            N cells, tokens and values in the narrowest types that hold them.
        """
        if self.cache:
            return open_cache(self).tokens(joinids)
        tokenizer = tokenizer or make_tokenizer(self.tokenizer, self.vocab)
        draw = Draw(self.seed, epoch)
        order = np.argsort(without_repeats(joinids), kind="stable")
        parts = []
        for first in range(0, len(order), _READ_CELLS):
            places = order[first : first + _READ_CELLS]
            block = tokenizer(self.cells(joinids[places]), draw)
            narrow = replace(
                block,
                tokens=block.tokens.astype(self.token_dtype),
                values=block.values.astype(self.value_dtype),
            )
            parts.append((places, narrow))
        return lay_out(parts, joinids=joinids)
