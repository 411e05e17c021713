"""The past of a store that cellray wrote: how many cells and genes it had at a moment.

An append puts new cells after the old ones and new genes after the old ones, and replaces the store
at once. So the store at a time is its first so many cells and genes. The ledger in the store's
metadata, one entry a file, says how many: ``added_at``, ``cells_total`` and ``genes_total``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.data.digest import hash64
from cellray.data.storage import iso, now_ms, parse_moment

__all__ = ["digest", "entries_of", "size_at", "stamp", "too_early"]

Entry = Mapping[str, Any]


def stamp(ledger: Sequence[Entry], *, cells: int, genes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Note in the entries that carry no time yet when they came and what the store then held.

    Args:
        ledger: one entry a file.
        cells: cells in the store with all of them.
        genes: measurement -> genes with all of them.
    """
    now = {"added_at": iso(now_ms()), "cells_total": cells, "genes_total": dict(genes)}
    return [dict(entry) if "added_at" in entry else {**entry, **now} for entry in ledger]


def size_at(uri: str, ledger: Sequence[Entry], at_ms: int, *, measurement: str) -> tuple[int, int]:
    """Cells and genes of a store at a moment, in milliseconds since 1970.

    Raises:
        DataError: it did not exist then, or it was written before cellray noted times.
    """
    if not ledger or any("added_at" not in entry for entry in ledger):
        raise DataError(
            f"'{uri}' does not say when its cells came (it was written by an early cellray); read "
            'it with timestamp = "", or ingest it again'
        )
    then = [entry for entry in ledger if parse_moment(entry["added_at"]) <= at_ms]
    if not then:
        raise too_early(uri, at_ms, min(parse_moment(entry["added_at"]) for entry in ledger))
    last = max(then, key=lambda entry: int(entry["cells_total"]))
    genes = last["genes_total"].get(measurement)
    if genes is None:
        raise DataError(f"'{uri}' had no measurement '{measurement}' at {iso(at_ms)}")
    return int(last["cells_total"]), int(genes)


def entries_of(ledger: Sequence[Entry], num_cells: int) -> list[dict[str, Any]]:
    """The entries of the first ``num_cells`` cells."""
    return [dict(e) for e in ledger if int(e.get("cells_total", 0)) <= num_cells]


def too_early(uri: str, asked_ms: int, first_ms: int) -> DataError:
    """The error for a time before a store existed."""
    return DataError(
        f"there was no store at '{uri}' at {iso(asked_ms)}: it exists since {iso(first_ms)}"
    )


def digest(fragments: Sequence[str], genes: Sequence[str], joinids: npt.NDArray[np.int64]) -> str:
    """SHA-256 of what identifies cells of a store whose contents are not read.

    Args:
        fragments: what X consists of.
        genes: (V,) gene ids, in the store's order.
        joinids: (N,) ascending.
    """
    found = hashlib.sha256(f"snapshot:{len(joinids)}:{len(genes)}".encode())
    found.update("\n".join(fragments).encode())
    found.update(hash64(genes).tobytes())
    found.update(np.ascontiguousarray(joinids, dtype="<i8").tobytes())
    return found.hexdigest()
