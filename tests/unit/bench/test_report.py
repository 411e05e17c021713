"""The HTML page stands alone and says what the table says; the confusion picture is drawn."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from rows_by_hand import baselines, row, runs

from cellray.bench.report import plot_confusion, write_report
from cellray.bench.table import failed_rows, leaderboard
from cellray.core.errors import DataError


class Page(HTMLParser):
    """Collects table rows and checks that tags close in order."""

    void = {"meta", "img", "br", "!doctype"}

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
    page = write_report(
        folder / "report.html",
        title="Annotation <pancreas>",
        board=leaderboard([*rows, reported]),
        facts={"split": "donor human3", "cells": 914},
        pictures={"Confusion": picture},
        warnings=["split by cell"],
    )
    return page.read_text(encoding="utf-8"), picture


def test_page_says_what_the_table_says(tmp_path: Path) -> None:
    text, _ = make_page(tmp_path)
    page = Page(text)
    assert page.open == []
    rows = {line[0]: line[1:] for line in page.rows}
    assert rows["method"] == ["seeds", "macro F1 (union)", "remark"]
    assert rows["sc<gpt>"] == ["3", "0.930 ± 0.036", ""]
    assert rows["knn"] == ["3", "0.840 ± n/a", ""]
    assert rows["dead"] == ["0", "failed", "worker & died"]
    assert rows["R †"] == ["-", "0.700", "10.1/x"]
    assert 'title="95 % interval 0.840 to 1.020"' in text
    assert "Annotation &lt;pancreas&gt;" in text
    assert '<p class="warning">split by cell</p>' in text
    assert "<dt>cells</dt><dd>914</dd>" in text


def test_page_needs_no_other_file(tmp_path: Path) -> None:
    text, picture = make_page(tmp_path)
    page = Page(text)
    assert len(page.links) == 1
    assert page.links[0].startswith("data:image/png;base64,")
    assert base64.b64decode(page.links[0].partition(",")[2]) == picture.read_bytes()
    assert not re.search(r"https?://|<script|@import", text)


def test_a_missing_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no picture at '.*gone.png' for 'UMAP'"):
        write_report(
            tmp_path / "report.html",
            title="x",
            board=leaderboard(baselines()),
            facts={},
            pictures={"UMAP": tmp_path / "gone.png"},
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
