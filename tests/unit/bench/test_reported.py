"""The file of reported values: as shipped, and with every mistake it must refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from rows_by_hand import HEAD, baselines, row, runs

from cellray.bench.reported import REPORTED_FILE, read_reported, reported, reported_for
from cellray.bench.table import leaderboard
from cellray.core.errors import DataError

TABLE = """
version = 1

[[metric]]
id = "own.paper"
title = "own"
meaning = "theirs alone"

[[table]]
doi = "10.1038/s1"
table = "Table 1"
read = "the preprint of 2024-01-01"
transcription = "P"
task = "annotation"
dataset_id = "pancreas"
split_id = "theirs"
metrics = ["accuracy.v1", "own.paper"]
rows = [{ method = "A", family = "foundation_ft", values = [0.5, 0.25] }]
"""


def read(tmp_path: Path, text: str = TABLE) -> Path:
    path = tmp_path / "reported.toml"
    path.write_text(text)
    return path


def test_the_shipped_file_holds_the_annotation_table_digit_by_digit() -> None:
    """Against scGPT's Supplementary Table S1, doi:10.1038/s41592-024-02201-0."""
    columns = ("accuracy.v1", "macro_precision.union.v1", "macro_recall.union.v1", HEAD)
    wanted = {
        ("myeloid", "scGPT fine-tuned"): (0.642, 0.366, 0.347, 0.346),
        ("myeloid", "scGPT from scratch"): (0.606, 0.304, 0.339, 0.309),
        ("myeloid", "TOSICA"): (0.488, 0.316, 0.276, 0.275),
        ("myeloid", "scBERT"): (0.525, 0.331, 0.323, 0.298),
        ("multiple_sclerosis", "scGPT fine-tuned"): (0.856, 0.729, 0.720, 0.703),
        ("multiple_sclerosis", "scGPT from scratch"): (0.798, 0.660, 0.623, 0.600),
        ("multiple_sclerosis", "scBERT"): (0.785, 0.604, 0.624, 0.599),
        ("multiple_sclerosis", "TOSICA"): (0.758, 0.664, 0.585, 0.578),
        ("hpancreas", "scGPT fine-tuned"): (0.968, 0.735, 0.725, 0.718),
        ("hpancreas", "scGPT from scratch"): (0.936, 0.665, 0.668, 0.622),
        ("hpancreas", "TOSICA"): (0.960, 0.661, 0.681, 0.656),
        ("hpancreas", "scBERT"): (0.964, 0.699, 0.689, 0.685),
    }
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for r in reported().rows:
        if "Supplementary Table S1" in r.reported_source:
            found.setdefault((r.dataset_id, r.method), {})[r.metric_id] = r.value
    assert {key: tuple(by[c] for c in columns) for key, by in found.items()} == wanted


def test_every_shipped_value_says_where_it_is_from_and_none_is_measured() -> None:
    for r in reported().rows:
        assert r.provenance == "reported"
        assert r.reported_source.startswith("10.")
        assert "read: " in r.reported_source
        assert r.seed is None
        assert not r.is_synthetic


def test_the_rerun_has_its_half_widths() -> None:
    rows = reported_for("annotation", "multiple_sclerosis")
    one = next(r for r in rows if r.method == "L1 logistic regression" and r.metric_id == HEAD)
    assert (one.value, one.reported_spread) == (0.642, 0.0002)
    assert one.reported_spread_kind == "ci95_half_width"
    assert one.remarks == ("mean of 10 runs",)


def test_totals_of_the_integration_table_are_sixty_forty() -> None:
    """Each printed Overall is 0.6 AvgBIO + 0.4 AvgBATCH of what is printed beside it."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for r in reported().rows:
        if r.task == "integration" and r.value is not None:
            found.setdefault((r.dataset_id, r.method), {})[r.metric_id.split(".")[0]] = r.value
    assert len(found) == 15
    for by in found.values():
        total = 0.6 * by["avg_bio"] + 0.4 * by["avg_batch"]
        assert by["overall"] == pytest.approx(total, abs=0.0011)


def test_macro_f1_lies_between_its_parts_bounds() -> None:
    """No macro-F1 above the larger of macro precision and recall: a slip of columns would show."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in reported().rows:
        key = (r.dataset_id, r.method, r.reported_source)
        found.setdefault(key, {})[r.metric_id] = r.value or 0.0
    for by in found.values():
        if "macro_precision.union.v1" in by:
            most = max(by["macro_precision.union.v1"], by["macro_recall.union.v1"])
            assert by[HEAD] <= most
            assert by[HEAD] <= by["accuracy.v1"]


def test_no_reported_value_enters_what_was_measured() -> None:
    rows = [
        row(r.method, r.value, r.seed, dataset_id="myeloid", split_id="scgpt_v1")
        for r in [*baselines(), *runs("scgpt", [0.3, 0.31])]
    ]
    alone = leaderboard(rows)
    both = leaderboard([*rows, *reported_for("annotation", "myeloid")])
    measured = both[both["provenance"] == "measured"]
    columns = [c for c in alone.columns if c != "gap"]
    assert measured[columns].reset_index(drop=True).equals(alone[columns])
    others = both[both["provenance"] == "reported"]
    assert len(others) == 8
    assert others[["rank", "delta", "delta.p", f"{HEAD}.scaled"]].isna().all(axis=None)
    assert not others[f"{HEAD}.best"].any()
    assert both["provenance"].tolist() == sorted(both["provenance"])


def test_a_reproduction_gap_needs_the_same_method_and_split() -> None:
    fields = {"dataset_id": "myeloid", "split_id": "scgpt_v1"}
    mine = runs("scgpt_fine_tuned", [0.34, 0.36], method_family="foundation_ft", **fields)
    base = [row(r.method, r.value, r.seed, **fields) for r in baselines()]
    board = leaderboard(
        [*base, *mine, *reported_for("annotation", "myeloid")], own_controls=False
    ).set_index("method")
    assert board.loc["scGPT fine-tuned", "gap"] == pytest.approx(0.35 - 0.346)
    assert board["gap"].notna().sum() == 1
    odd = [row(r.method, r.value, r.seed, dataset_id="myeloid", split_id="mine") for r in base]
    board = leaderboard([*odd, *reported_for("annotation", "myeloid")]).set_index("method")
    assert board["gap"].isna().all()
    assert board.loc["TOSICA", "note"] == "another split: scgpt_v1"


def test_synthetic_data_have_no_reported_values() -> None:
    assert reported_for("annotation", "synthetic/atlas") == []
    assert {r.dataset_id for r in reported_for("annotation", "myeloid")} == {"myeloid"}


def test_a_file_is_read(tmp_path: Path) -> None:
    found = read_reported(read(tmp_path))
    assert [(r.metric_id, r.value) for r in found.rows] == [
        ("accuracy.v1", 0.5),
        ("own.paper", 0.25),
    ]
    assert found.metrics["own.paper"].title == "own"
    assert REPORTED_FILE.is_file()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'transcription = "P"',
            'transcription = "S"',
            "transcription = 'S'; only what was read in",
        ),
        ("10.1038/s1", "doi.org/10.1038/s1", "doi = 'doi.org/10.1038/s1' is none"),
        ('doi = "10.1038/s1"\n', "", "doi missing; every value says where it is from"),
        ('read = "the preprint of 2024-01-01"\n', "", "read missing"),
        ("0.25]", "25.0]", r"'A': 25.0 is not in 0..1"),
        ("0.25]", "-0.25]", r"'A': -0.25 is not in 0..1"),
        ("[0.5, 0.25]", "[0.5]", "'A': 1 values and 0 spreads for 2 metrics"),
        (
            '"accuracy.v1"',
            '"acuracy.v1"',
            "no metric is called 'acuracy.v1'. Did you mean 'accurac",
        ),
        ('id = "own.paper"', 'id = "accuracy.v1"', "the metric 'accuracy.v1' is defined already"),
        ('meaning = "theirs alone"\n', "", "has the keys id, title and meaning"),
        ('task = "annotation"', 'task = "annotation"\ncolour = 1', "unknown keys colour"),
        (
            'split_id = "theirs"',
            'split_id = "theirs"\nspread = "se"',
            "spread = 'se' is none of sd",
        ),
        ('"foundation_ft"', '"magic"', "'A': family is none of foundation_ft"),
        ('method = "A", ', "", "it needs method, family and values"),
        ('"pancreas"', '"synthetic/p"', "nobody reported values of synthetic data"),
        ("version = 1", "version =", "reported.toml: "),
        (
            "}]",
            '}, { method = "A", family = "foundation_ft", values = [0.5, 0.2] }]',
            "twice from 10",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(DataError, match=message):
        read_reported(read(tmp_path, TABLE.replace(old, new)))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no reported value; it needs"):
        read_reported(read(tmp_path, "version = 1\n"))
