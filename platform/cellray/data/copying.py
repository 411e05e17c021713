"""Copying a whole store between a folder and an object store: resumable, visible when complete.

1. ``cellray_copy.json`` is put at the target: it says whose copy is being made.
2. All files but those of the root group are copied, several at a time; those that are there
with the right size are not copied again (TileDB never changes a file it has written).
3. The source is listed again: if it has changed meanwhile, the copy is not completed.
4. The root group's files follow, which makes the target a store, and the note is removed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cellray.core.errors import DataError
from cellray.data.files import filesystem, list_files, unfinished_copy
from cellray.data.locate import address, local_path, local_target, refuse_missing
from cellray.data.schema import COPY_MARKER
from cellray.data.storage import Settings, brief, hint

__all__ = ["CopyReport", "copy_store", "publish_to", "refuse_taken"]

Progress = Callable[[str], None]
_AT_ONCE = 8
_CHUNK_BYTES = 8 << 20
_SAY_EVERY_S = 2.0
_GROUP_FILE = "__tiledb_group.tdb"


@dataclass(frozen=True)
class CopyReport:
    """What a copy has done.

    Attributes:
        source: where from.
        target: where to.
        files: files of the store.
        bytes: their size.
        files_copied: those that were not at the target already.
        seconds: wall time.
    """

    source: str
    target: str
    files: int
    bytes: int
    files_copied: int
    seconds: float


@dataclass(frozen=True)
class _End:
    """One end of a copy."""

    uri: str
    options: Settings
    place: Any
    root: str

    @staticmethod
    def of(uri: str, options: Settings) -> _End:
        found = filesystem(uri, options)
        if found is None:
            raise DataError(
                f"'{uri}' is neither a local folder nor s3://bucket/path, between which cellray "
                "copies; use the tools of that storage"
            )
        return _End(uri, options, *found)

    def files(self) -> dict[str, int]:
        found = list_files(self.place, self.root)
        found.pop(COPY_MARKER, None)
        return found

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


def _is_root(name: str) -> bool:
    """Whether a file makes the root a group, so that it has to come last."""
    return name == _GROUP_FILE or name.startswith(("__group/", "__meta/"))


def _root_order(name: str) -> tuple[int, str]:
    return (("__meta/", "__group/", _GROUP_FILE).index(name[: name.find("/") + 1] or name), name)


def _is_store(files: Mapping[str, int]) -> bool:
    return _GROUP_FILE in files or any(name.startswith("__group/") for name in files)


class _Clock:
    """Says now and then how far a copy is."""

    def __init__(self, progress: Progress, files: int, size: int) -> None:
        self._progress, self._files, self._bytes = progress, files, size
        self._started = self._said = time.monotonic()
        self._done = self._done_bytes = 0

    def copied(self, size: int) -> None:
        self._done, self._done_bytes = self._done + 1, self._done_bytes + size
        now = time.monotonic()
        if self._done < self._files and now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        rate = self._done_bytes / max(now - self._started, 1e-9)
        left = (self._bytes - self._done_bytes) / max(rate, 1e-9)
        self._progress(
            f"copied {self._done} of {self._files} files, {self._done_bytes / 1e6:.1f} of "
            f"{self._bytes / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
        )


def _copy_file(source: _End, target: _End, name: str) -> None:
    if isinstance(target.place, fs.LocalFileSystem):
        Path(target.path(name)).parent.mkdir(parents=True, exist_ok=True)
    # not fs.copy_files, which says nothing when an upload fails as it is closed
    with (
        source.place.open_input_stream(source.path(name)) as old,
        target.place.open_output_stream(target.path(name)) as new,
    ):
        while chunk := old.read(_CHUNK_BYTES):
            new.write(chunk)


def _take_place(source: _End, target: _End) -> dict[str, int]:
    """Claim the target, or refuse it; returns the files that are there from an earlier try."""
    there = target.files()
    of = unfinished_copy(target.uri, target.options)
    if of is not None and of != source.uri:
        raise DataError(
            f"at '{target.uri}' is an unfinished copy of '{of}', not of '{source.uri}'; complete "
            "that one, remove it or choose another target"
        )
    if of is None and there:
        what = "a store" if _is_store(there) else f"something else ({sorted(there)[0]}, ...)"
        raise DataError(
            f"at '{target.uri}' is {what} already; choose another target or remove it. A store in "
            "an object store is not appended to: append to the local one and copy it anew"
        )
    if isinstance(target.place, fs.LocalFileSystem):
        Path(target.root).mkdir(parents=True, exist_ok=True)
    with target.place.open_output_stream(target.path(COPY_MARKER)) as stream:
        stream.write(json.dumps({"source": source.uri}).encode())
    return there


def _transfer(source: _End, target: _End, files: Mapping[str, int], progress: Progress) -> int:
    """Copy what is missing; returns the number of files copied."""
    there = _take_place(source, target)
    for name in there.keys() - files.keys():  # of a source that has changed since
        target.place.delete_file(target.path(name))
    missing = [n for n, size in files.items() if there.get(n) != size or _is_root(n)]
    clock = _Clock(progress, len(missing), sum(files[n] for n in missing))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        jobs = {pool.submit(_copy_file, source, target, n): n for n in missing if not _is_root(n)}
        try:
            for job in as_completed(jobs):
                job.result()
                clock.copied(files[jobs[job]])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if source.files() != files:
        raise DataError(
            f"'{source.uri}' has changed while it was copied; copy it again: what is there of it "
            "at the target is used"
        )
    arrived = target.files()
    short = [n for n, size in files.items() if arrived.get(n) != size and not _is_root(n)]
    if short:
        raise OSError(f"{len(short)} files have not arrived whole, e.g. {short[0]}")
    for name in sorted(filter(_is_root, missing), key=_root_order):
        _copy_file(source, target, name)
        clock.copied(files[name])
    target.place.delete_file(target.path(COPY_MARKER))
    return len(missing)


def _copy(source: _End, target: _End, progress: Progress) -> CopyReport:
    started = time.monotonic()
    files = source.files()
    if not _is_store(files):
        raise DataError(f"no store at '{source.uri}'")
    try:
        whole = target.files() == files and unfinished_copy(target.uri, target.options) is None
        copied = 0 if whole else _transfer(source, target, files, progress)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"copying '{source.uri}' to '{target.uri}' failed: {brief(error)}. Run it again; what "
            f"is there is not copied twice. {hint(error)}".rstrip()
        ) from error
    return CopyReport(
        source=source.uri,
        target=target.uri,
        files=len(files),
        bytes=sum(files.values()),
        files_copied=copied,
        seconds=time.monotonic() - started,
    )


def copy_store(
    source: str,
    target: str,
    *,
    tiledb: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
) -> CopyReport:
    """Copy a store, ours or any other SOMA experiment, file by file.

    The target is no store before all of it is there. A copy that failed or was killed goes on
    where it was when it is run again; one that is complete is left as it is.

    Args:
        source: a store: a local folder, ``s3://...`` or ``census:...``.
        target: a local folder or ``s3://...``, empty or not there.
        tiledb: TileDB settings of the object store, see :func:`cellray.data.storage.settings`.
        progress: is told how far the copy is, a line at a time.

    Raises:
        DataError: no store at the source, something else at the target, a source that changes
            meanwhile (run it again), or a storage that fails.
    """
    local_target(target)
    places = [address(uri, tiledb) for uri in (source, target)]
    path = local_path(places[0][0])  # of a release of the Census, its address
    if path is not None:
        refuse_missing(path)
    ends = [_End.of(*place) for place in places]
    return _copy(ends[0], ends[1], progress)


def refuse_taken(uri: str, *, tiledb: Mapping[str, str] | None = None) -> None:
    """Refuse a target at which there is a complete store, or that cannot be written to.

    To be asked before a store is built for hours to be put there.

    Raises:
        DataError: it is taken, its bucket does not exist, or the storage does not answer.
    """
    path = local_path(uri)
    target = _End.of(*address(uri, tiledb))
    try:
        if _is_store(target.files()) and unfinished_copy(target.uri, target.options) is None:
            raise DataError(
                f"there is a store at '{uri}' already; a store in an object store is not appended "
                "to: copy it to a folder, append there, and copy the result to another address"
            )
        if path is None and _no_bucket(target):
            raise DataError(f"'{uri}' cannot be written to: there is no such bucket; make it first")
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"'{uri}' cannot be written to: {brief(error)}. {hint(error)}") from error


def _no_bucket(end: _End) -> bool:
    try:
        found = end.place.get_file_info(end.root.partition("/")[0])
    except OSError:  # one may write to a bucket without being allowed to look at it
        return False
    return bool(found.type == fs.FileType.NotFound)


def publish_to(
    uri: str,
    place: Path,
    *,
    tiledb: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
) -> CopyReport:
    """Put a store that was built in a local folder at its place in an object store.

    Args:
        uri: ``s3://bucket/store``; nothing may be there, but an unfinished copy of ``place``.
        place: the whole store, e.g. the one that an ingest has staged.
        tiledb: TileDB settings of the object store.
        progress: is told how far the copy is.

    Raises:
        DataError: there is a store already, which cannot be appended to, or the storage fails.
    """
    return _copy(_End.of(*address(str(place), None)), _End.of(*address(uri, tiledb)), progress)
