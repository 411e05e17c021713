"""The nearest cells of an embedding to other cells: exactly in memory, or by FAISS for many.

Exactly: squared distances of a block come from one matrix product, which loses digits where cells
are close. They only choose candidates, every cell whose rounded distance might be among the k
least; their distances are computed again from differences and ordered by (distance, row).

FAISS (an extra) compares all pairs too, in float32 and with all cores: cells whose distances
differ by less than that tells apart may change places. What it returns is measured again alike.

Legend: N cells of the embedding, Q queries, D width, K neighbours, Z candidates.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cellray.core.errors import ConfigError, DataError

__all__ = ["NeighbourIndex"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_BLOCK_BYTES = 32 << 20
_FACTS = "index.json"
_FORMAT = "cellray.neighbour_index.v1"
_EXTRA = 8  # neighbours that FAISS is asked for beyond k, to be measured again


@dataclass(frozen=True)
class NeighbourIndex:
    """What finds the nearest cells.

    Attributes:
        embedding: where the cells lie.
        kind: ``exact`` or ``faiss``.

    Shapes:
        embedding: (N, D) float32, in memory or memory-mapped.
    """

    embedding: F32
    kind: Literal["exact", "faiss"]

    @staticmethod
    def build(embedding: npt.NDArray[np.floating], *, exact_below: int = 50_000) -> NeighbourIndex:
        """Prepare a search.

        Args:
            embedding: (N, D) finite numbers.
            exact_below: fewer cells are searched exactly, more by FAISS.

        Raises:
            DataError: the embedding is no (N, D) array.
            ConfigError: FAISS is needed, and is not installed.
        """
        vectors = embedding.astype(np.float32, copy=False)
        if vectors.ndim != 2 or not vectors.size:
            raise DataError(f"an index needs (cells, width) vectors; given: {vectors.shape}")
        if len(vectors) < exact_below:
            return NeighbourIndex(vectors, "exact")
        _faiss(len(vectors))
        return NeighbourIndex(vectors, "faiss")

    def search(self, query: npt.NDArray[np.floating], k: int) -> tuple[F64, I64]:
        """The k nearest cells of each query, nearest first, by Euclidean distance.

        Args:
            query: (Q, D) finite numbers.
            k: 1 to N.

        Returns:
            Distances (Q, K) and rows of the embedding (Q, K); equal distances by row.

        Raises:
            DataError: another width, or k is outside 1..N.
        """
        points = np.asarray(query, dtype=np.float64)
        if points.ndim != 2 or points.shape[1] != self.embedding.shape[1]:
            raise DataError(
                f"queries of shape {points.shape} for an index of width {self.embedding.shape[1]}"
            )
        if not 1 <= k <= len(self.embedding):
            raise DataError(f"k = {k} among {len(self.embedding)} cells; k must be 1 to that")
        distances = np.empty((len(points), k))
        rows = np.empty((len(points), k), dtype=np.int64)
        step = max(1, _BLOCK_BYTES // (8 * len(self.embedding)))
        if self.kind == "faiss":
            step = max(1, _BLOCK_BYTES // (8 * (k + _EXTRA) * points.shape[1]))
        for start in range(0, len(points), step):
            part = slice(start, start + step)
            pairs = self._by_faiss if self.kind == "faiss" else self._by_product
            lines, columns = pairs(points[part], k)
            distances[part], rows[part] = self._nearest(points[part], lines, columns, k)
        return distances, rows

    @cached_property
    def _about(self) -> tuple[F64, F64, F64]:
        """The cells about their mean, their squared norms, and the mean."""
        middle = self.embedding.mean(axis=0, dtype=np.float64)
        points = self.embedding.astype(np.float64) - middle
        return points, np.einsum("ij,ij->i", points, points), middle

    @cached_property
    def _flat(self) -> Any:
        """FAISS's index, made when it is first needed."""
        flat = _faiss(len(self.embedding)).IndexFlatL2(self.embedding.shape[1])
        flat.add(np.ascontiguousarray(self.embedding))
        return flat

    def _by_product(self, query: F64, k: int) -> tuple[I64, I64]:
        """(Z,) queries and (Z,) rows of every pair that might be among the k nearest."""
        points, squares, middle = self._about
        moved = query - middle
        own = np.einsum("ij,ij->i", moved, moved)
        rough = moved @ points.T
        rough *= -2.0
        rough += squares[None, :]
        rough += own[:, None]
        # a rounded square is wrong by less than C (|x| + |y|)^2: the k-th one, and any other
        error = (points.shape[1] + 8) * np.finfo(np.float64).eps
        slack = 2.0 * error * (np.sqrt(own) + np.sqrt(squares.max())) ** 2
        limit = np.partition(rough, k - 1, axis=1)[:, k - 1] + slack
        flat = np.flatnonzero(rough <= limit[:, None])
        return flat // len(points), flat % len(points)

    def _by_faiss(self, query: F64, k: int) -> tuple[I64, I64]:
        wanted = min(k + _EXTRA, len(self.embedding))
        _, found = self._flat.search(np.ascontiguousarray(query, dtype=np.float32), wanted)
        return np.repeat(np.arange(len(query)), wanted), found.astype(np.int64).ravel()

    def _nearest(self, query: F64, lines: I64, columns: I64, k: int) -> tuple[F64, I64]:
        """The first k candidates of each query by (distance, row), measured by differences."""
        found = np.empty(len(lines))
        step = max(1, _BLOCK_BYTES // (8 * query.shape[1]))
        for start in range(0, len(lines), step):
            part = slice(start, start + step)
            difference = query[lines[part]] - self.embedding[columns[part]]
            found[part] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
        order = np.lexsort((columns, found, lines))
        counts = np.bincount(lines, minlength=len(query))
        picked = order[(np.cumsum(counts) - counts)[:, None] + np.arange(k)[None, :]]
        return found[picked], columns[picked]

    def save(self, folder: str | Path) -> None:
        """Keep what is needed beside the embedding, which is kept elsewhere.

        Raises:
            OSError: the folder cannot be written.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        facts = {"format": _FORMAT, "kind": self.kind, "cells": len(self.embedding)}
        (path / _FACTS).write_text(json.dumps(facts))

    @staticmethod
    def load(folder: str | Path, embedding: npt.NDArray[np.floating]) -> NeighbourIndex:
        """The index that was kept, over its embedding.

        Raises:
            DataError: there is none, or it is of other cells.
            ConfigError: FAISS is needed, and is not installed.
        """
        path = Path(folder) / _FACTS
        try:
            facts = json.loads(path.read_text())
            kind, cells = facts["kind"], facts["cells"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"no neighbour index can be read at '{folder}': {error}") from error
        if facts.get("format") != _FORMAT or kind not in ("exact", "faiss"):
            raise DataError(f"'{folder}' holds no index that this version reads: {facts}")
        if cells != len(embedding):
            raise DataError(f"the index '{folder}' is of {cells} cells, not of {len(embedding)}")
        return NeighbourIndex.build(embedding, exact_below=0 if kind == "faiss" else cells + 1)


def _faiss(num_cells: int) -> Any:
    """The module, or the error that says what to do without it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ConfigError(
            f"{num_cells} reference cells are searched by FAISS, which is not installed: install "
            f"it (pip install 'cellray[faiss]'), or search exactly with exact_below = "
            f"{num_cells + 1}"
        ) from error
