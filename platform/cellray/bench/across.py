"""Several leaderboards in one line a method: values by data set, ranks, and the median rank."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pandas as pd

from cellray.bench.cells import Cell, Column, columns_of, headline_of, title_of
from cellray.core.errors import DataError

__all__ = ["across", "board_name", "columns_across"]


def board_name(board: pd.DataFrame) -> str:
    """``data set (split)``, as a heading."""
    split = board.attrs.get("split_id", "")
    return f"{board.attrs['dataset_id']} ({split})" if split else str(board.attrs["dataset_id"])


def across(boards: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Rank methods over data sets.

    Ranks are among the methods that have a value on every data set, so that each rank is out of
    the same number; any other method (it failed, or was not run somewhere) comes last and has
    none: a failure is not a value. Controls frame the tables and are left out, reported values
    never enter.

    Args:
        boards: leaderboards of one task and headline, each of its own data set or split.

    Returns:
        One line a method: ``method``, ``family``, ``median_rank``, ``n_values``, ``n_boards``,
        and for each board its mean under :func:`board_name` and ``....rank``; ``attrs`` hold the
        headline and the names.

    Raises:
        DataError: boards of several tasks or headlines, or two of one data set and split.
    """
    for key in ("task", "headline"):
        found = sorted({str(board.attrs.get(key)) for board in boards})
        if len(found) > 1:
            raise DataError(f"tables of several {key}s have no common rank: {', '.join(found)}")
    names = _names(boards)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two tables are of {name}; give each data set and split once")
    headline = headline_of(boards[0])
    values: dict[str, dict[str, float]] = {}
    ranks: dict[str, dict[str, float]] = {}
    families: dict[str, str] = {}
    for name, board in zip(names, boards, strict=True):
        rivals = board[(board["provenance"] == "measured") & (board["family"] != "control")]
        for _, row in rivals.iterrows():
            families.setdefault(row["method"], row["family"])
            if pd.notna(row[headline]):
                values.setdefault(row["method"], {})[name] = float(row[headline])
                ranks.setdefault(row["method"], {})[name] = float(row["rank"])
    whole = {m for m, by in values.items() if len(by) == len(boards)}
    own = {name: _ranked({m: ranks[m][name] for m in whole}) for name in names}
    records: list[dict[str, Any]] = []
    for method, family in families.items():
        given = values.get(method, {})
        record: dict[str, Any] = {"method": method, "family": family}
        places = [own[name][method] for name in names] if method in whole else []
        record["median_rank"] = statistics.median(places) if places else float("nan")
        record |= {"n_values": len(given), "n_boards": len(boards)}
        for name in names:
            record[name] = given.get(name, float("nan"))
            record[f"{name}.rank"] = own[name].get(method, float("nan"))
        records.append(record)
    records.sort(key=lambda r: (pd.isna(r["median_rank"]), r["median_rank"], r["method"]))
    summary = pd.DataFrame(records)
    summary.attrs = {"headline": headline, "names": names}
    return summary


def _names(boards: Sequence[pd.DataFrame]) -> list[str]:
    """A name for each, with the start of the split's digest where that tells two apart."""
    names = [board_name(board) for board in boards]
    return [
        f"{name} {str(board.attrs.get('split_sha256', ''))[:8]}" if names.count(name) > 1 else name
        for name, board in zip(names, boards, strict=True)
    ]


def _ranked(places: dict[str, float]) -> dict[str, float]:
    """Ranks among a subset, ties sharing their mean."""
    series = pd.Series(places, dtype=float).rank(method="average")
    return {str(method): float(rank) for method, rank in series.items()}


def columns_across(boards: Sequence[pd.DataFrame]) -> list[Column]:
    """The columns to print of :func:`across`: each value as in its own table, with its rank.

    Raises:
        DataError: as in :func:`across`.
    """
    summary = across(boards)
    title = title_of(headline_of(boards[0]))
    lines = [row for _, row in summary.iterrows()]
    columns = [Column("method", tuple(Cell(row["method"]) for row in lines), False, "name")]
    medians = [Cell("-" if pd.isna(r["median_rank"]) else f"{r['median_rank']:g}") for r in lines]
    columns.append(Column("median rank", tuple(medians), hint=f"by {title}, over data sets"))
    of = [Cell(f"{row['n_values']} of {row['n_boards']}") for row in lines]
    columns.append(Column("data sets", tuple(of), hint="with a value"))
    for name, board in zip(summary.attrs["names"], boards, strict=True):
        shown = columns_of(board, [headline_of(board)])
        scores = next(column for column in shown if column.title == title)
        given = zip(board["method"], board["provenance"], scores.cells, strict=True)
        there = {method: cell for method, source, cell in given if source == "measured"}
        cells = [there.get(row["method"], Cell("-")) for row in lines]
        columns.append(Column(name, tuple(cells), hint=title))
        ranks = [r[f"{name}.rank"] for r in lines]
        shown_ranks = [Cell("-" if pd.isna(rank) else f"{rank:g}") for rank in ranks]
        columns.append(Column("rank", tuple(shown_ranks), hint=f"on {name}"))
    return columns
