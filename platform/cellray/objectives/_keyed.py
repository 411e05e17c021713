"""What objectives share: which positions hold genes, and draws keyed by cell and token.

Legend: B cells, T tokens, S selected positions laid end to end, G genes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from cellray.core.batch import CellBatch
from cellray.core.errors import DataError
from cellray.data.vocab import Vocab

__all__ = ["gene_positions", "is_gene_table", "missing_prediction"]

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


def missing_prediction(objective: str, name: str, given: list[str]) -> DataError:
    """The error for a model that does not predict what an objective counts."""
    return DataError(
        f"objective '{objective}' reads the prediction '{name}', and the model gives "
        f"{given or 'none'}; choose the objective that the model's family is pretrained with, or "
        "'classification' for a model with a classifier"
    )
