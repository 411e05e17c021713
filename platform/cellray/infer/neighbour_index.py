"""The nearest reference cells of query cells: a reference is embedded once and kept in a folder.

Below ``exact_below`` reference cells the search is exact, by blocks in bounded memory, and a tie
goes to the lower row. From there on FAISS (extra ``faiss``) picks candidates by its flat index,
which compares with every cell too, in float32; their distances are then computed again and ordered
by (distance, row). No approximate index is ever used: FAISS may differ from the exact search only
where more cells than it offers tie, or come within its rounding, at the K-th place.

Legend: N reference cells, Q query cells, D dimensions, K neighbours.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellray.core.errors import ConfigError, DataError
from cellray.metrics.neighbours import finite_matrix, nearest_references

__all__ = ["EXACT_BELOW", "NeighbourIndex"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

EXACT_BELOW = 50_000
_FORMAT = "cellray.neighbour_index.v1"
_SPARE = 32  # candidates beyond K that FAISS is asked for
_QUERY_BLOCK = 4096
_FACTS, _EMBEDDING = "index.json", "embedding.npy"


@dataclass(frozen=True)
class NeighbourIndex:
    """Reference cells that can be searched; see :meth:`build` and :meth:`load`.

    Attributes:
        embedding: (N, D) float32, in memory or memory-mapped.
        exact_below: from this many reference cells on, FAISS picks the candidates.
    """

    embedding: F32
    exact_below: int
    _flat: Any = None  # (FAISS index, (D,) float64 mean that was taken off), if it is used

    @classmethod
    def build(cls, embedding: npt.ArrayLike, *, exact_below: int = EXACT_BELOW) -> NeighbourIndex:
        """Make an index of reference cells.

        Args:
            embedding: (N, D) finite numbers; kept as float32.
            exact_below: fewer reference cells than this are searched exactly, without FAISS.

        Raises:
            DataError: the embedding is no finite (N, D) array.
            ConfigError: FAISS is needed and not installed.
        """
        points = np.asarray(embedding, dtype=np.float32)
        if points.ndim != 2 or not points.size or not np.isfinite(points).all():
            finite_matrix(points, "reference embedding")  # says what is wrong
        flat = _faiss_index(points) if len(points) >= exact_below else None
        return cls(points, exact_below, flat)

    @property
    def num_cells(self) -> int:
        """N."""
        return len(self.embedding)

    @property
    def kind(self) -> str:
        """``exact`` or ``faiss``: what a search uses."""
        return "exact" if self._flat is None else "faiss"

    def search(self, query: npt.ArrayLike, k: int) -> tuple[F64, I64]:
        """The k nearest reference cells (L2) of each query cell, nearest first.

        The answer for a query cell does not depend on the other query cells.

        Args:
            query: (Q, D) finite numbers, by the model that embedded the reference; Q may be 0.
            k: 1 to N.

        Returns:
            (Q, K) float64 distances, not squared, and (Q, K) int64 rows of the reference.

        Raises:
            DataError: the query is no finite array of D dimensions, or k is outside 1..N.
        """
        if np.shape(query)[:1] == (0,):
            return np.zeros((0, k)), np.zeros((0, k), dtype=np.int64)
        asked = finite_matrix(query, "query embedding").astype(np.float32)
        if self._flat is None or k + _SPARE >= self.num_cells or k < 1:
            found = nearest_references(self.embedding, asked, k)
            return found.distances, found.indices
        if asked.shape[1] != self.embedding.shape[1]:
            nearest_references(self.embedding[:1], asked[:1], 1)  # says which has how many
        parts = [
            self._refined(asked[start : start + _QUERY_BLOCK], k)
            for start in range(0, len(asked), _QUERY_BLOCK)
        ]
        distances, rows = zip(*parts, strict=True)
        return np.concatenate(distances), np.concatenate(rows)

    def _refined(self, asked: F32, k: int) -> tuple[F64, I64]:
        """Candidates of FAISS, measured again and put in order."""
        index, mean = self._flat
        _, rows = index.search((asked - mean).astype(np.float32), k + _SPARE)
        distances = np.empty(rows.shape, dtype=np.float64)
        for place in range(rows.shape[1]):
            difference = asked.astype(np.float64) - self.embedding[rows[:, place]]
            distances[:, place] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
        order = np.lexsort((rows, distances), axis=1)[:, :k]
        nearest = np.take_along_axis(rows, order, axis=1).astype(np.int64)
        return np.take_along_axis(distances, order, axis=1), nearest

    def save(self, folder: str | Path, *, with_embedding: bool = True) -> None:
        """Write ``index.json`` and ``embedding.npy`` into ``folder``, made if it is not there.

        Args:
            folder: where to.
            with_embedding: False leaves the embedding out, if it is kept elsewhere and given to
                :meth:`load`.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if with_embedding:
            np.save(path / _EMBEDDING, self.embedding)
        facts = {
            "format": _FORMAT,
            "num_cells": self.num_cells,
            "num_dimensions": int(self.embedding.shape[1]),
            "exact_below": self.exact_below,
            "sha256": _sha256(self.embedding),
        }
        (path / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, embedding: npt.ArrayLike | None = None) -> NeighbourIndex:
        """Read an index that :meth:`save` wrote.

        Args:
            folder: where it lies.
            embedding: (N, D) the embedding, if the folder does not hold it.

        Raises:
            DataError: the folder holds no index or one of another format, or the embedding is not
                the one it was made of.
            ConfigError: FAISS is needed and not installed.
        """
        path = Path(folder)
        wanted = [_FACTS] if embedding is not None else [_FACTS, _EMBEDDING]
        missing = [name for name in wanted if not (path / name).is_file()]
        if missing:
            raise DataError(
                f"no neighbour index in '{path}': {', '.join(missing)} is missing; give the folder "
                "that the reference was saved to"
            )
        try:
            facts = json.loads((path / _FACTS).read_text(encoding="utf-8"))
            given = np.load(path / _EMBEDDING) if embedding is None else embedding
        except ValueError as error:
            raise DataError(f"the neighbour index in '{path}' cannot be read: {error}") from error
        if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
            raise DataError(
                f"'{path / _FACTS}' is not of the format {_FORMAT}; embed the reference again"
            )
        points = np.asarray(given, dtype=np.float32)
        shape = (facts["num_cells"], facts["num_dimensions"])
        if points.shape != shape or _sha256(points) != facts["sha256"]:
            raise DataError(
                f"the index in '{path}' was made of other cells: an embedding of shape {shape} "
                f"with SHA-256 {facts['sha256'][:12]}..., not this of shape {points.shape}; embed "
                "the reference again"
            )
        return cls.build(points, exact_below=int(facts["exact_below"]))


def _sha256(points: F32) -> str:
    return hashlib.sha256(np.ascontiguousarray(points).data).hexdigest()


def _faiss_index(points: F32) -> tuple[Any, F64]:
    """A flat FAISS index of the cells about their mean, and the mean."""
    if importlib.util.find_spec("faiss") is None:
        raise ConfigError(
            f"{len(points)} reference cells are searched by FAISS, which is not installed: pip "
            f"install 'cellray[faiss]', or search exactly with exact_below = {len(points) + 1}"
        )
    faiss = importlib.import_module("faiss")
    mean = points.mean(axis=0, dtype=np.float64)
    index = faiss.IndexFlatL2(points.shape[1])
    index.add(np.ascontiguousarray(points - mean, dtype=np.float32))
    return index, mean
