"""A read that fails is tried again: what fails once in a while must not end a run."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from cellray.core.errors import DataError
from cellray.data.storage import brief, hint

__all__ = ["TRIES", "read_with_retry"]

T = TypeVar("T")

TRIES = 4
_FIRST_WAIT_S = 0.2
_WAIT_FACTOR = 4.0
_log = logging.getLogger(__name__)
_jitter = random.Random()  # of the system's entropy: readers that failed together part again


def read_with_retry(
    read: Callable[[], T],
    *,
    what: Callable[[], str],
    reopen: Callable[[], None] = lambda: None,
    tries: int = TRIES,
    first_wait_s: float | None = None,
) -> T:
    """Call ``read`` until it succeeds, a few times, and give what it gave: once, and whole.

    Only failures of the storage are tried again: a :class:`DataError` that has a cause. One without
    is a wrong request, and is raised at once. TileDB has asked the object store several times by
    itself before a failure arrives here.

    Args:
        read: reads and returns; nothing of a call that failed is kept.
        what: names what is read, for the message, e.g. the store and the cells.
        reopen: called before each further try, to drop handles that a failure left unusable.
        tries: calls of ``read`` at most.
        first_wait_s: seconds before the second call, 0.2 by default; each further wait is 4 times
            the one before, give or take a half.

    Raises:
        DataError: a wrong request, or the storage failed ``tries`` times.
    """
    started = time.monotonic()
    wait_s = _FIRST_WAIT_S if first_wait_s is None else first_wait_s
    for number in range(1, tries + 1):
        try:
            return read()
        except DataError as error:
            if error.__cause__ is None:
                raise
            if number == tries:
                raise DataError(
                    _failed(what(), error, tries, time.monotonic() - started)
                ) from error
            _log.warning("%s: try %d of %d failed: %s", what(), number, tries, error)
        reopen()
        time.sleep(wait_s * _jitter.uniform(0.5, 1.5))
        wait_s *= _WAIT_FACTOR
    raise AssertionError("tries is at least 1")


def _failed(what: str, error: DataError, tries: int, seconds: float) -> str:
    text, advice = brief(error).rstrip("."), hint(error)
    if not advice:
        advice = "check that the store is whole and can be read from every machine of the run"
    rest = "" if advice[1:] in text else f". {advice[0].upper()}{advice[1:]}"
    return f"{what} could not be read, {tries} tries in {seconds:.1f} s: {text}{rest}"
