"""Published vectors of genes (gene2vec and the like), laid out for a vocabulary by gene name.

Legend: G genes of the vocabulary, R rows of the file, D width.
"""

from __future__ import annotations

import gzip
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.data.vocab import Vocab

__all__ = ["read_gene_table", "read_vectors"]

F32 = npt.NDArray[np.float32]


def read_vectors(path: str | Path) -> tuple[list[str], F32]:
    """Gene names and vectors of a file, in its order.

    Args:
        path: a text file (also ``.gz``) of lines ``GENE number ... number``, with or without
            word2vec's first line ``rows width``; a ``.npz`` with arrays ``genes`` and ``vectors``;
            or a ``.npy`` of shape (R, D) with the R gene names, one a line, in a file beside it:
            ``table.npy`` and ``table.genes.txt``.

    Raises:
        DataError: the file is missing or is none of these.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no file of gene vectors at '{path}'")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return _checked(file, [str(g) for g in arrays["genes"]], arrays["vectors"])
        if file.suffix == ".npy":
            beside = file.with_suffix(".genes.txt")
            if not beside.is_file():
                raise DataError(
                    f"'{path}' holds vectors without gene names; write the names, one a line and "
                    f"in its order, to '{beside}'"
                )
            names = beside.read_text().split()
            return _checked(file, names, np.load(file, allow_pickle=False))
        return _text(file)
    except (ValueError, KeyError, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is no file of gene vectors: {error}") from error


def _checked(
    file: Path, names: list[str], vectors: npt.NDArray[np.generic]
) -> tuple[list[str], F32]:
    if vectors.ndim != 2 or len(names) != len(vectors):
        raise DataError(
            f"'{file}' has vectors of shape {vectors.shape} for {len(names)} gene names; it needs "
            "one row a gene"
        )
    return names, vectors.astype(np.float32)


def _text(file: Path) -> tuple[list[str], F32]:
    opened = gzip.open(file, "rt") if file.suffix == ".gz" else file.open()
    with opened as lines:
        rows = [line.split() for line in lines if line.strip()]
    if rows and len(rows[0]) == 2 and all(word.isdigit() for word in rows[0]):
        rows = rows[1:]
    widths = {len(row) for row in rows}
    if len(widths) != 1 or widths == {1}:
        raise DataError(
            f"'{file}' is no file of gene vectors: lines need a gene name and the same number of "
            f"numbers each (found {sorted(widths)[:4]} words a line)"
        )
    vectors = np.array([row[1:] for row in rows], dtype=np.float32)
    return [row[0] for row in rows], vectors


def read_gene_table(path: str | Path, vocab: Vocab) -> F32:
    """(G, D) vectors in vocabulary order; zeros (and a warning) for genes the file lacks.

    Genes are found by id or symbol, never by position.

    Raises:
        DataError: as in :func:`read_vectors`, or the file has none of the genes.
    """
    names, vectors = read_vectors(path)
    found = vocab.match(names, names)
    known = found >= 0
    if not known.any():
        raise DataError(
            f"'{path}' has vectors of {len(names)} genes ({', '.join(names[:3])}, ...), none of "
            f"them among the {len(vocab)} of the vocabulary ({', '.join(vocab.gene_ids[:3])}, ...)"
        )
    table = np.zeros((len(vocab), vectors.shape[1]), dtype=np.float32)
    table[found[known]] = vectors[known]
    missing = len(vocab) - int(known.sum())
    if missing:
        warnings.warn(
            f"'{path}' has no vector for {missing} of the {len(vocab)} genes; theirs are zeros",
            stacklevel=2,
        )
    return table
