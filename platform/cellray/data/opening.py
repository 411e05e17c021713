"""Opening a SOMA experiment at a moment, and saying why it cannot be opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellray.core.errors import DataError
from cellray.data import snapshot
from cellray.data.census import organisms
from cellray.data.files import unfinished_copy
from cellray.data.locate import local_path, refuse_missing
from cellray.data.storage import Settings, first_moment, open_soma

__all__ = ["open_experiment"]


def open_experiment(uri: str, options: Settings = (), *, at_ms: int | None = None) -> Any:
    """Open an experiment for reading.

    Args:
        uri: absolute path or object-store URI.
        options: TileDB settings.
        at_ms: the moment whose state is seen, in milliseconds since 1970; None is the latest.

    Raises:
        DataError: nothing is there, or nothing was at that time (it names the first); an
            unfinished ingest or copy; another SOMA object, e.g. a whole release of the Census.
    """
    path = local_path(uri)
    if path is not None:
        refuse_missing(path)
    try:
        found = _open(uri, path, options, at_ms)
    except DataError as error:
        if error.__cause__ is None or path is not None:
            _refuse_absent(uri, options, at_ms)
        raise
    if found.soma_type != "SOMAExperiment":
        if "census_data" in (found if found.soma_type == "SOMACollection" else ()):
            raise DataError(organisms(uri, list(found["census_data"])))
        raise DataError(f"'{uri}' is a {found.soma_type}, not a SOMAExperiment")
    if at_ms is not None and not {"obs", "ms"} <= set(found):
        _refuse_early(uri, options, at_ms)
    return found


def _open(uri: str, path: Path | None, options: Settings, at_ms: int | None) -> Any:
    try:
        return open_soma(uri, options, at_ms=at_ms)
    except DataError:
        if path is None:
            raise
        refuse_missing(path)  # an append may have put a new store in its place since the look
        return open_soma(uri, options, at_ms=at_ms)


def _refuse_absent(uri: str, options: Settings, at_ms: int | None) -> None:
    """Raise if what is not there will be, or was not yet."""
    if at_ms is not None:
        _refuse_early(uri, options, at_ms)
    if local_path(uri) is None and unfinished_copy(uri, options) is not None:
        raise DataError(
            f"'{uri}' is an unfinished copy, not a store; run the same `cellray copy` again"
        ) from None


def _refuse_early(uri: str, options: Settings, at_ms: int) -> None:
    """Raise if the store has come to be only after ``at_ms``."""
    first = first_moment(uri, options, at_ms)
    if first is not None and first > at_ms:
        raise snapshot.too_early(uri, at_ms, first)
