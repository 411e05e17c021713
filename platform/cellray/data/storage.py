"""How a store's storage is reached: TileDB settings, contexts and moments in time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import tiledbsoma

from cellray.core.errors import ConfigError, DataError, did_you_mean

__all__ = [
    "Settings",
    "brief",
    "context",
    "first_moment",
    "hint",
    "iso",
    "may_pass",
    "now_ms",
    "open_soma",
    "parse_moment",
    "past_moment",
    "settings",
]

Settings = tuple[tuple[str, str], ...]

_THREADS = 1  # each process of a machine that runs many; TileDB's default is one per core
# what a chunk of a column holds: chunks that stay in the processor's cache are read up to twice as
# fast as ones of 64 MB and more
_BUFFER_BYTES = 4 << 20
# what a read unpacks at a time; TileDB's own 1 GB unpacks all tiles of a window before it copies
# the first: a third slower, and memory grows with the number of tiles that a window touches
_TILE_BYTES = 8 << 20
# over a network a request waits for its answer: many at a time, and more tiles between two waits
_REMOTE = {
    "sm.io_concurrency_level": "16",
    "sm.mem.tile_upper_memory_limit": str(128 << 20),
}
_DEFAULTS = {
    "sm.compute_concurrency_level": str(_THREADS),
    "sm.io_concurrency_level": str(_THREADS),
    "soma.init_buffer_bytes": str(_BUFFER_BYTES),
    "sm.mem.tile_upper_memory_limit": str(_TILE_BYTES),
    # TileDB 2.30 sorts the tiles of a read in tasks of which it does not await the last: one that
    # the system puts aside returns into memory that is freed, and now and then the process crashes
    # (tests/benchmarks/tile_merge.py makes it). 0 leaves out the tasks.
    "sm.query.sparse_global_order.preprocess_tile_merge": "0",
    # Of a busy object store some requests fail or hang. TileDB asks again after 25 ms, 50 ms,
    # 100 ms ...: 8 tries are 3.2 s of patience, its own 5 are 0.4 s. A request that delivers
    # nothing for 10 s is given up and made anew.
    "vfs.s3.connect_max_tries": "8",
    "vfs.s3.connect_scale_factor": "25",
    "vfs.s3.request_timeout_ms": "10000",
}
_SECRET = re.compile(r"secret|password|token|access_key|account_key|private|username")
_ENDPOINT = "vfs.s3.endpoint_override"
# Where the tools of Amazon look for the address of an S3-compatible server.
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_FIRST_MOMENT_STEP_MS = 1000
_NOISE = re.compile(r" ?\[(Request ID|Headers|Remote IP|Error Type)[^\]]*\]")

_HINTS = (
    (
        re.compile(r"NoSuchBucket|bucket does not exist", re.I),
        f"there is no such bucket; check the uri and, for a server of your own, tiledb {_ENDPOINT}",
    ),
    (
        re.compile(r"Code: 40[13]|AccessDenied|InvalidAccessKey|SignatureDoesNotMatch", re.I),
        "access is denied; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or for a public "
        'bucket tiledb vfs.s3.no_sign_request = "true"',
    ),
    (
        re.compile(r"curlCode: [67]\b|resolve host|connect to server|Code: 301", re.I),
        f"the server cannot be reached; check the network, tiledb vfs.s3.region and {_ENDPOINT}",
    ),
    (
        re.compile(r"curlCode|Code: 5\d\d|timeout|timed out", re.I),
        "the server fails or is too slow; run again later, or raise tiledb "
        "vfs.s3.connect_max_tries and vfs.s3.request_timeout_ms",
    ),
)


_PASSING = re.compile(r"IO Error|S3: |curlCode|HTTP Response|\[TileDB::|\[ManagedQuery\]")
_LASTING = re.compile(r"Code: 40[0134]")


def may_pass(error: object) -> bool:
    """Whether an error is one of the storage, which may be gone when asked again."""
    text = str(error)
    return bool(_PASSING.search(text)) and not _LASTING.search(text)


def hint(error: object) -> str:
    """What to do about an error of an object store: a sentence, or "" when nothing is known."""
    text = str(error)
    return next((said for pattern, said in _HINTS if pattern.search(text)), "")


def brief(error: object) -> str:
    """An error's text without the headers of the HTTP answer that it may quote."""
    return _NOISE.sub("", str(error)).strip()


@lru_cache(maxsize=1)
def _known_keys() -> frozenset[str]:
    return frozenset(tiledbsoma.SOMATileDBContext().native_context.config())


def _refuse(key: str, value: str) -> None:
    if _SECRET.search(key.lower()) or "@" in value:
        raise ConfigError(
            f"tiledb '{key}' is a secret, which a configuration would copy into run directories "
            "and MLflow; leave it out and set it in the environment of every machine "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN)"
        )
    known = _known_keys()
    if not key.startswith("soma.") and key not in known:  # those of tiledbsoma are not listed
        raise ConfigError(
            f"tiledb has no setting '{key}'.{did_you_mean(key, known)} An S3-compatible server "
            f"needs {_ENDPOINT}, vfs.s3.scheme, vfs.s3.region and vfs.s3.use_virtual_addressing"
        )


def _endpoint(address: str) -> dict[str, str]:
    """The settings that an address such as ``http://localhost:9000`` means."""
    parts = urlsplit(address if "://" in address else f"https://{address}")
    return {
        _ENDPOINT: parts.netloc,
        "vfs.s3.scheme": parts.scheme,
        "vfs.s3.use_virtual_addressing": "false",
    }


def settings(given: Mapping[str, str] | None = None, *, remote: bool = True) -> Settings:
    """Check TileDB settings, and complete them for an S3-compatible server.

    The address of a server may be given with its scheme (``http://localhost:9000``), as
    ``vfs.s3.endpoint_override`` or in the environment (``AWS_ENDPOINT_URL_S3``,
    ``AWS_ENDPOINT_URL``); path-style addressing then goes with it. What the environment says here
    is carried to all processes that read the store.

    Args:
        given: TileDB's own keys and values.
        remote: whether they are for an object store.

    Returns:
        Sorted (key, value) pairs, hashable.

    Raises:
        ConfigError: a secret, or a key that TileDB does not know.
    """
    own = dict(given or {})
    for key, value in own.items():
        _refuse(key, value)
    if "://" in own.get(_ENDPOINT, ""):
        address = own.pop(_ENDPOINT)
        own = {**_endpoint(address), **own}
    address = next((os.environ[n] for n in _ENDPOINT_VARIABLES if os.environ.get(n)), "")
    if remote and address and _ENDPOINT not in own:
        own = {**_endpoint(address), **own}
    return tuple(sorted(own.items()))


@lru_cache(maxsize=8)
def context(options: Settings = (), *, remote: bool = False) -> Any:
    """The TileDB context of this process for these settings, whatever moment is looked at.

    It has threads of its own, so one is made and kept.

    Args:
        options: what was set; it goes over what cellray sets.
        remote: whether it is for an object store.
    """
    return tiledbsoma.SOMATileDBContext(
        tiledb_config={**_DEFAULTS, **(_REMOTE if remote else {}), **dict(options)}
    )


def now_ms() -> int:
    """Milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def iso(at_ms: int) -> str:
    """``2026-11-22T12:00:00.000Z`` for milliseconds since 1970."""
    when = datetime.fromtimestamp(at_ms / 1000, UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_moment(timestamp: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time; UTC where it names no zone.

    A date alone means its first moment.

    Raises:
        ConfigError: it is not such a time.
    """
    try:
        when = datetime.fromisoformat(timestamp)
    except ValueError as error:
        raise ConfigError(
            f"timestamp '{timestamp}' is not a time; write it like 2026-11-22T12:00:00Z"
        ) from error
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return round(when.timestamp() * 1000)


def past_moment(timestamp: str) -> int:
    """:func:`parse_moment` of a time that must be over.

    Raises:
        ConfigError: it is not a time, or it lies in the future, where a store can still change.
    """
    at_ms = parse_moment(timestamp)
    if at_ms > now_ms():
        raise ConfigError(
            f"timestamp '{timestamp}' lies in the future (it is {iso(now_ms())}): a store can "
            'still change until then; take an earlier one, or "" for now'
        )
    return at_ms


def open_soma(uri: str, options: Settings = (), *, at_ms: int | None = None) -> Any:
    """Open any SOMA object for reading.

    Raises:
        DataError: there is none, or its storage cannot be reached; the cause is attached to an
            error that may pass.
    """
    try:
        return tiledbsoma.open(
            uri, context=context(options, remote="://" in uri), tiledb_timestamp=at_ms
        )
    except (tiledbsoma.SOMAError, OSError, RuntimeError) as error:
        if "://" in uri and "not a valid TileDB array or group" in str(error):
            raise DataError(f"there is no store at '{uri}'; check the uri") from None
        advice = hint(error)
        raise DataError(
            f"'{uri}' cannot be opened as a SOMA experiment: {brief(error)}"
            + (f". {advice[0].upper()}{advice[1:]}" if advice else "")
        ) from (error if may_pass(error) else None)


def first_moment(uri: str, options: Settings, at_ms: int) -> int | None:
    """When an object came to be that is there now but was not yet at ``at_ms``, to a second.

    Found by halving the time in between, so that it works on any storage.

    Returns:
        Milliseconds since 1970; None if there is nothing now either.
    """
    low, high = at_ms, now_ms()
    if not _exists(uri, options, high):
        return None
    while high - low > _FIRST_MOMENT_STEP_MS:
        middle = (low + high) // 2
        low, high = (low, middle) if _exists(uri, options, middle) else (middle, high)
    return high


def _exists(uri: str, options: Settings, at_ms: int) -> bool:
    # a context of its own: those of the search are used once
    asked = tiledbsoma.SOMATileDBContext(
        tiledb_config={**_DEFAULTS, **dict(options)}, timestamp=at_ms
    )
    try:
        with tiledbsoma.open(uri, context=asked) as found:
            return found.soma_type != "SOMAExperiment" or {"obs", "ms"} <= set(found)
    except (tiledbsoma.SOMAError, OSError, RuntimeError):
        return False
