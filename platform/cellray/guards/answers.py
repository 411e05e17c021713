"""Answers of methods before they are scored: whole, and not suspiciously alike.

Legend: N cells, C classes, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, label_texts

__all__ = [
    "ALIKE",
    "align_answers",
    "check_predictions",
    "identical_methods",
    "near_constant",
]

F = npt.NDArray[np.floating[Any]]
I64 = npt.NDArray[np.int64]

ALIKE = 0.999  # agreement of two methods above which they may be one and the same
_CONSTANT = 0.99  # share of one answer from which a method is said to answer nothing else
_MARGIN = 0.05  # by which it must be above the share of that class in the truth
_SPREAD = 1e-6  # of an embedding, relative to its size, below which all cells are one point
_LISTED = 5


def check_predictions(
    labels: Labels | None, confidence: F | None, embedding: F | None, num_cells: int
) -> None:
    """Refuse an answer that cannot be scored: a missing value is neither 0 nor passed over.

    Args:
        labels: (N,) predicted labels, or None.
        confidence: (N,) of them, or None.
        embedding: (N, D) vectors, or None.
        num_cells: N, the cells that were asked about.

    Raises:
        DataError: neither labels nor vectors, another number of rows, missing labels, or values
            that are not finite.
    """
    if labels is None and embedding is None:
        raise DataError("a method gave neither labels nor an embedding; there is nothing to score")
    if labels is not None:
        texts = label_texts(labels, "predicted")  # refuses missing ones
        if len(texts) != num_cells:
            raise DataError(
                f"{len(texts)} labels were predicted for {num_cells} cells; answer for every cell, "
                "those that were left out count as wrong (guards.answers.align_answers)"
            )
    for name, values in (("confidence", confidence), ("embedding", embedding)):
        if values is None:
            continue
        if len(values) != num_cells:
            raise DataError(f"the {name} has {len(values)} rows for {num_cells} cells")
        bad = ~np.isfinite(np.asarray(values, dtype=np.float64)).reshape(num_cells, -1).all(axis=1)
        if bad.any():
            raise DataError(
                f"the {name} of {int(bad.sum())} of {num_cells} cells is NaN or infinite (the "
                f"first is cell {int(np.flatnonzero(bad)[0])}): such an answer is a failure, not 0"
            )


def align_answers(
    expected: I64, answered: I64, labels: Labels, *, fill: str
) -> tuple[npt.NDArray[np.object_], list[str]]:
    """Labels of all cells that were to be answered for; those left out get ``fill``.

    Args:
        expected: (N,) joinids that count.
        answered: (M,) joinids that a method answered for, distinct.
        labels: (M,) its labels.
        fill: a label that no class has, so that a cell left out counts as wrong.

    Returns:
        (N,) labels in the order of ``expected``, and warnings.

    Raises:
        DataError: cells that nobody asked about, or one answered twice.
    """
    if len(np.unique(answered)) != len(answered):
        raise DataError("a method answered for a cell more than once")
    alien = np.setdiff1d(answered, expected)
    if len(alien):
        raise DataError(
            f"a method answered for {len(alien)} cells that are not in the test set (joinids "
            f"{', '.join(map(str, alien[:_LISTED].tolist()))})"
        )
    place = {int(cell): label for cell, label in zip(answered, labels, strict=True)}
    filled = np.array([place.get(int(cell), fill) for cell in expected], dtype=object)
    lost = len(expected) - len(answered)
    if not lost:
        return filled, []
    return filled, [f"{lost:,} of {len(expected):,} test cells were not answered: counted as wrong"]


def near_constant(predicted: Labels | F, truth: Labels | None = None) -> str:
    """A remark on a method that gives all cells the same answer; "" if it does not.

    Args:
        predicted: (N,) labels, or (N, D) vectors.
        truth: (N,) true labels: a method that is right to say one thing is not flagged.
    """
    array = np.asarray(predicted)
    if array.ndim == 2:
        values = array.astype(np.float64)
        spread = float(values.std(axis=0).max())
        if spread > _SPREAD * max(float(np.abs(values).max()), 1e-30):
            return ""
        return "near-constant: all cells have the same embedding"
    texts = label_texts(predicted, "predicted").astype(str)
    names, counts = np.unique(texts, return_counts=True)
    share, name = counts.max() / len(texts), str(names[counts.argmax()])
    real = 0.0 if truth is None else float(np.mean(label_texts(truth, "true") == name))
    if share < _CONSTANT or share < real + _MARGIN:
        return ""
    said = f" ({real:.0%} are)" if truth is not None else ""
    return f"near-constant: {share:.1%} of the cells are called '{name}'{said}"


def identical_methods(answers: Mapping[str, Labels]) -> list[tuple[str, str, float]]:
    """Pairs of methods whose labels agree on more than 99.9 % of the cells.

    Args:
        answers: method -> (N,) labels of the same cells in the same order.

    Returns:
        (first, second, share of equal labels), in the order of ``answers``.

    Raises:
        DataError: methods with another number of cells.
    """
    sizes = {name: len(labels) for name, labels in answers.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"methods answered for different numbers of cells: {sizes}")
    texts = {name: label_texts(labels, f"'{name}'") for name, labels in answers.items()}
    codes = _codes(list(texts.values()))
    found = []
    for (i, first), (j, second) in combinations(enumerate(texts), 2):
        agreement = float((codes[i] == codes[j]).mean()) if codes.shape[1] else 0.0
        if agreement > ALIKE:
            found.append((first, second, agreement))
    return found


def _codes(texts: Sequence[npt.NDArray[np.object_]]) -> I64:
    """(methods, N) whole numbers that are equal where the labels are."""
    if not texts:
        return np.zeros((0, 0), dtype=np.int64)
    _, codes = np.unique(np.concatenate(texts).astype(str), return_inverse=True)
    return codes.reshape(len(texts), -1).astype(np.int64)
