"""What identifies cells: stable hashes of strings, of one cell's counts, and of many cells."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cellray.core.draw import splitmix64
from cellray.data import schema

__all__ = ["Strings", "cell_hashes", "content_digest", "digest_of_cells", "hash64", "keys_of_cells"]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Strings: TypeAlias = Sequence[str] | npt.NDArray[np.generic] | pa.Array | pa.ChunkedArray


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _hash_texts(offsets: I64, data: npt.NDArray[np.uint8], salt: np.uint64, out: U64) -> None:
    """SplitMix64 over the little-endian 8-byte words of each text, from its length on."""
    golden, first = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)
    second = np.uint64(0x94D049BB133111EB)
    for i in range(len(out)):
        begin, end = offsets[i], offsets[i + 1]
        word = np.uint64(end - begin) ^ salt
        state = np.uint64(0)
        at = begin
        while True:
            z = (state ^ word) + golden
            z = (z ^ (z >> np.uint64(30))) * first
            z = (z ^ (z >> np.uint64(27))) * second
            state = z ^ (z >> np.uint64(31))
            if at >= end:
                break
            word = np.uint64(0)
            for k in range(min(8, end - at)):
                word |= np.uint64(data[at + k]) << np.uint64(8 * k)
            at += 8
        out[i] = state


def _texts(values: Strings) -> pa.LargeStringArray:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        values = pa.array([str(v) for v in values], pa.large_string())
    texts = values if pa.types.is_large_string(values.type) else values.cast(pa.large_string())
    return texts.fill_null("None") if texts.null_count else texts


def hash64(values: Strings, *, salt: int = 0) -> U64:
    """A 64-bit hash of each string that depends on its UTF-8 bytes and ``salt`` alone.

    SplitMix64 over little-endian 8-byte words, started from the byte length. Stable over
    machines, processes and versions of any library.

    Args:
        values: N strings, fastest as Arrow's; anything else is hashed as ``str(value)``.
        salt: another salt gives an independent hash.

    Returns:
        (N,) uint64.
    """
    key = splitmix64(np.array([salt], dtype=np.int64).astype(np.uint64))[0]
    texts = _texts(values)
    hashes = np.zeros(len(texts), dtype=np.uint64)
    if len(texts):
        _, offsets, data = texts.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[texts.offset :][: len(texts) + 1]
        held = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        _hash_texts(bounds, held, key, hashes)
    return hashes


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


def _met(obs: Iterable[pa.Table], joinids: I64) -> Iterator[tuple[I64, pa.Table]]:
    """Those rows of an obs in pieces that are asked for, with their places in ``joinids``."""
    for table in obs:
        found = table.column(schema.JOINID).to_numpy()
        rows = np.minimum(np.searchsorted(joinids, found), len(joinids) - 1)
        met = joinids[rows] == found
        yield rows[met], table if met.all() else table.filter(pa.array(met))


def keys_of_cells(obs: Iterable[pa.Table], joinids: I64, id_column: str) -> U64:
    """:func:`hash64` of the ids of some cells of an obs that comes in pieces.

    Args:
        obs: tables with ``soma_joinid`` and ``id_column``, in any order.
        joinids: (N,) ascending, at least one; all of them must come.
        id_column: obs column with the cell ids.
    """
    keys = np.zeros(len(joinids), dtype=np.uint64)
    for rows, table in _met(obs, joinids):
        keys[rows] = hash64(table.column(id_column))
    return keys


def digest_of_cells(obs: Iterable[pa.Table], joinids: I64, id_column: str) -> str:
    """:func:`content_digest` of some cells of an obs that comes in pieces; 32 bytes a cell.

    Args:
        obs: tables with ``soma_joinid``, ``id_column`` and the cell hashes, in any order.
        joinids: (N,) ascending, at least one; all of them must come.
        id_column: obs column with the cell ids.
    """
    ids, hashes = np.zeros(len(joinids), np.uint64), np.zeros(len(joinids), np.uint64)
    for rows, table in _met(obs, joinids):
        ids[rows] = hash64(table.column(id_column))
        hashes[rows] = table.column(schema.CELL_HASH).to_numpy().astype(np.uint64)
    return content_digest(ids, hashes)
