"""Compiled copying of ragged rows between flat arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

__all__ = ["copy_rows"]

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])


def _kernel(function: F) -> F:
    return cast(F, numba.njit(cache=True, nogil=True)(function))


@_kernel
def copy_rows(source: Array, starts: Array, lengths: Array, out: Array, places: Array) -> None:
    """Copy row i, ``source[starts[i] :][: lengths[i]]``, to ``out[places[i] :]``.

    Args:
        source: flat values of all rows.
        starts: (N,) int64 where each row begins.
        lengths: (N,) int64 values of each row.
        out: flat array that is written to.
        places: (N,) int64 where each row goes.
    """
    for i in range(len(starts)):
        begin, end, place = np.int64(starts[i]), np.int64(lengths[i]), np.int64(places[i])
        out[place : place + end] = source[begin : begin + end]
