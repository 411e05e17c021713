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


def dataset_id_of(store: AnyStore) -> str:
    """The name of a data set in tables.

    The dataset id of a store that was ingested as one data set, else the last part of its address;
    several stores are joined by "+". Made-up cells are ``synthetic/<name>``.
    """
    if isinstance(store, JoinedStore):
        names = [dataset_id_of(one).removeprefix(SYNTHETIC) for one in store.stores]
        name = "+".join(names)
    else:
        found = {str(entry.get("dataset_id", "")) for entry in store.ledger}
        name = found.pop() if len(found) == 1 else ""
        name = name or PurePosixPath(store.uri.rstrip("/")).name
    return f"{SYNTHETIC}{name}" if is_synthetic(store) else name
