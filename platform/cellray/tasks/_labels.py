"""Labels and batches of cells as tasks read them from obs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import DataError

__all__ = ["NO_LABEL", "check_several", "column_texts", "given", "labels_of"]

BoolArray = npt.NDArray[np.bool_]
Texts = npt.NDArray[np.object_]

NO_LABEL = ("", "nan", "NA", "unknown")


def column_texts(column: pd.Series) -> Texts:
    """Values as text, None where missing."""
    missing = column.isna().to_numpy()
    texts = column.astype(object).to_numpy(copy=True)
    texts[~missing] = [str(value) for value in texts[~missing]]
    texts[missing] = None
    return np.asarray(texts, dtype=object)


def labels_of(column: pd.Series, ignored: Sequence[str]) -> Texts:
    """Labels as text, None where there is none or one that means none."""
    labels = column_texts(column)
    labels[np.isin(labels.astype(str), list(ignored))] = None
    return labels


def given(labels: Texts) -> BoolArray:
    """(N,) True where there is a label."""
    return np.array([value is not None for value in labels], dtype=bool)


def check_several(labels: Texts, column: str) -> None:
    """An embedding is scored by how it tells labels apart: refuse fewer than two, before work.

    Raises:
        DataError: they are all one, or there is none.
    """
    values = sorted(set(labels.tolist()))
    if len(values) < 2:
        told = (
            f"all {len(labels)} cells have the '{column}' '{values[0]}'"
            if values
            else (f"no cell has a '{column}'")
        )
        raise DataError(
            f"{told}: an embedding is scored by how it tells labels apart; choose another column "
            "as task.label"
        )
