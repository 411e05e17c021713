"""The token cache: a tokenised selection of cells on disk, read back memory-mapped.

    <folder>/cache.json          what the tokens depend on, and how many shards there are
    <folder>/cells.npy           (N,) ids of the cells, ascending
    <folder>/shard-00000.arrow   an Arrow IPC file with one record batch: id, tokens, values

A cache says of itself which vocabulary, tokenizer and cells its tokens come from, and is refused
if any of them differs from what a run asks for. Every shard carries a checksum that is
verified when a process first reads it; a shard that is damaged or gone is named and written anew
from the store. What a tokenizer draws (ties between bins, samples of long cells) is drawn once for
all epochs and for every run's seed. What objectives draw is not affected.

Legend: N cells of the cache, Z tokens of a shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cellray.core.blocks import TokenBlock, lay_out
from cellray.core.errors import DataError
from cellray.core.ids import without_repeats

if TYPE_CHECKING:
    from cellray.data.tokens import TokenSource

__all__ = ["CacheInfo", "TokenCache", "cache_key", "check_cache", "open_cache", "prepare_cache"]

I64 = npt.NDArray[np.int64]

FORMAT = 1  # raised whenever a kernel's tokens or the files change
CELLS_PER_SHARD = 16_384
_MANIFEST = "cache.json"
_CELLS = "cells.npy"
_log = logging.getLogger(__name__)


def cache_key(source: TokenSource, *, cells: I64, fingerprint: str) -> dict[str, str]:
    """Everything that changes tokens, by name.

    Args:
        source: store, vocabulary and tokenizer.
        cells: (N,) ids of the cells, ascending.
        fingerprint: SHA-256 of the cells' ids and counts.
    """
    return {
        "format": str(FORMAT),
        "vocabulary": source.vocab.fingerprint,
        "tokenizer": json.dumps(dict(source.tokenizer), sort_keys=True),
        "cells": hashlib.sha256(np.ascontiguousarray(cells, dtype="<i8").tobytes()).hexdigest(),
        "counts": fingerprint,
        "measurement": f"{source.store.measurement}/{source.store.layer}",
    }


@dataclass(frozen=True)
class CacheInfo:
    """What ``cache.json`` holds.

    Attributes:
        key: what the tokens depend on.
        num_cells: N.
        cells_per_shard: cells of every shard but the last.
    """

    key: Mapping[str, str]
    num_cells: int
    cells_per_shard: int

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache."""
        return -(-self.num_cells // self.cells_per_shard)

    @property
    def digest(self) -> str:
        """SHA-256 of the key; every shard carries it."""
        return hashlib.sha256(json.dumps(dict(self.key), sort_keys=True).encode()).hexdigest()


def _write_whole(path: Path, data: bytes) -> None:
    """A file appears with all its content or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_bytes(data)
    os.replace(beside, path)


def _read_info(folder: Path) -> CacheInfo:
    try:
        raw = json.loads((folder / _MANIFEST).read_text())
        return CacheInfo(dict(raw["key"]), int(raw["num_cells"]), int(raw["cells_per_shard"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{folder / _MANIFEST}' is damaged ({error}); remove the folder and let it be written "
            "anew, or choose another data.cache"
        ) from error


def check_cache(folder: Path, key: Mapping[str, str]) -> CacheInfo | None:
    """The cache that is in a folder, None if there is none; writes nothing.

    Raises:
        DataError: it is a cache of something else; says what differs.
    """
    if not (folder / _MANIFEST).is_file():
        return None
    info = _read_info(folder)
    differs = [k for k in {**info.key, **key} if info.key.get(k) != key.get(k)]
    if differs:
        raise DataError(
            f"the token cache '{folder}' is stale: it was written for another "
            f"{' and another '.join(differs)}; remove it, or choose another data.cache"
        )
    return info


def prepare_cache(
    folder: Path, key: Mapping[str, str], cells: I64, *, cells_per_shard: int = CELLS_PER_SHARD
) -> CacheInfo:
    """Make the folder of a cache, or check the one that is there.

    Args:
        folder: where the cache is or will be.
        key: from :func:`cache_key`.
        cells: (N,) ids of the cells, ascending.
        cells_per_shard: of a new cache.

    Raises:
        DataError: the folder holds a cache of something else (it says what differs), or other
            files, or cannot be written.
    """
    there = check_cache(folder, key)
    if there is not None:
        if not _holds(folder / _CELLS, cells):
            _log.warning(
                "token cache: '%s' is gone or damaged; it is written anew", folder / _CELLS
            )
            try:
                _write_cells(folder, cells)
            except OSError as error:
                raise _unwritable(folder, error) from error
        return there
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        left = [] if not folder.is_dir() else sorted(p.name for p in folder.iterdir())
        if not folder.is_dir() or any(not _is_ours(name) for name in left):
            raise DataError(
                f"data.cache = '{folder}' is not a token cache and not empty "
                f"({', '.join(left[:5]) or 'a file'}); choose another folder"
            )
    info = CacheInfo(key, len(cells), cells_per_shard)
    manifest = {
        "key": dict(key),
        "num_cells": info.num_cells,
        "cells_per_shard": info.cells_per_shard,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_cells(folder, cells)
        _write_whole(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
    except OSError as error:
        raise _unwritable(folder, error) from error
    return info


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(f"the token cache '{folder}' cannot be written: {error}")


def _write_cells(folder: Path, cells: I64) -> None:
    beside = folder / f"{_CELLS}.{os.getpid()}.tmp"
    try:
        with beside.open("wb") as out:
            np.save(out, np.ascontiguousarray(cells, dtype=np.int64))
        os.replace(beside, folder / _CELLS)
    finally:
        beside.unlink(missing_ok=True)


def _holds(path: Path, cells: I64) -> bool:
    try:
        return np.array_equal(np.load(path, mmap_mode="r"), cells)
    except (OSError, ValueError, EOFError):
        return False


def _is_ours(name: str) -> bool:
    return name.startswith((_CELLS, _MANIFEST, "shard-"))


def _checksum(*arrays: npt.NDArray[Any]) -> str:
    from cellray.data._checksum import mix_words

    state = np.uint64(len(arrays))
    for array in arrays:
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        whole = len(data) // 8 * 8
        tail = np.zeros(8, dtype=np.uint8)
        tail[: len(data) - whole] = data[whole:]
        state = mix_words(data[:whole].view(np.uint64), np.uint64(state ^ np.uint64(len(data))))
        state = mix_words(tail.view(np.uint64), state)
    return f"{int(state):016x}"


class _DamagedError(Exception):
    """A shard cannot be used; the text says why."""


class TokenCache:
    """An open cache.

    Args:
        folder: where it is.
        source: what it is a cache of; damaged shards are written anew from it.
    """

    def __init__(self, folder: Path, source: TokenSource) -> None:
        self.folder = folder
        self.info = _read_info(folder)
        self._source = replace(source, cache="", seed=0)  # the same tokens for every run's seed
        self._cells: I64 = np.load(folder / _CELLS, mmap_mode="r")
        self._shards: dict[int, TokenBlock] = {}

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{shard:05d}.arrow"

    def cells(self, shard: int) -> I64:
        """Ids of the cells of a shard."""
        first = shard * self.info.cells_per_shard
        return np.asarray(self._cells[first : first + self.info.cells_per_shard])

    def missing(self) -> list[int]:
        """Shards that no file is there for."""
        return [s for s in range(self.info.num_shards) if not self.path(s).is_file()]

    def write(self, shard: int) -> int:
        """Tokenise the cells of a shard from the store and write its file; returns its cells."""
        cells = self.cells(shard)
        block = self._source.tokens(cells, epoch=0)
        assert block.indptr[-1] < 1 << 31, "a shard holds fewer than 2^31 tokens"
        offsets = block.indptr.astype(np.int32)
        sum_ = _checksum(cells, offsets, block.tokens, block.values)
        table = pa.record_batch(
            {
                "id": pa.array(cells),
                "tokens": pa.ListArray.from_arrays(pa.array(offsets), pa.array(block.tokens)),
                "values": pa.ListArray.from_arrays(pa.array(offsets), pa.array(block.values)),
            }
        )
        told = {"cellray_key": self.info.digest, "cellray_checksum": sum_}
        table = table.replace_schema_metadata(told)
        path = self.path(shard)
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
                out.write_batch(table)
            os.replace(beside, path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise _unwritable(self.folder, error) from error
        return len(cells)

    def _map(self, shard: int) -> TokenBlock:
        """Memory-map a shard and verify it."""
        path = self.path(shard)
        try:
            with pa.memory_map(str(path)) as mapped:
                batch = pa.ipc.open_file(mapped).get_batch(0)
            told = batch.schema.metadata or {}
            tokens, values = batch.column("tokens"), batch.column("values")
            ids = batch.column("id").to_numpy()
            offsets = tokens.offsets.to_numpy()
            flat = (tokens.values.to_numpy(), values.values.to_numpy())
        except FileNotFoundError as error:
            raise _DamagedError("it is gone") from error
        except (OSError, pa.ArrowInvalid, KeyError, AttributeError) as error:
            raise _DamagedError(f"it cannot be read: {str(error).splitlines()[0]}") from error
        if told.get(b"cellray_key", b"").decode() != self.info.digest:
            raise _DamagedError("it belongs to another cache")
        if told.get(b"cellray_checksum", b"").decode() != _checksum(ids, offsets, *flat):
            raise _DamagedError("its checksum is wrong")
        if not np.array_equal(ids, self.cells(shard)):
            raise _DamagedError("it holds other cells")
        return TokenBlock(ids, offsets.astype(np.int64), *flat)

    def _shard(self, shard: int) -> TokenBlock:
        if shard not in self._shards:
            try:
                self._shards[shard] = self._map(shard)
            except _DamagedError as damage:
                _log.warning(
                    "token cache: shard '%s' is damaged (%s); it is written anew from the store",
                    self.path(shard),
                    damage,
                )
                self.write(shard)
                self._shards[shard] = self._map(shard)
        return self._shards[shard]

    def tokens(self, ids: I64) -> TokenBlock:
        """The tokens of the given cells, in their order, each as often as it is asked for.

        Args:
            ids: (N,) cell ids.

        Raises:
            DataError: a cell is not in the cache.
        """
        plain = without_repeats(ids)
        rows = np.searchsorted(self._cells, plain)
        found = np.minimum(rows, len(self._cells) - 1)
        wrong = self._cells[found] != plain
        if wrong.any():
            raise DataError(
                f"cell {int(plain[wrong][0])} is not in the token cache '{self.folder}'"
            )
        return self._gather(rows, ids)

    def _gather(self, rows: I64, ids: I64) -> TokenBlock:
        if not len(rows):
            return lay_out([], joinids=ids)
        which = rows // self.info.cells_per_shard
        order = np.argsort(which, kind="stable")
        shards, starts = np.unique(which[order], return_index=True)
        parts = []
        for shard, first, last in zip(shards, starts, [*starts[1:], len(order)], strict=True):
            places = order[first:last]
            inside = rows[places] - shard * self.info.cells_per_shard
            parts.append((places, _Rows(self._shard(int(shard)), inside)))
        return _lay_out_rows(parts, ids)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a shard."""

    shard: TokenBlock
    rows: I64


def _lay_out_rows(parts: Sequence[tuple[I64, _Rows]], ids: I64) -> TokenBlock:
    """Copy rows of shards to where they belong, once."""
    from cellray.core._gather import copy_rows

    if not parts:
        return lay_out([], joinids=ids)
    lengths = np.zeros(len(ids), dtype=np.int64)
    starts = np.zeros(len(ids), dtype=np.int64)
    for places, part in parts:
        starts[places] = part.shard.indptr[part.rows]
        lengths[places] = part.shard.indptr[part.rows + 1] - starts[places]
    indptr = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum(lengths, out=indptr[1:])
    first = parts[0][1].shard
    tokens = np.empty(indptr[-1], dtype=first.tokens.dtype)
    values = np.empty(indptr[-1], dtype=first.values.dtype)
    for places, part in parts:
        where = (starts[places], lengths[places])
        copy_rows(part.shard.tokens, *where, tokens, indptr[:-1][places])
        copy_rows(part.shard.values, *where, values, indptr[:-1][places])
    return TokenBlock(joinids=ids, indptr=indptr, tokens=tokens, values=values)


@lru_cache(maxsize=4)
def _opened(folder: str, source: _ById) -> TokenCache:
    return TokenCache(Path(folder), source.source)


@dataclass(frozen=True)
class _ById:
    """A source that hashes by identity: arrays have no hash."""

    identity: int
    source: Any = field(compare=False)


def open_cache(source: TokenSource) -> TokenCache:
    """The cache of ``source.cache``, opened once per process."""
    return _opened(source.cache, _ById(id(source), source))
