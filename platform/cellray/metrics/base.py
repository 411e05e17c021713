"""What a metric id means, and the way to look one up over all metric modules.

Every value that leaves this package has a versioned id (``accuracy.v1``): two libraries give
different values under one name, so the name alone is no definition. A module of metrics exports
``METRICS``, a mapping of id to :class:`Metric`; :func:`metric` finds an id in any of them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError, did_you_mean

__all__ = [
    "Labels",
    "Metric",
    "all_metrics",
    "by_id",
    "encode_labels",
    "label_texts",
    "metric",
]

Labels = Sequence[str] | npt.NDArray[np.generic]


@dataclass(frozen=True)
class Metric:
    """What a metric id means.

    Attributes:
        id: the versioned name in tables and in MLflow.
        title: column heading.
        meaning: one sentence.
        higher_is_better: None for a count, which is neither.
    """

    id: str
    title: str
    meaning: str
    higher_is_better: bool | None = True


def by_id(*metrics: Metric) -> Mapping[str, Metric]:
    """A module's table of metrics.

    Raises:
        DataError: two metrics share an id.
    """
    table: dict[str, Metric] = {}
    for entry in metrics:
        if entry.id in table:
            raise DataError(f"two metrics are called '{entry.id}'; give one a new version")
        table[entry.id] = entry
    return MappingProxyType(table)


@cache
def all_metrics() -> Mapping[str, Metric]:
    """Every metric of every module of this package, by id; modules are found by listing it.

    Raises:
        DataError: two modules define one id.
    """
    package = importlib.import_module(__name__.rpartition(".")[0])
    tables: list[Metric] = []
    for found in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        module = importlib.import_module(f"{package.__name__}.{found}")
        tables.extend(getattr(module, "METRICS", {}).values())
    return by_id(*tables)


def metric(metric_id: str) -> Metric:
    """What an id means, whichever module defines it.

    Raises:
        DataError: no module defines the id.
    """
    known = all_metrics()
    if metric_id not in known:
        raise DataError(
            f"no metric is called '{metric_id}'.{did_you_mean(metric_id, known)} The ids are: "
            f"{', '.join(sorted(known))}"
        )
    return known[metric_id]


def _is_missing(value: object) -> bool:
    """None, NaN of any width, NaT or pandas' NA: whatever does not equal itself."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # NA answers neither yes nor no
        return True


def label_texts(values: Labels, what: str) -> npt.NDArray[np.object_]:
    """Labels as strings.

    Args:
        values: N labels of any kind that has a text.
        what: whose labels, in errors: ``true``, ``batch``.

    Raises:
        DataError: they are not one per cell, or some are missing (None, NaN, NaT, NA).
    """
    array = np.asarray(values, dtype=object)
    if array.ndim != 1:
        raise DataError(f"{what} labels have shape {array.shape}; give one label per cell")
    missing = np.array([_is_missing(v) for v in array], dtype=bool)
    if missing.any():
        raise DataError(
            f"{int(missing.sum())} of {len(array)} {what} labels are missing; drop those cells "
            "before scoring"
        )
    return np.array([str(v) for v in array], dtype=object)


def encode_labels(values: Labels, what: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Labels as whole numbers that do not depend on the order of the cells.

    Args:
        values: N labels.
        what: whose labels, in errors.

    Returns:
        (N,) int64 positions in the sorted names, and the names.

    Raises:
        DataError: as in :func:`label_texts`, or there is no label.
    """
    texts = label_texts(values, what)
    if not len(texts):
        raise DataError(f"no {what} label is given: there is no cell to score")
    names, codes = np.unique(texts.astype(str), return_inverse=True)
    return codes.astype(np.int64), tuple(str(name) for name in names)
