"""The leaderboard as text, character for character."""

from __future__ import annotations

import pytest
from rows_by_hand import HEAD, baselines, row, runs

from cellray.bench.render import legend, render_markdown, render_terminal, shortened, value_text
from cellray.bench.table import failed_rows, leaderboard
from cellray.core.errors import DataError

REPORTED = row(
    "scGPT fine-tuned", 0.703, None, provenance="reported", reported_source="10.1/x Table S1"
)


def test_terminal_golden() -> None:
    text = render_terminal(leaderboard([*baselines(), *runs("scgpt", [0.90, 0.92, 0.97])]))
    rule = "─" * 34
    assert text.splitlines() == [
        "method    seeds  macro F1 (union)",
        rule[:33],
        "scgpt         3     0.930 ± 0.036",
        "logistic      3     0.900 ± n/a",
        "knn           3     0.840 ± n/a",
        "majority      3     0.030 ± n/a",
        rule[:33],
        "mean ± standard deviation over seeds (n/a: one seed, or no seed changes the method)",
    ]


def test_failed_and_reported_lines() -> None:
    dead = failed_rows(row("dead", None, 0, status="skipped", metric_id=""), "worker\ndied")
    text = render_terminal(leaderboard([*baselines(), *dead, REPORTED])).splitlines()
    line = next(t for t in text if t.startswith("dead"))
    assert line.split() == ["dead", "0", "failed", "failed:", "worker", "died"]
    divider = text.index("-- reported by others, not measured here --")
    assert text[divider + 1].startswith("scGPT fine-tuned †")
    assert text[divider + 1].split()[3:] == ["-", "0.703", "10.1/x", "Table", "S1"]
    assert "±" not in text[divider + 1]


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


def test_long_errors_are_cut_in_the_terminal_only() -> None:
    dead = failed_rows(row("dead", None, 0, status="skipped", metric_id=""), "x" * 200)
    board = leaderboard([*baselines(), *dead])
    assert "x" * 200 in render_markdown(board)
    assert "x" * 60 not in render_terminal(board)
    assert shortened("abcdef", 4) == "abc…"
    assert shortened("abcd", 4) == "abcd"


def test_markdown_golden() -> None:
    lines = render_markdown(leaderboard([*baselines(), REPORTED])).splitlines()
    assert lines[:4] == [
        "| method | seeds | macro F1 (union) | remark |",
        "| --- | ---: | ---: | --- |",
        "| logistic | 3 | 0.900 ± n/a |  |",
        "| knn | 3 | 0.840 ± n/a |  |",
    ]
    assert lines[5] == "| *reported by others, not measured here* |  |  |  |"
    assert lines[6] == "| *scGPT fine-tuned †* | *-* | *0.703* | *10.1/x Table S1* |"
    assert lines[-1].startswith("- macro F1 (union) = macro_f1.union.v1: ")


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
