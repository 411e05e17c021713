"""Several stores read as one: genes joined, cells told apart by their ids.

A :class:`JoinedStore` has the interface of :class:`~cellray.data.soma.Store`. Its genes are the
union of the stores' genes by Ensembl id without version, those of the first store first; its cell
ids carry the number of the store (see :mod:`cellray.core.ids`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.blocks import CellBlock, join_blocks
from cellray.core.errors import DataError
from cellray.core.ids import MAX_STORES, cell_ids, joinids_of, stores_of, without_repeats
from cellray.data import schema
from cellray.data.soma import Store
from cellray.data.vocab import strip_version

__all__ = ["AnyStore", "JoinedStore", "join_stores"]

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class JoinedStore:
    """Two or more stores as one.

    Attributes:
        stores: the stores, in the order in which their cells are numbered.
    """

    stores: tuple[Store, ...]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def uri(self) -> str:
        """The stores' addresses, for messages."""
        return " + ".join(s.uri for s in self.stores)

    @property
    def measurement(self) -> str:
        """The measurement that is read, the same in all."""
        return self.stores[0].measurement

    @property
    def layer(self) -> str:
        """The layer that is read, the same in all."""
        return self.stores[0].layer

    @property
    def num_cells(self) -> int:
        """Cells of all stores."""
        return sum(s.num_cells for s in self.stores)

    @property
    def num_genes(self) -> int:
        """Genes of the union, V."""
        return len(self._var)

    @cached_property
    def _var(self) -> pd.DataFrame:
        frames = [s.var() for s in self.stores]
        whole = pd.concat(frames, ignore_index=True)
        ids = whole["feature_id"].map(strip_version)
        kept = whole[~ids.duplicated()].reset_index(drop=True)
        kept[schema.JOINID] = np.arange(len(kept), dtype=np.int64)
        return kept

    @cached_property
    def _genes(self) -> tuple[I64, ...]:
        """For each store, the row of the union that each of its genes is."""
        ids = self._var["feature_id"].map(strip_version)
        row_of = pd.Series(np.arange(len(ids), dtype=np.int64), index=ids.to_numpy())
        return tuple(
            row_of[s.var()["feature_id"].map(strip_version)].to_numpy() for s in self.stores
        )

    def var(self) -> pd.DataFrame:
        """The V genes: columns ``soma_joinid``, ``feature_id``, ``feature_name``."""
        return self._var.copy()

    def obs_columns(self) -> list[str]:
        """Names of the obs columns that all stores have, in the first one's order."""
        rest = [set(s.obs_columns()) for s in self.stores[1:]]
        return [c for c in self.stores[0].obs_columns() if all(c in r for r in rest)]

    def has_obs(self, column: str) -> bool:
        """Whether obs of every store has a column of that name."""
        return all(s.has_obs(column) for s in self.stores)

    def obs(
        self, columns: Sequence[str] | None = None, *, value_filter: str | None = None
    ) -> pd.DataFrame:
        """Cells of all stores, as :meth:`Store.obs` gives them, with cell ids as joinids.

        Args:
            columns: obs columns, which every store must have; None for all they share.
            value_filter: rows to keep, applied by every store.

        Raises:
            DataError: a store lacks a column or does not understand the filter.
        """
        names = self.obs_columns() if columns is None else list(columns)
        frames = []
        for number, store in enumerate(self.stores):
            frame = store.obs(names, value_filter=value_filter)
            frame[schema.JOINID] = cell_ids(frame[schema.JOINID].to_numpy(), store=number)
            frames.append(frame)
        whole = pd.concat(
            [f.astype(dict.fromkeys(f.select_dtypes("category"), object)) for f in frames],
            ignore_index=True,
        )
        for name in whole.columns:
            if isinstance(frames[0][name].dtype, pd.CategoricalDtype):
                whole[name] = whole[name].astype("category")
        return whole

    def read_block(
        self, joinids: I64, gene_map: I32, *, obs: Sequence[str] | None = None
    ) -> CellBlock:
        """Read cells of any of the stores in the order given; see :meth:`Store.read_block`.

        Args:
            joinids: (N,) distinct cell ids.
            gene_map: (V,) vocabulary index of each gene of the union, -1 where there is none.
            obs: obs columns that go with the block.
        """
        if gene_map.shape != (self.num_genes,):
            raise DataError(
                f"gene_map has {gene_map.shape} entries, '{self.uri}' has {self.num_genes} genes"
            )
        which = stores_of(joinids)
        blocks, places = [], []
        for number, store in enumerate(self.stores):
            here = np.flatnonzero(which == number)
            if len(here):
                mapped = gene_map[self._genes[number]]
                blocks.append(store.read_block(joinids_of(joinids[here]), mapped, obs=obs))
                places.append(here)
        joined = join_blocks(blocks, joinids=joinids[np.concatenate(places or [which])])
        back = np.empty(len(joinids), dtype=np.int64)
        back[np.concatenate(places or [which])] = np.arange(len(joinids))
        return joined.take(back)

    def cell_keys(self, joinids: I64) -> npt.NDArray[np.uint64]:
        """(N,) hash of each cell's own id, whatever the order of the stores.

        Args:
            joinids: (N,) ascending cell ids without repeats.
        """
        which = stores_of(joinids)
        keys = np.zeros(len(joinids), dtype=np.uint64)
        for number, store in enumerate(self.stores):
            here = which == number
            keys[here] = store.cell_keys(joinids_of(joinids[here]))
        return keys

    def fingerprint(self, joinids: I64) -> str:
        """SHA-256 of the given cells of all stores; see :meth:`Store.fingerprint`."""
        ids = without_repeats(np.asarray(joinids, dtype=np.int64))
        which = stores_of(ids)
        digest = hashlib.sha256(f"stores:{len(self.stores)}".encode())
        for number, store in enumerate(self.stores):
            digest.update(store.fingerprint(joinids_of(ids[which == number])).encode())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What each store holds, under its address."""
        return {s.uri: s.describe() for s in self.stores}


AnyStore = Store | JoinedStore


def join_stores(stores: Sequence[Store]) -> AnyStore:
    """One store as it is, several as one.

    Raises:
        DataError: a store is named twice, or there are too many.
    """
    uris = [s.uri for s in stores]
    twice = [u for i, u in enumerate(uris) if u in uris[:i]]
    if twice:
        raise DataError(f"data.uri names '{twice[0]}' more than once; its cells would count twice")
    if len(stores) > MAX_STORES:
        raise DataError(f"data.uri names {len(stores)} stores; at most {MAX_STORES} are read")
    return stores[0] if len(stores) == 1 else JoinedStore(tuple(stores))
