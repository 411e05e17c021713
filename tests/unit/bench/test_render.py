"""The leaderboard as text, character for character."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rows_by_hand import HEAD, baselines, row, runs

from cellray.bench.cells import decimals_for
from cellray.bench.render import (
    SPREAD,
    legend,
    render_markdown,
    render_terminal,
    shortened,
    title_of,
    value_text,
)
from cellray.bench.table import failed_rows, leaderboard
from cellray.core.errors import DataError
from cellray.metrics.base import all_metrics

REPORTED = row(
    "scGPT fine-tuned", 0.703, None, provenance="reported", reported_source="10.1/x Table S1"
)


def test_terminal_golden() -> None:
    """Two blocks: what was scored, and what it is worth; means stand under one another."""
    rows = [*baselines(), *runs("scgpt", [0.90, 0.92, 0.97], gpu_hours=1.5)]
    text = render_terminal(leaderboard(rows))
    rule = "─" * 83
    assert text.splitlines() == [
        "method    kind          seeds  macro F1 (union)",
        rule,
        "scgpt     from scratch      3      0.93  ± 0.04",
        "logistic  baseline          3      0.900 ± n/a",
        "knn       baseline          3      0.840 ± n/a",
        "majority  baseline          3      0.030 ± n/a",
        rule,
        "method    95 % over seeds        Δ to logistic  p (t)  p (Wilcoxon)  GPU-h  overlap",
        rule,
        "scgpt        [0.84, 1.02]  +0.03 [-0.06, 0.12]  0.286         0.500    1.5  unknown",
        "logistic                                                                    unknown",
        "knn                                                                         unknown",
        "majority                                                                    unknown",
        rule,
        SPREAD,
    ]


def test_failed_and_reported_lines() -> None:
    dead = failed_rows(row("dead", None, 0, status="skipped", metric_id=""), "worker\ndied")
    text = render_terminal(leaderboard([*baselines(), *dead, REPORTED])).splitlines()
    line = next(t for t in text if t.startswith("dead"))
    assert line.split() == ["dead", "from", "scratch", "0", "of", "1", "failed"]
    assert "dead: failed: worker died" in text
    divider = text.index("-- reported by others, not measured here --")
    assert text[divider + 1].startswith("scGPT fine-tuned †")
    assert text[divider + 1].split()[3:] == ["from", "scratch", "-", "0.703"]
    assert "±" not in text[divider + 1]
    assert "scGPT fine-tuned †: 10.1/x Table S1" in text


def test_what_a_value_without_number_is_shown_as() -> None:
    """Never 0: failed, skipped, or a dash where only this metric is not known."""
    skipped = row("later", None, 0, status="skipped", metric_id="")
    other = row("other", 0.7, metric_id="accuracy.v1")
    half = [row("half", 0.5, 0), *failed_rows(row("half", 0.0, 1), "lost")]
    rows = [*baselines(), *half, *failed_rows(row("dead", 0.0), "lost"), skipped, other]
    board = leaderboard(rows).set_index("method", drop=False)
    shown = {name: value_text(board.loc[name], HEAD).strip() for name in board.index}
    assert shown == {
        "logistic": "0.900 ± n/a",
        "knn": "0.840 ± n/a",
        "half": "0.500 ± n/a",
        "majority": "0.030 ± n/a",
        "dead": "failed",
        "later": "skipped",
        "other": "-",
    }
    assert "0.000" not in render_terminal(board)
    assert "1 of 2 seeds failed: lost" in render_markdown(board)


def test_long_errors_are_wrapped_and_not_lost() -> None:
    error = " ".join(f"word{i}" for i in range(60))
    dead = failed_rows(row("dead", None, 0, status="skipped", metric_id=""), error)
    board = leaderboard([*baselines(), *dead])
    assert error in render_markdown(board)
    told = render_terminal(board).partition("dead: failed: ")[2]
    assert " ".join(told.split()) == error
    assert max(map(len, told.splitlines())) <= 120
    assert shortened("abcdef", 4) == "abc…"
    assert shortened("abcd", 4) == "abcd"


def test_markdown_golden() -> None:
    lines = render_markdown(leaderboard([*baselines(), REPORTED])).splitlines()
    assert lines[:4] == [
        "| method | kind | seeds | macro F1 (union) |",
        "| --- | --- | ---: | ---: |",
        "| logistic | baseline | 3 | **0.900** ± n/a |",
        "| knn | baseline | 3 | 0.840 ± n/a |",
    ]
    assert lines[5] == "| *reported by others, not measured here* |  |  |  |"
    assert lines[6] == "| *scGPT fine-tuned †* | *from scratch* | *-* | *0.703* |"
    assert "- scGPT fine-tuned †: 10.1/x Table S1" in lines
    assert any(line.startswith("- macro F1 (union) = macro_f1.union.v1: ") for line in lines)


def test_bold_is_what_the_seeds_do_not_set_apart() -> None:
    rows = [*baselines(), *runs("good", [0.93, 0.95, 0.94]), *runs("same", [0.92, 0.96, 0.93])]
    rows += runs("bad", [0.70, 0.72, 0.71])
    lines = render_markdown(leaderboard(rows)).splitlines()
    bold = {line.split(" | ")[0].strip("| ") for line in lines if "**" in line}
    assert bold == {"good", "same"}


def test_a_reported_value_is_never_bold_and_has_no_difference() -> None:
    high = row("R", 0.999, None, provenance="reported", reported_source="10.1/x T1")
    text = render_markdown(leaderboard([*baselines(), *runs("m", [0.5, 0.6]), high]))
    line = next(t for t in text.splitlines() if "R †" in t)
    assert "**" not in line
    assert text.count("R †") == 2  # among the scores, and with its source: not in the evidence


def test_printed_spreads_are_shown_as_what_they_are() -> None:
    half = {"reported_spread": 0.023, "reported_spread_kind": "ci95_half_width"}
    sd = {"reported_spread": 0.010, "reported_spread_kind": "sd"}
    given = {"provenance": "reported", "reported_source": "10.1/x T1"}
    board = leaderboard(
        [*baselines(), row("H", 0.72, None, **given, **half), row("S", 0.7, None, **given, **sd)]
    )
    by = board.set_index("method", drop=False)
    assert value_text(by.loc["H"], HEAD) == "0.720 ± 0.023"
    assert value_text(by.loc["S"], HEAD) == "0.700 ± 0.010"
    assert math.isnan(by.loc["H", f"{HEAD}.sd"])
    assert by.loc["H", f"{HEAD}.ci95_low"] == pytest.approx(0.697)
    assert "± is half a 95 % interval, as printed" in by.loc["H", "note"]
    assert "± is a standard deviation, as printed" in by.loc["S", "note"]


@pytest.mark.parametrize(
    ("half_width", "decimals"),
    [(0.09, 2), (0.03, 2), (0.029, 3), (0.012, 3), (0.2, 2), (0.5, 1), (4.0, 0), (1e-7, 4)],
)
def test_values_are_rounded_to_what_the_interval_supports(half_width: float, decimals: int) -> None:
    assert decimals_for(half_width) == decimals


@pytest.mark.parametrize("nothing", [float("nan"), 0.0])
def test_without_an_interval_three_decimals(nothing: float) -> None:
    assert decimals_for(nothing) == 3


def test_synthetic_data_carry_a_banner() -> None:
    rows = [replace(r, dataset_id="synthetic/atlas") for r in baselines()]
    board = leaderboard(rows)
    assert render_terminal(board).startswith("!! synthetic data: it shows that the code works")
    assert render_markdown(board).startswith("> **synthetic data: it shows that the code works")
    assert "synthetic" not in render_terminal(leaderboard(baselines()))


def test_titles_come_from_every_metric_module() -> None:
    assert title_of("bras.v1") == all_metrics()["bras.v1"].title
    assert title_of("overall.scgpt_louvain.paper") == "Overall (paper)"
    assert title_of("nothing.v9") == "nothing.v9"


def test_costs_overlap_and_budget_are_columns() -> None:
    fields = {"gpu_hours": 1.25, "cpu_hours": 0.004, "cells_per_s": 1523.4, "tuning_budget": 5}
    rows = [
        *baselines(),
        *runs("m", [0.9], overlap_flag="partial", overlap_fraction=0.034, **fields),
    ]
    lines = render_markdown(leaderboard(rows)).splitlines()
    heads = [t for t in lines if t.startswith("| method")][1].strip("| ").split(" | ")
    cells = [t for t in lines if t.startswith("| m |")][1].strip("| ").split(" | ")
    found = dict(zip(heads, cells, strict=True))
    assert found["GPU-h"] == "1.25"
    assert found["CPU-h"] == "0.004"
    assert found["cells/s"] == "1,523"
    assert found["overlap"] == "partial (3.4 %)"
    assert found["trials"] == "5"


def test_markdown_escapes_what_would_break_the_table() -> None:
    rows = [*baselines(), row("a|b", 0.5)]
    assert "| a\\|b |" in render_markdown(leaderboard(rows))


def test_metrics_can_be_chosen_and_unknown_ones_are_explained() -> None:
    board = leaderboard(baselines())
    assert render_terminal(board, metrics=[HEAD]) == render_terminal(board)
    with pytest.raises(DataError, match=r"no metric 'macro_f1.v1'. Did you mean 'macro_f1.union"):
        render_terminal(board, metrics=["macro_f1.v1"])


def test_legend_names_the_versioned_id() -> None:
    assert legend(["accuracy.v1"]) == "accuracy = accuracy.v1: correct cells / all cells"
