"""From ragged tokens to mini-batches, padded or packed.

Tokens of any integer type and values of any numeric type become int64 and float32 in one pass.

Legend: B cells in a batch, T tokens of the longest cell of the batch, P tokens of all its cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from cellray.core.batch import CellBatch
from cellray.core.blocks import TokenBlock, row_ids
from cellray.core.packing import Packing

__all__ = ["collate_packed", "collate_tokens"]


def collate_tokens(
    block: TokenBlock,
    *,
    pad: int,
    covariates: Mapping[str, npt.NDArray[np.int64]] | None = None,
    step: int = 0,
) -> CellBatch:
    """Pad a block of B cells to its own longest cell.

    Args:
        block: the tokenised cells; a cell without tokens becomes a row of padding with one
            attended pad token, so that attention stays defined.
        pad: token id of ``<pad>``.
        covariates: name -> (B,) codes.
        step: the optimizer step the batch is for.

    Returns:
        A batch with ``token_ids``, ``values`` (0 at padding) and ``attention_mask`` of (B, T).
    """
    lengths = np.diff(block.indptr)
    longest = max(int(lengths.max(initial=0)), 1)
    shape = (len(block), longest)
    rows = row_ids(block.indptr)
    columns = np.arange(len(rows), dtype=np.int64) - np.repeat(block.indptr[:-1], lengths)
    token_ids = np.full(shape, pad, dtype=np.int64)
    values = np.zeros(shape, dtype=np.float32)
    token_ids[rows, columns] = block.tokens
    values[rows, columns] = block.values
    attended = np.arange(longest) < np.maximum(lengths, 1)[:, None]
    return CellBatch(
        cell_ids=torch.from_numpy(np.array(block.joinids)),
        token_ids=torch.from_numpy(token_ids),
        values=torch.from_numpy(values),
        attention_mask=torch.from_numpy(attended),
        covariates=_codes(covariates),
        step=step,
    )


def collate_packed(
    block: TokenBlock,
    *,
    pad: int,
    covariates: Mapping[str, npt.NDArray[np.int64]] | None = None,
    step: int = 0,
) -> CellBatch:
    """Lay a block of B cells end to end: what :func:`collate_tokens` gives, without its padding.

    Args:
        block: the tokenised cells; a cell without tokens becomes one pad token, as it does in a
            padded batch.
        pad: token id of ``<pad>``.
        covariates: name -> (B,) codes.
        step: the optimizer step the batch is for.

    Returns:
        A batch with ``token_ids``, ``values`` and ``attention_mask`` (all True) of (P,).
    """
    lengths = np.diff(block.indptr)
    packing = Packing.of(np.maximum(lengths, 1))
    empty = np.repeat(lengths == 0, np.maximum(lengths, 1))
    token_ids = np.full(len(empty), pad, dtype=np.int64)
    values = np.zeros(len(empty), dtype=np.float32)
    token_ids[~empty] = block.tokens
    values[~empty] = block.values
    return CellBatch(
        cell_ids=torch.from_numpy(np.array(block.joinids)),
        token_ids=torch.from_numpy(token_ids),
        values=torch.from_numpy(values),
        attention_mask=torch.ones(len(empty), dtype=torch.bool),
        covariates=_codes(covariates),
        step=step,
        packing=packing,
    )


def _codes(covariates: Mapping[str, npt.NDArray[np.int64]] | None) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(c)) for name, c in (covariates or {}).items()}
