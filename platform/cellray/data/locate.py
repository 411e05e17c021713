"""Where a store is, and what is there instead if it is not."""

from __future__ import annotations

import os
from pathlib import Path

from cellray.core.errors import DataError, did_you_mean
from cellray.data.schema import STAGING_SUFFIX

__all__ = ["local_path", "refuse_missing"]

_SHOWN = 8  # names listed in a message


def local_path(uri: str) -> Path | None:
    """The absolute local path a URI means, or None for an object store."""
    text = uri.removeprefix("file://")
    return None if "://" in text else Path(os.path.abspath(Path(text).expanduser()))


def _is_group(path: Path) -> bool:
    return (path / "__group").is_dir() or (path / "__tiledb_group.tdb").is_file()


def _is_tiledb(path: Path) -> bool:
    return _is_group(path) or (path / "__schema").is_dir()


def refuse_missing(path: Path) -> None:
    """Explain why there is no store at ``path``, if there is none.

    Raises:
        DataError: an unfinished or interrupted ingest, a file, a plain folder, or nothing.
    """
    if any(part.endswith(STAGING_SUFFIX) for part in path.parts):
        raise DataError(f"'{path}' is an unfinished ingest, not a store; run the ingest again")
    if path.is_file():
        hint = "; `cellray ingest` makes a store of it" if path.suffix == ".h5ad" else ""
        raise DataError(f"'{path}' is a file, not a SOMA store{hint}")
    if path.is_dir() and not _is_tiledb(path):
        inside = sorted(p.name for p in path.iterdir())
        stores = [name for name in inside if _is_group(path / name)]
        holds = f"the stores {', '.join(stores[:_SHOWN])}" if stores else ", ".join(inside[:_SHOWN])
        raise DataError(f"'{path}' is a folder but not a SOMA store. It holds {holds or 'nothing'}")
    if not path.exists():
        raise DataError(f"no store at '{path}'{_beside(path)}")


def _beside(path: Path) -> str:
    staging = path.with_name(path.name + STAGING_SUFFIX)
    if staging.exists():
        return (
            ", but an ingest into it was interrupted (or is still running): "
            f"'{staging.name}' is beside it. Run the same ingest again; it puts things right"
        )
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder '{folder}' either"
    near = sorted(p.name for p in folder.iterdir() if p.is_dir())
    there = ", ".join(near[:_SHOWN]) or "no folder"
    return f".{did_you_mean(path.name, near)} '{folder}' holds: {there}"
