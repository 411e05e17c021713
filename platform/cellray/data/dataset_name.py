"""What a data set is called in tables; made-up cells say so in their name."""

from __future__ import annotations

from pathlib import PurePosixPath

from cellray.data.stores import AnyStore, JoinedStore

__all__ = ["SYNTHETIC", "dataset_id_of", "is_synthetic"]

SYNTHETIC = "synthetic/"
_MADE = "synthetic:"  # how the ledger of a store names a "file" that was never one


def is_synthetic(store: AnyStore) -> bool:
    """Whether any of the cells come from ``cellray synthesize``, also after a copy or a relayout.

    Made-up cells that went through an h5ad file are not known again.
    """
    if isinstance(store, JoinedStore):
        return any(is_synthetic(one) for one in store.stores)
    return any(str(entry.get("file", "")).startswith(_MADE) for entry in store.ledger)


def dataset_id_of(store: AnyStore, name: str = "") -> str:
    """The name of a data set in tables.

    What it is given; else the dataset id of a store that was ingested as one data set, else the
    last part of its address; several stores are joined by "+". Made-up cells are
    ``synthetic/<name>``.

    Args:
        store: where the cells are.
        name: what the data set is called; "" finds a name.
    """
    found = (name or _name_of(store)).removeprefix(SYNTHETIC)
    return f"{SYNTHETIC}{found}" if is_synthetic(store) else found


def _name_of(store: AnyStore) -> str:
    if isinstance(store, JoinedStore):
        return "+".join(_name_of(one) for one in store.stores)
    ids = {str(entry.get("dataset_id", "")) for entry in store.ledger}
    return (ids.pop() if len(ids) == 1 else "") or PurePosixPath(store.uri.rstrip("/")).name
