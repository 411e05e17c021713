"""What objectives share: which positions hold genes, and draws keyed by cell and token.

Legend: B cells, T tokens, S selected positions laid end to end, G genes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from cellray.core.batch import CellBatch
from cellray.core.draw import Draw
from cellray.core.errors import DataError
from cellray.data.vocab import Vocab

__all__ = ["gene_positions", "is_gene_table", "missing_prediction", "smallest_of_each_cell"]

Tensor = torch.Tensor


def is_gene_table(vocab: Vocab) -> npt.NDArray[np.bool_]:
    """(tokens,) True where a token id is a gene, not a special."""
    table = np.zeros(vocab.num_tokens, dtype=bool)
    table[vocab.gene_tokens] = True
    return table


def gene_positions(batch: CellBatch, is_gene: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(B, T), or packed (P,): True at real tokens that are genes."""
    where: npt.NDArray[np.bool_] = is_gene[batch.token_ids.numpy()] & batch.attention_mask.numpy()
    return where


I64 = npt.NDArray[np.int64]


def smallest_of_each_cell(
    batch: CellBatch,
    among: npt.NDArray[np.bool_],
    draw: Draw,
    *,
    stream: str,
    wanted: Callable[[I64], I64],
) -> tuple[I64, I64, I64]:
    """The tokens with the smallest draws of their cell.

    Args:
        batch: padded or packed.
        among: of ``token_ids``' shape, True at tokens that may be chosen.
        draw: gives a number to each (cell, token).
        stream: what the draw is for.
        wanted: (B,) numbers of candidates -> (B,) how many to choose, not more.

    Returns:
        Flat places in ``token_ids`` of the S chosen ones, their rows and their token ids, each
        (S,), cell by cell.
    """
    cells = batch.cell_ids.numpy()
    places = np.flatnonzero(among)
    rows = batch.token_rows().numpy().reshape(-1)[places]
    lengths = np.bincount(rows, minlength=len(cells)).astype(np.int64)
    tokens = batch.token_ids.numpy().reshape(-1)[places]
    order = np.lexsort((draw.uniform(stream, cells[rows], tokens), rows))  # stable, cell by cell
    rank = np.arange(len(places)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chosen = order[rank < wanted(lengths)[rows]]
    return places[chosen], rows[chosen], tokens[chosen]


def missing_prediction(objective: str, name: str, given: list[str]) -> DataError:
    """The error for a model that does not predict what an objective counts."""
    return DataError(
        f"objective '{objective}' reads the prediction '{name}', and the model gives "
        f"{given or 'none'}; choose the objective that the model's family is pretrained with, or "
        "'classification' for a model with a classifier"
    )
