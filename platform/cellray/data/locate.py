"""Where a store is, and what is there instead if it is not."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

from cellray.core.errors import DataError, did_you_mean
from cellray.data.census import is_census, locate_census
from cellray.data.schema import COPY_MARKER, STAGING_SUFFIX
from cellray.data.storage import Settings, settings

__all__ = ["address", "local_path", "local_target", "refuse_missing"]

_SCHEME = re.compile(r"(s3|gs|gcs|azure|https?):(?=/|$)")
_NO_PATH = "?#"
_SHOWN = 8  # names listed in a message
_SWAP_S = 2.0  # an append puts its store in place by two renames; between them there is none
_SWAP_POLL_S = 0.005


def address(uri: str, tiledb: Mapping[str, str] | None = None) -> tuple[str, Settings]:
    """The absolute path or object-store URI of a store, and the settings to reach it with.

    Args:
        uri: a folder, ``file://``, an object-store URI, or ``census:VERSION/ORGANISM``.
        tiledb: TileDB settings; they have the last word.

    Raises:
        ConfigError: a setting that is not allowed, or a ``census:`` of another form.
        DataError: a release of the Census that cannot be looked up.
    """
    public: dict[str, str] = {}
    if is_census(uri):
        uri, public = locate_census(uri)
    path = local_path(uri)
    options = settings({**public, **(tiledb or {})}, remote=path is None)
    return (uri.rstrip("/") if path is None else str(path)), options


def local_path(uri: str) -> Path | None:
    """The absolute local path a URI means, or None for an object store.

    Raises:
        DataError: an address without its bucket, or with one slash.
    """
    text = uri.removeprefix("file://")
    scheme = _SCHEME.match(text)
    if scheme and not text[scheme.end() :].startswith("//"):
        raise DataError(f"'{uri}' is neither a path nor an address; write {scheme[0]}//bucket/...")
    if text.endswith("://") or text.endswith(":///"):
        raise DataError(f"'{uri}' names no bucket; write {text.rstrip('/')}//bucket/...")
    return None if "://" in text else Path(os.path.abspath(Path(text).expanduser()))


def local_target(uri: str) -> Path | None:
    """:func:`local_path` of a store that is to be written.

    Raises:
        DataError: a path at which TileDB could not, or cellray would not, find it again; a place
            that is not to be written to.
    """
    if is_census(uri):
        raise DataError(f"'{uri}' is a release of the Census, which only its makers write to")
    path = local_path(uri)
    if path is None:
        return None
    path = path.resolve()  # of a link, the store that it leads to
    wrong = next((c for c in _NO_PATH if c in str(path)), "")
    if wrong:
        raise DataError(f"'{path}' holds '{wrong}', which TileDB takes for a URL's; rename it")
    if any(part.endswith(STAGING_SUFFIX) for part in path.parts):
        raise DataError(
            f"'{path}' ends in {STAGING_SUFFIX}, the name of an unfinished ingest; choose another"
        )
    around = next((p for p in path.parents if _is_tiledb(p)), None)
    if around is not None:
        raise DataError(
            f"'{path}' lies in the store '{around}', which would lose it when it is next written; "
            "choose a place beside it"
        )
    return path


def _is_group(path: Path) -> bool:
    return (path / "__group").is_dir() or (path / "__tiledb_group.tdb").is_file()


def _is_tiledb(path: Path) -> bool:
    return _is_group(path) or (path / "__schema").is_dir()


def _await_swap(path: Path) -> None:
    """Wait while an append that is putting its store in place has moved the old one away."""
    previous = path.with_name(path.name + STAGING_SUFFIX) / "previous"
    until = time.monotonic() + _SWAP_S
    while not path.exists() and previous.exists() and time.monotonic() < until:
        time.sleep(_SWAP_POLL_S)


def refuse_missing(path: Path) -> None:
    """Explain why there is no store at ``path``, if there is none.

    Raises:
        DataError: an unfinished or interrupted ingest or copy, a file, a plain folder, or nothing.
    """
    _await_swap(path)
    if (path / COPY_MARKER).is_file():
        raise DataError(
            f"'{path}' is an unfinished copy, not a store; run the same `cellray copy` again"
        )
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
