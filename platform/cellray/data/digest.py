"""What identifies cells: stable hashes of strings, of one cell's counts, and of many cells."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cellray.core.draw import splitmix64

__all__ = ["cell_hashes", "content_digest", "hash64"]

U64 = npt.NDArray[np.uint64]
Strings = Sequence[str] | npt.NDArray[np.generic]

_CHUNK = 1 << 16  # strings hashed at a time: bounds the padded byte matrix


def _hash_chunk(texts: npt.NDArray[np.str_], salt: np.uint64) -> U64:
    encoded = np.char.encode(texts, "utf-8")
    width = max(8, -(-encoded.dtype.itemsize // 8) * 8)
    words = encoded.astype(f"S{width}").view("<u8").reshape(len(texts), width // 8)
    lengths = np.char.str_len(encoded).astype(np.uint64)
    state = splitmix64(lengths ^ salt)
    for column in range(words.shape[1]):
        # a word past a string's end must not count: the hash may not depend on its neighbours
        mixed = splitmix64(state ^ words[:, column].astype(np.uint64))
        state = np.where(lengths > np.uint64(8 * column), mixed, state)
    return state


def hash64(values: Strings, *, salt: int = 0) -> U64:
    """A 64-bit hash of each string that depends on its UTF-8 bytes and ``salt`` alone.

    SplitMix64 over little-endian 8-byte words, started from the byte length. Stable over
    machines, processes and versions of any library.

    Args:
        values: N strings; anything else is hashed as ``str(value)``.
        salt: another salt gives an independent hash.

    Returns:
        (N,) uint64.
    """
    key = splitmix64(np.array([salt], dtype=np.int64).astype(np.uint64))[0]
    texts = np.asarray(values)
    if texts.dtype.kind != "U":
        texts = np.array([str(v) for v in values], dtype=np.str_)
    parts = [_hash_chunk(texts[i : i + _CHUNK], key) for i in range(0, len(texts), _CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint64)


def cell_hashes(
    indptr: npt.NDArray[np.integer],
    genes: npt.NDArray[np.integer],
    counts: npt.NDArray[np.float32],
    gene_hashes: U64,
) -> U64:
    """A hash of each cell's (gene id, count) pairs, whatever the order of the genes.

    The sum mod 2^64 of SplitMix64(gene hash XOR SplitMix64(bits of the float32 count)).

    Args:
        indptr: (N+1,) offsets into ``genes`` and ``counts``.
        genes: (Z,) rows of ``gene_hashes``.
        counts: (Z,) non-zero counts.
        gene_hashes: (V,) :func:`hash64` of the canonical gene ids.

    Returns:
        (N,) uint64; 0 for a cell without counts.
    """
    bits = np.ascontiguousarray(counts, dtype=np.float32).view(np.uint32).astype(np.uint64)
    mixed = splitmix64(gene_hashes[genes] ^ splitmix64(bits))
    result = np.zeros(len(indptr) - 1, dtype=np.uint64)
    filled = np.flatnonzero(np.diff(indptr) > 0)
    if len(filled):
        result[filled] = np.add.reduceat(mixed, np.asarray(indptr)[filled].astype(np.int64))
    return result


def content_digest(cell_ids: Strings | U64, hashes: U64) -> str:
    """SHA-256 over the sorted (cell id, cell hash) pairs: the same cells in any order agree.

    Args:
        cell_ids: (N,) cell ids, or their :func:`hash64` as uint64.
        hashes: (N,) :func:`cell_hashes`.
    """
    hashed = isinstance(cell_ids, np.ndarray) and cell_ids.dtype == np.uint64
    pairs = np.empty((len(hashes), 2), dtype="<u8")
    pairs[:, 0], pairs[:, 1] = cell_ids if hashed else hash64(cell_ids), hashes
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    digest = hashlib.sha256(f"cells:{len(hashes)}".encode())
    digest.update(np.ascontiguousarray(pairs[order]).data)
    return digest.hexdigest()
