"""Association of two groupings of the same cells: Cramér's V, plain and corrected for bias.

Legend: N cells, R levels of the first grouping, C levels of the second.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError
from cellray.metrics.base import Labels, Metric, by_id, encode_labels

__all__ = ["METRICS", "contingency", "cramers_v"]

I64 = npt.NDArray[np.int64]

METRICS: Mapping[str, Metric] = by_id(
    Metric(
        "cramers_v.bergsma.v1",
        "Cramér's V",
        "association of two groupings, 0 to 1, corrected for bias",
        None,
    ),
    Metric("cramers_v.plain.v1", "Cramér's V (plain)", "the same without correction", None),
)


def contingency(first: Labels, second: Labels) -> tuple[I64, tuple[str, ...], tuple[str, ...]]:
    """Count cells by level of two groupings.

    Args:
        first: N values.
        second: N values of the same cells.

    Returns:
        (R, C) int64 counts, and the names of rows and columns.

    Raises:
        DataError: lengths differ, a value is missing, or there is no cell.
    """
    if len(first) != len(second):
        raise DataError(
            f"{len(first)} values of one grouping but {len(second)} of the other; give both of "
            "the same cells"
        )
    rows, row_names = encode_labels(first, "first")
    columns, column_names = encode_labels(second, "second")
    flat = np.bincount(
        rows * len(column_names) + columns, minlength=len(row_names) * len(column_names)
    )
    return flat.reshape(len(row_names), len(column_names)).astype(np.int64), row_names, column_names


def cramers_v(table: I64, *, corrected: bool = True) -> float:
    """Cramér's V of a contingency table.

    Corrected (``cramers_v.bergsma.v1``): the bias-corrected estimator of Bergsma (2013,
    doi:10.1016/j.jkss.2012.10.002), whose expectation is near 0 for independent groupings however
    many levels they have; plain (``cramers_v.plain.v1``): sqrt(chi2 / N / min(R - 1, C - 1)).

    Args:
        table: (R, C) counts of cells.
        corrected: which of the two.

    Returns:
        0..1; 0 if a grouping has fewer than two levels with cells.

    Raises:
        DataError: the table holds no cell.
    """
    counts = np.asarray(table, dtype=np.float64)
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    total = counts.sum()
    if not total:
        raise DataError("the contingency table holds no cell; there is nothing to associate")
    rows, columns = counts.shape
    if min(rows, columns) < 2:
        return 0.0
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / total
    phi2 = float((counts**2 / expected).sum() / total - 1.0)
    if not corrected:
        return float(np.sqrt(max(phi2, 0.0) / (min(rows, columns) - 1)))
    if total < 2:
        return 0.0
    phi2 = max(0.0, phi2 - (rows - 1) * (columns - 1) / (total - 1))
    levels = min(n - (n - 1) ** 2 / (total - 1) for n in (rows, columns))
    if levels <= 1:
        return 0.0
    return float(min(1.0, np.sqrt(phi2 / (levels - 1))))
