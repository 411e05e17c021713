"""What a tokenizer is: a pure function from a block of cells to ragged tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw
from cellray.core.section import Section
from cellray.data.vocab import Vocab

__all__ = ["Tokenizer", "TokenizerConfig", "TokenizerUnit"]


class TokenizerConfig(Section):
    """Keys every tokenizer has; each adds its own in its own file.

    Attributes:
        name: the tokenizer's module name.
        max_tokens: tokens per cell at most, specials included.
    """

    name: str
    max_tokens: int = 2048


class Tokenizer(Protocol):
    """Callable on a block; deterministic given (block, draw), whatever the block's cut."""

    def __call__(self, block: CellBlock, draw: Draw) -> TokenBlock:
        """Tokenise the N cells of ``block``."""
        ...


def _plain(config: Any) -> str:
    return "float32"


def _all_tokens(config: Any) -> int:
    return int(config.max_tokens)


def _no_zeros(config: Any) -> bool:
    return False


A_SAMPLE = "a keyed sample of their genes is kept"


@dataclass(frozen=True)
class TokenizerUnit:
    """What a tokenizer's module exports as ``TOKENIZER``.

    Attributes:
        name: equals the module's name.
        config: its configuration class.
        specials: special tokens a new vocabulary for it starts with, ``<pad>`` first.
        needs_medians: whether the vocabulary must carry corpus medians.
        build: (config, vocab) -> tokenizer; raises DataError if the vocabulary does not serve.
        value_dtype: config -> the narrowest type that holds every value of a token exactly; token
            streams and caches carry values in it.
        max_genes: config -> genes of a cell that are kept at most.
        when_longer: what becomes of cells with more.
        with_zeros: config -> whether genes without counts are tokens, too.
    """

    name: str
    config: type[TokenizerConfig]
    specials: tuple[str, ...]
    needs_medians: bool
    build: Callable[[Any, Vocab], Tokenizer]
    value_dtype: Callable[[Any], str] = _plain
    max_genes: Callable[[Any], int] = _all_tokens
    when_longer: str = A_SAMPLE
    with_zeros: Callable[[Any], bool] = _no_zeros
