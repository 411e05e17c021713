"""Building a store beside its place and putting it there whole, or not at all.

    <uri>.ingesting/lock         held while an ingest runs; released by the system if it dies
    <uri>.ingesting/experiment   the new store, being built
    <uri>.ingesting/parts        what is finished of it (:mod:`cellray.data.parts`)
    <uri>.ingesting/previous     the old store, between the two renames of a swap

Where the system can exchange two folders at once (Linux, most local file systems), a reader never
finds nothing at ``<uri>``; elsewhere it waits for the second of two renames. A store at ``<uri>``
is therefore always whole. An ingest that died or failed leaves the staging
folder if a part was finished; the next one takes it over, moves the old store back if it was caught
between the renames, and uses those parts that it needs too.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from cellray.core.errors import DataError
from cellray.data.schema import STAGING_SUFFIX

__all__ = ["link_tree", "parts_of", "staging", "staging_of"]

# numbers of renameat2(2)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def staging_of(target: Path) -> Path:
    """The folder beside ``target`` in which it is built."""
    return target.with_name(target.name + STAGING_SUFFIX)


def parts_of(target: Path) -> Path:
    """The folder in which the parts of an ingest into ``target`` are kept until it is published."""
    return staging_of(target) / "parts"


def link_tree(source: Path, target: Path) -> None:
    """Make ``target`` a copy of ``source`` that shares its files, or copies them if it cannot.

    ``source`` is a folder or one file.

    Only for files that are never changed in place; those of a TileDB array are not.
    """

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(old, new)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)
    else:
        link(str(source), str(target))


def _take_over(target: Path, folder: Path) -> None:
    """Undo what an ingest that died has left in its staging folder."""
    previous = folder / "previous"
    if previous.exists() and not target.exists():
        previous.rename(target)
    for leftover in (previous, folder / "experiment"):
        if leftover.exists():
            shutil.rmtree(leftover)


def _clear(folder: Path, *, published: bool) -> None:
    """Remove the staging folder, but for the parts that the next ingest can use."""
    parts = folder / "parts"
    finished = parts.is_dir() and any((p / "figures.npz").is_file() for p in parts.iterdir())
    if published or not finished:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        shutil.rmtree(folder / "experiment", ignore_errors=True)


@lru_cache(maxsize=1)
def _renameat2() -> Any:
    """The system's call, or None where there is none."""
    found = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if found is not None:
        found.argtypes = (
            ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint
        )  # fmt: skip
        found.restype = ctypes.c_int
    return found


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's place at once; whether the system could."""
    call = _renameat2()
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _publish(target: Path, folder: Path) -> None:
    previous = folder / "previous"
    if target.exists():
        if _exchange(folder / "experiment", target):
            return
        target.rename(previous)
    try:
        (folder / "experiment").rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Give a path to build a store at; publish it at ``target`` if the block ends well.

    On an error nothing at ``target`` changes, and only finished parts stay beside it.

    Args:
        target: absolute path of the store, present or not; its parent is made.

    Raises:
        DataError: another ingest into ``target`` is running, or the folder cannot be written.
    """
    folder = staging_of(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise DataError(f"cannot write beside '{target}': {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another ingest into '{target}' is running; wait until it has ended"
            ) from error
        published = False
        try:
            _take_over(target, folder)
            yield folder / "experiment"
            _publish(target, folder)
            published = True
        finally:
            _clear(folder, published=published)
