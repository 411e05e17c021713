"""Ranks over several data sets by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd
import pytest
from rows_by_hand import HEAD, baselines, row, runs

from cellray.bench.across import across
from cellray.bench.render import render_across
from cellray.bench.table import ResultRow, failed_rows, leaderboard
from cellray.core.errors import DataError


def board(name: str, *more: ResultRow, split: str = "") -> pd.DataFrame:
    rows = [replace(r, dataset_id=name, split_sha256=split) for r in [*baselines(), *more]]
    return leaderboard(rows)


def three() -> list[pd.DataFrame]:
    """The model is first, last but one and first; it dies on none; the other dies on one."""
    dead = failed_rows(row("frail", 0.0), "lost")
    return [
        board("one", *runs("model", [0.95]), *runs("frail", [0.99])),
        board("two", *runs("model", [0.50]), *runs("frail", [0.99])),
        board("three", *runs("model", [0.97]), *dead),
    ]


def test_the_median_rank_by_hand() -> None:
    found = across(three()).set_index("method")
    assert found["median_rank"].dropna().to_dict() == {
        "model": 1.0,
        "logistic": 2.0,
        "knn": 3.0,
        "majority": 4.0,
    }
    assert found.loc["model", ["one.rank", "two.rank", "three.rank"]].tolist() == [1, 3, 1]
    assert found.loc["model", "two"] == pytest.approx(0.5)


def test_a_method_that_failed_somewhere_has_no_rank_and_takes_none_away() -> None:
    found = across(three()).set_index("method")
    assert math.isnan(found.loc["frail", "median_rank"])
    assert found.index[-1] == "frail"
    assert (found.loc["frail", "n_values"], found.loc["frail", "n_boards"]) == (2, 3)
    text = render_across(three())
    line = next(t for t in text.splitlines() if t.startswith("frail"))
    assert line.split()[1:5] == ["-", "2", "of", "3"]
    assert line.split()[-2:] == ["failed", "-"]


def test_controls_and_reported_values_are_left_out() -> None:
    extra = runs("x.positive", [1.0], method_family="control")
    given = row("R", 0.99, None, provenance="reported", reported_source="10.1/x")
    found = across([board("one", *extra, given), board("two", *extra)])
    assert set(found["method"]) == {"logistic", "knn", "majority"}


def test_two_splits_of_one_data_set_are_told_apart() -> None:
    found = across([board("one", split="aaaaaaaaaa"), board("one", split="bbbbbbbbbb")])
    assert found.attrs["names"] == ["one aaaaaaaa", "one bbbbbbbb"]


def test_tables_without_a_common_rank_are_refused() -> None:
    with pytest.raises(DataError, match="two tables are of one"):
        across([board("one"), board("one")])
    other = leaderboard([replace(r, metric_id="accuracy.v1") for r in baselines()],
                        headline="accuracy.v1")  # fmt: skip
    with pytest.raises(DataError, match=f"several headlines have no common rank: acc.*{HEAD}"):
        across([board("one"), other])
