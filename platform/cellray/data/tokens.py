"""From joinids to tokens in one call: what a tokenisation actor, or a notebook, holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cellray.core import registry
from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.soma import Store
from cellray.data.vocab import Vocab
from cellray.tokenizers.base import Tokenizer, TokenizerUnit

__all__ = ["TokenSource", "make_tokenizer", "tokenise_content", "tokenizer_unit"]

I64 = npt.NDArray[np.int64]


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
    """Everything an actor needs to turn joinids into tokens; picklable.

    Attributes:
        store: locator of the SOMA store.
        gene_map: (V,) int32 vocabulary index of each gene of the store, -1 where it has none.
        vocab: the gene space.
        tokenizer: the tokenizer's configuration, JSON-like.
        joinids: (N,) ascending int64, the cells that ``codes`` speak of.
        codes: name -> (N,) int64 covariate codes aligned with ``joinids``.
        seed: the run's seed.
    """

    store: Store
    gene_map: npt.NDArray[np.int32]
    vocab: Vocab
    tokenizer: Mapping[str, Any]
    joinids: I64
    codes: Mapping[str, I64] = field(default_factory=dict)
    seed: int = 0

    def covariates(self, joinids: I64) -> dict[str, I64]:
        """The codes of the given cells, in their order."""
        rows = np.searchsorted(self.joinids, joinids)
        return {name: codes[rows] for name, codes in self.codes.items()}

    def tokens(self, joinids: I64, *, epoch: int, tokenizer: Tokenizer | None = None) -> TokenBlock:
        """Read and tokenise cells here and now, in the given order."""
        tokenizer = tokenizer or make_tokenizer(self.tokenizer, self.vocab)
        block = self.store.read_block(joinids, self.gene_map)
        return tokenizer(block, Draw(self.seed, epoch))
