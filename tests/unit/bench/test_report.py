"""The HTML page stands alone and says what the table says; the confusion picture is drawn."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from rows_by_hand import baselines, row, runs

from cellray.bench.report import Board, page, plot_confusion
from cellray.bench.reported import reported
from cellray.bench.table import failed_rows, leaderboard
from cellray.core.errors import DataError


class Page(HTMLParser):
    """Collects table rows and checks that tags close in order."""

    void = {"meta", "img", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def make_page(folder: Path) -> tuple[str, Path]:
    picture = plot_confusion(["a", "b", "b"], ["a", "b", "a"], path=folder / "confusion.png")
    rows = [*baselines(), *runs("sc<gpt>", [0.90, 0.92, 0.97])]
    rows += failed_rows(row("dead", None, 0, status="skipped", metric_id=""), "worker & died")
    reported = row("R", 0.7, None, provenance="reported", reported_source="10.1/x")
    only = Board(
        leaderboard([*rows, reported]),
        "",
        facts={"split": "donor human3", "cells": 914},
        pictures={"Confusion": picture},
        warnings=["split by cell"],
    )
    written = page(folder / "report.html", [only], title="Annotation <pancreas>")
    return written.read_text(encoding="utf-8"), picture


def test_page_says_what_the_table_says(tmp_path: Path) -> None:
    text, _ = make_page(tmp_path)
    found = Page(text)
    assert found.open == []
    heads = [place for place, line in enumerate(found.rows) if line[0] == "method"]
    assert found.rows[heads[0]] == ["method", "kind", "seeds", "macro F1 (union)"]
    scores = {
        line[0]: [c.replace("\u2007", "") for c in line[1:]] for line in found.rows[: heads[1]]
    }
    assert scores["sc<gpt>"] == ["from scratch", "3", "0.93± 0.04"]
    assert scores["knn"] == ["baseline", "3", "0.840± n/a"]
    assert scores["deadfailed: worker & died"] == ["from scratch", "0 of 1", "failed"]
    assert scores["R †"] == ["from scratch", "-", "0.700"]
    evidence = {line[0]: line[1:] for line in found.rows[heads[1] :]}
    assert evidence["sc<gpt>"][0] == "[0.84, 1.02]"
    assert "R †" not in evidence
    assert 'title="95 % interval 0.8404 to 1.0196"' in text
    assert "† R: 10.1/x" in text
    assert "Annotation &lt;pancreas&gt;" in text
    assert '<p class="warning">split by cell</p>' in text
    assert "<dt>cells</dt><dd>914</dd>" in text
    assert "<b>0.93</b>" in text.replace("\u2007", "")


def test_a_page_of_two_tables_begins_with_the_median_rank(tmp_path: Path) -> None:
    boards = []
    for name, low in (("one", 0.1), ("two", 0.0)):
        rows = [replace(r, dataset_id=name) for r in [*baselines(), *runs("m", [0.95 - low])]]
        boards.append(Board(leaderboard(rows), f"annotation: {name}", warnings=[f"of {name}"]))
    text = page(tmp_path / "p.html", boards, title="both").read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    assert found.links == ["#t0", "#t1"]
    assert found.rows[0] == ["method", "median rank", "data sets", "one", "rank", "two", "rank"]
    assert found.rows[1][:3] == ["logistic", "1.5", "2 of 2"]
    assert text.index("median rank") < text.index("of one") < text.index("of two")


def test_runs_are_named_and_linked_where_they_have_a_page(tmp_path: Path) -> None:
    rows = [*baselines(), row("m", 0.9, 0, run_id="aaa"), row("m", 0.8, 1, run_id="bbb")]
    board = Board(leaderboard(rows), "t", links={"aaa": "http://h/#/experiments/1/runs/aaa"})
    text = page(tmp_path / "p.html", [board], title="t").read_text(encoding="utf-8")
    assert '<a href="http://h/#/experiments/1/runs/aaa"><code>aaa</code></a>' in text
    assert " <code>bbb</code>" in text


def test_synthetic_data_have_a_banner_and_no_reported_block(tmp_path: Path) -> None:
    rows = [replace(r, dataset_id="synthetic/x") for r in baselines()]
    board = Board(leaderboard(rows), "t")
    others = reported().rows
    text = page(tmp_path / "p.html", [board], title="t", reference=others).read_text("utf-8")
    assert '<p class="banner">synthetic data: it shows that the code works' in text
    assert "Reported by others" not in text
    real = Board(leaderboard(baselines()), "t")
    text = page(tmp_path / "q.html", [real], title="t", reference=others).read_text("utf-8")
    assert "banner" not in text.partition("</style>")[2]
    folded = text[text.index("Reported by others on other data sets") :]
    assert "scGPT from scratch †" in folded
    assert "10.1038/s41592-024-02201-0, Supplementary Table S1" in folded
    assert "<b>" not in folded


def test_a_page_needs_a_table_and_pictures_that_are_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no leaderboard to make a page of"):
        page(tmp_path / "p.html", [], title="t")
    fake = tmp_path / "x.png"
    fake.write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"x.png' is no PNG picture"):
        page(
            tmp_path / "p.html",
            [Board(leaderboard(baselines()), "t", pictures={"x": fake})],
            title="t",
        )


def test_page_needs_no_other_file(tmp_path: Path) -> None:
    text, picture = make_page(tmp_path)
    found = Page(text)
    assert len(found.links) == 1
    assert found.links[0].startswith("data:image/png;base64,")
    assert base64.b64decode(found.links[0].partition(",")[2]) == picture.read_bytes()
    assert not re.search(r"https?://|<script|@import", text)


def test_a_missing_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture at '.*gone.png' for 'UMAP'"):
        page(
            tmp_path / "report.html",
            [Board(leaderboard(baselines()), "", pictures={"UMAP": tmp_path / "gone.png"})],
            title="x",
        )


def test_confusion_picture_grows_with_the_classes(tmp_path: Path) -> None:
    few = imread(plot_confusion(["a", "b"], ["a", "a"], path=tmp_path / "few.png"))
    names = [f"class{i}" for i in range(20)]
    many = imread(plot_confusion(names, names, path=tmp_path / "many.png", title="t"))
    assert many.shape[0] > few.shape[0] > 700
    assert many[:, :, :3].min() < 0.2  # the diagonal is drawn dark


def test_too_many_classes_for_a_confusion_picture(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(61)]
    with pytest.raises(DataError, match="a confusion matrix of 61 classes cannot be read"):
        plot_confusion(names, names, path=tmp_path / "x.png")
