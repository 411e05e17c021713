"""Configurations beside published weights: numbers that are numbers, values that agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cellray.core.errors import CheckpointError

__all__ = ["agree", "allowed", "decimal", "whole"]


def decimal(raw: Mapping[str, Any], key: str, default: float | None, where: str) -> float:
    """A number of a configuration; ``default`` where it has no such key, None for a must.

    Raises:
        CheckpointError: it is missing, or no finite number.
    """
    if key not in raw and default is not None:
        return default
    value = raw.get(key)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise CheckpointError(f"{where}: '{key}' is {value!r}; it must be a number")
    return float(value)  # type: ignore[arg-type]


def whole(raw: Mapping[str, Any], key: str, default: int | None, where: str) -> int:
    """A positive whole number of a configuration; see :func:`decimal`.

    Raises:
        CheckpointError: it is missing, or no such number.
    """
    value = decimal(raw, key, None if default is None else float(default), where)
    if value != int(value) or value < 1:
        raise CheckpointError(f"{where}: '{key}' is {raw.get(key)!r}; it must be 1, 2, 3, ...")
    return int(value)


def allowed(raw: Mapping[str, Any], key: str, values: Sequence[Any], where: str) -> None:
    """Refuse a setting that changes what the model computes and is not built here.

    Raises:
        CheckpointError: the key is there with another value.
    """
    if key in raw and raw[key] not in values:
        raise CheckpointError(
            f"{where} has {key} {raw[key]!r}, which changes what the model computes; only "
            f"{' and '.join(repr(value) for value in values)} can be read"
        )


def agree(raw: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    """Refuse a configuration that speaks of other sizes than its weights have.

    Raises:
        CheckpointError: a key is there with another number.
    """
    for key, size in sizes.items():
        if key in raw and whole(raw, key, None, where) != size:
            raise CheckpointError(
                f"{where} has {key} {raw[key]}, and the weights have {size}: it is the "
                "configuration of another model"
            )
