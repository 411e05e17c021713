"""Splits of cells by stable hashes: adding cells never moves old ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cellray.core.draw import splitmix64
from cellray.core.errors import ConfigError
from cellray.data.digest import Strings, hash64

__all__ = ["hash_unit", "key_unit", "split_by"]


def hash_unit(values: Strings, *, salt: int = 0) -> npt.NDArray[np.float64]:
    """A stable uniform number in [0, 1) for each string, see :func:`cellray.data.digest.hash64`.

    Args:
        values: N strings.
        salt: another salt gives independent numbers.

    Returns:
        (N,) float64 with 53 random bits each.
    """
    bits = hash64(values, salt=salt) >> np.uint64(11)
    return np.asarray(bits * np.float64(2.0**-53), dtype=np.float64)


def key_unit(keys: npt.NDArray[np.uint64], *, salt: int = 0) -> npt.NDArray[np.float64]:
    """A stable uniform number in [0, 1) for each key, e.g. of ``Store.cell_keys``.

    Args:
        keys: (N,) uint64.
        salt: another salt gives independent numbers.
    """
    mixed = splitmix64(np.array([salt], dtype=np.int64).astype(np.uint64))[0]
    bits = splitmix64(keys ^ mixed) >> np.uint64(11)
    return np.asarray(bits * np.float64(2.0**-53), dtype=np.float64)


def split_by(values: Strings, *, fraction: float, salt: int = 0) -> npt.NDArray[np.bool_]:
    """Which cells are set apart: those whose value hashes below ``fraction``.

    Give cell ids to split cell by cell, or a group column (donor, dataset) to keep groups whole.
    What a value decides depends on that value alone, so growing the data moves no old cell; with
    few groups the share set apart can differ much from ``fraction``.

    Args:
        values: (N,) cell ids or group names.
        fraction: expected share of distinct values set apart, 0..1.
        salt: another salt gives another split.

    Returns:
        (N,) bool, True for the cells set apart.

    Raises:
        ConfigError: ``fraction`` is outside 0..1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"split fraction {fraction} is not between 0 and 1")
    distinct, inverse = np.unique(
        np.asarray([str(v) for v in values], dtype=np.str_), return_inverse=True
    )
    apart: npt.NDArray[np.bool_] = hash_unit(distinct, salt=salt) < fraction
    return apart[inverse]
