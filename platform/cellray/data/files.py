"""The files of a store, in a local folder or an S3-compatible object store: listing and names."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
from pyarrow import fs

from cellray.core.errors import DataError
from cellray.data.locate import local_path
from cellray.data.schema import COPY_MARKER
from cellray.data.storage import Settings, brief, hint

__all__ = ["filesystem", "fragments", "list_files", "unfinished_copy"]

_TRIES = 8
# __<from ms>_<to ms>_<32 hex digits>[_<format>]: what TileDB calls whatever it writes
_STAMPED = re.compile(r"__\d+_(\d+)_[0-9a-f]{32}(_\d+)?(\.(?:del|upd))?")


def filesystem(uri: str, options: Settings = ()) -> tuple[Any, str] | None:
    """The file system that a URI is in and the path there; None if it is of another kind."""
    path = local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), str(path)
    if not uri.startswith("s3://"):
        return None
    given = dict(options)
    named = {
        "region": given.get("vfs.s3.region"),
        "endpoint_override": given.get("vfs.s3.endpoint_override"),
        "scheme": given.get("vfs.s3.scheme"),
    }
    found = fs.S3FileSystem(
        anonymous=given.get("vfs.s3.no_sign_request") == "true",
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES),
        **{name: value for name, value in named.items() if value},
    )
    return found, uri.removeprefix("s3://").strip("/")


def list_files(place: Any, root: str) -> dict[str, int]:
    """Every file below a folder: its path relative to that -> its size in bytes.

    Args:
        place: a file system.
        root: a path in it; a folder that is not there has no files.

    Raises:
        DataError: it cannot be listed.
    """
    try:
        found = place.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"'{root}' cannot be listed: {brief(error)}. {hint(error)}") from error
    return {f.path[len(root) + 1 :]: f.size for f in found if f.type == fs.FileType.File}


def fragments(uri: str, options: Settings, *, until_ms: int | None = None) -> list[str] | None:
    """What an array consists of: names of its fragments and deletions, sorted.

    TileDB gives each a random name when it is written and never changes it afterwards, so equal
    names are equal contents, wherever the array has been copied to.

    Args:
        uri: the array.
        options: TileDB settings.
        until_ms: leave out what was written later.

    Returns:
        None where files cannot be listed: neither a local folder nor ``s3://``.

    Raises:
        DataError: the storage cannot be reached.
    """
    found = filesystem(uri, options)
    if found is None:
        return None
    place, root = found
    names: set[str] = set()
    try:
        for part in ("", "/__fragments", "/__commits"):  # the root is where old formats keep them
            where = fs.FileSelector(root + part, allow_not_found=True)
            names |= {f.base_name for f in place.get_file_info(where)}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"'{uri}' cannot be listed: {brief(error)}. {hint(error)}") from error
    stamps = [(name, _STAMPED.fullmatch(name)) for name in names]
    return sorted(n for n, m in stamps if m and (until_ms is None or int(m[1]) <= until_ms))


def unfinished_copy(uri: str, options: Settings = ()) -> str | None:
    """The source of a copy to ``uri`` that has not come to its end; None if there is none.

    Raises:
        DataError: the storage cannot be reached.
    """
    found = filesystem(uri, options)
    if found is None:
        return None
    place, root = found
    try:
        with place.open_input_stream(f"{root}/{COPY_MARKER}") as stream:
            source: str = json.loads(stream.readall())["source"]
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"'{uri}' cannot be read: {brief(error)}. {hint(error)}") from error
    return source
