"""``cellray compare`` on real tracking stores and run directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rows_by_hand import HEAD, baselines, row, runs

from cellray.bench.children import ERROR_TAG, ROW_TAG, row_tag, rows_of_child
from cellray.bench.compare import compare, merged
from cellray.bench.facts import facts_of
from cellray.bench.table import ResultRow, failed_rows, row_from, scores_of
from cellray.cli import main
from cellray.core.errors import ConfigError, DataError, TrackingError
from cellray.train.tracking import Tracker


def results(dataset: str = "pancreas", **fields: object) -> list[ResultRow]:
    """Five baselines over one seed, a model over two and one that died."""
    rows = [r for r in baselines() if r.seed == 0] + runs("model", [0.92, 0.94])
    rows += runs("hvg", [0.42]) + runs("harmony", [0.86])
    rows += failed_rows(row("dead", 0.0), "worker died", status="oom")
    return [replace(r, dataset_id=dataset, split_id="donor", **fields) for r in rows]


def by_run(rows: Sequence[ResultRow]) -> dict[tuple[str, int | None], list[ResultRow]]:
    found: dict[tuple[str, int | None], list[ResultRow]] = {}
    for r in rows:
        found.setdefault((r.method, r.seed), []).append(r)
    return found


def log(
    uri: str,
    rows: Sequence[ResultRow],
    name: str,
    tmp_path: Path,
    experiment: str = "benchmark-annotation",
    **tags: str,
) -> Tracker:
    """A parent with a picture and a child for each (method, seed), as a benchmark logs them."""
    first = rows[0]
    known = {"task": first.task, "dataset": first.dataset_id, "split": first.split_id} | tags
    parent = Tracker.start(
        uri,
        experiment=experiment,
        name=name,
        tags={f"cellray.{key}": value for key, value in known.items()},
    )
    for (method, seed), own in by_run(rows).items():
        child = Tracker.start(
            uri,
            experiment=experiment,
            name=f"{method}-seed{seed}",
            parent=parent.run_id,
        )
        bad = own[0].status != "ok"
        status = own[0].status if bad else "skipped"
        template = replace(own[0], metric_id="", value=None, error="", status=status)
        child.tag(ROW_TAG, row_tag(template))
        if bad:
            child.tag(ERROR_TAG, own[0].error)
        else:
            child.metrics({**scores_of(own), "loss": 0.3})
    Figure(figsize=(1, 1)).savefig(tmp_path / "umap.png")
    (tmp_path / "pictures.json").write_text(json.dumps({"umap.png": f"cells of {name}"}))
    parent.artifact(tmp_path / "umap.png", "report")
    parent.artifact(tmp_path / "pictures.json", "report")
    return parent


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def test_a_tracked_benchmark_over_two_data_sets(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run directory leads to one parent; its sibling is found by the benchmark's name."""
    tags = {"benchmark": "bench", "warnings": json.dumps(["split by cell"])}
    parent = log(uri, results(), "bench", tmp_path, **tags)
    other = log(uri, results("other"), "bench", tmp_path, **tags)
    log(uri, results("stranger"), "else", tmp_path)
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "mlflow.json").write_text(json.dumps({"uri": uri, "run_id": parent.run_id}))
    assert main(["compare", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "stranger" not in said
    assert said.index("annotation: pancreas (donor)") < said.index("annotation: other (donor)")
    assert "warning: split by cell" in said
    assert "dead: oom: worker died" in said
    assert "annotation: all data sets" in said
    assert f"page: {folder / 'compare.html'}" in said
    assert "Downloading" not in said
    text = (folder / "compare.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2
    assert "<figcaption>cells of bench</figcaption>" in text
    for tracker in (parent, other):
        there = tracker.fetch("report", tmp_path, suffixes=(".html",))
        assert [path.name for path in there] == ["compare.html"]
        assert there[0].read_text(encoding="utf-8") == text


def test_an_experiment_and_a_run_by_id(uri: str, tmp_path: Path) -> None:
    first = log(uri, results(), "first", tmp_path, "two")
    log(uri, results("other"), "second", tmp_path, "two")
    told: list[str] = []
    page = compare(["two"], told.append, html=str(tmp_path / "a.html"), mlflow_uri=uri)
    assert {t for t in told if t.startswith("annotation: ") and "all" not in t} == {
        "annotation: pancreas (donor)",
        "annotation: other (donor)",
    }
    told.clear()
    page = compare(
        [f"runs:/{first.run_id}"], told.append, html=str(tmp_path / "b.html"), mlflow_uri=uri
    )
    assert [t for t in told if t.startswith("annotation: ")] == ["annotation: pancreas (donor)"]
    assert page == tmp_path / "b.html"


def test_the_newest_parent_of_an_experiment_counts(uri: str, tmp_path: Path) -> None:
    log(uri, results(), "old", tmp_path, "again")
    newer = [replace(r, value=0.95 if r.method == "model" else r.value) for r in results()]
    log(uri, newer, "new", tmp_path, "again")
    told: list[str] = []
    compare(["again"], told.append, html=str(tmp_path / "a.html"), mlflow_uri=uri)
    assert "0.950" in "\n".join(told)
    assert "model [" not in "\n".join(told)


def test_a_tag_says_all_and_stays_short_enough_for_mlflow() -> None:
    one = row("m", None, 3, status="skipped", metric_id="", gpu_hours=0.5, remarks=("slow",))
    assert row_from(json.loads(row_tag(one))) == one
    long = replace(one, params_json=json.dumps({"x": "y" * 9000}), config_sha256="aa")
    assert len(row_tag(long)) < 8000
    assert row_from(json.loads(row_tag(long))) == replace(one, config_sha256="aa")


def test_a_tag_that_was_cut_is_named(uri: str) -> None:
    child = Tracker.start(uri, experiment="cut", name="m")
    child.tag(ROW_TAG, row_tag(row("m", 0.5))[:40])
    with pytest.raises(DataError, match=f"run '{child.run_id}': its tag cellray.row is no whole"):
        rows_of_child(child.run())


def test_how_a_run_died_is_kept(uri: str) -> None:
    child = Tracker.start(uri, experiment="died", name="m")
    child.tag(ROW_TAG, row_tag(row("m", None, 0, status="skipped", metric_id="")))
    child.tag(ERROR_TAG, "lost")
    assert [(r.status, r.error) for r in rows_of_child(child.run())] == [("failed", "lost")]
    child.tag(ROW_TAG, row_tag(row("m", None, 0, status="timeout", metric_id="")))
    assert rows_of_child(child.run())[0].status == "timeout"


def keep(folder: Path, rows: Sequence[ResultRow]) -> Path:
    """A run directory without tracking."""
    (folder / "results").mkdir(parents=True)
    for (method, seed), own in by_run(rows).items():
        kind = "json" if own[0].status == "ok" else "failed"
        path = folder / "results" / f"{own[0].dataset_id}-{method}-seed{seed}.{kind}"
        path.write_text(json.dumps([asdict(r) for r in own]))
    return folder


def test_a_run_directory_without_tracking(tmp_path: Path) -> None:
    folder = keep(tmp_path / "bench", [*results(), *results("other")])
    Figure(figsize=(1, 1)).savefig(folder / "confusion.png")
    told: list[str] = []
    page = compare([str(folder)], told.append)
    assert page == folder / "compare.html"
    assert "annotation: all data sets" in told
    text = page.read_text(encoding="utf-8")
    assert "<figcaption>confusion</figcaption>" in text
    assert "failed" in text


def test_two_benchmarks_on_one_split_stand_in_one_table(tmp_path: Path) -> None:
    first = keep(tmp_path / "first", results(config_sha256="aa"))
    second = keep(tmp_path / "second", [
        replace(r, config_sha256="bb" if r.method == "model" else "aa") for r in results()
    ])  # fmt: skip
    told: list[str] = []
    compare([str(first), str(second)], told.append, html=str(tmp_path / "x.html"))
    text = "\n".join(told)
    assert text.count("annotation: pancreas (donor)") == 1
    lines = text[: text.index("95 % over")].splitlines()
    names = [line.split("  ")[0] for line in lines[3:]]
    assert names.count("model") == 1
    assert names.count("model [second]") == 1
    assert names.count("logistic") == 1


def test_merging_keeps_controls_with_their_methods() -> None:
    def made(config: str) -> list[ResultRow]:
        ft = runs("m", [0.9], method_family="foundation_ft", config_sha256=config)
        own = [
            runs(f"m_{f}", [0.5], method_family=f, base_method="m", config_sha256="same")
            for f in ("from_scratch", "random_init")
        ]
        return [*ft, *own[0], *own[1]]

    rows = merged([("one", made("aa")), ("two", made("bb"))])
    assert [r.method for r in rows] == ["m", "m_from_scratch", "m_random_init", "m [two]"]
    assert {r.base_method for r in rows if r.method.startswith("m_")} == {"m, m [two]"}


def test_merging_adds_the_seeds_of_the_same_configuration() -> None:
    one = runs("m", [0.9, 0.8], params_json=json.dumps({"seed": 0, "lr": 1}))
    two = [replace(r, params_json=json.dumps({"seed": 1, "lr": 1}), seed=s)
           for r, s in zip(one, (1, 2), strict=True)]  # fmt: skip
    rows = merged([("one", one), ("two", two)])
    assert [(r.method, r.seed, r.value) for r in rows] == [
        ("m", 0, 0.9),
        ("m", 1, 0.8),
        ("m", 2, 0.8),
    ]


def test_metrics_can_be_chosen_and_unknown_ones_are_explained(tmp_path: Path) -> None:
    rows = results()
    rows += [replace(r, metric_id="n_unseen_cells", value=7.0, higher_is_better=None)
             for r in rows if r.status == "ok"]  # fmt: skip
    folder = keep(tmp_path / "bench", rows)
    told: list[str] = []
    compare([str(folder)], told.append, metrics=["n_unseen_cells"])
    assert "unseen cells" in "\n".join(told)
    with pytest.raises(DataError, match="no table has the metric 'macro_f1.v1'. Did you mean"):
        compare([str(folder)], told.append, metrics=["macro_f1.v1"])


def test_sources_that_are_none(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(source: str, where: str = "") -> None:
        compare([source], print, html=str(tmp_path / "x.html"), mlflow_uri=where)

    with pytest.raises(ConfigError, match="'gone' is no folder; for a run .* --mlflow-uri sqlite"):
        run("gone")
    with pytest.raises(DataError, match="holds no results of a benchmark: neither mlflow.json"):
        run(str(tmp_path))
    empty = Tracker.start(uri, experiment="training", name="x")
    with pytest.raises(DataError, match=f"run '{empty.run_id}' holds no results of a benchmark"):
        run(f"runs:/{empty.run_id}", uri)
    with pytest.raises(DataError, match="experiment 'training' holds no results"):
        run("training", uri)
    with pytest.raises(TrackingError, match="no experiment 'trainin'. Did you mean 'training'"):
        run("trainin", uri)
    with pytest.raises(TrackingError, match="has no run 'abc'"):
        run("runs:/abc", uri)
    assert main(["compare", str(tmp_path)]) == 1
    assert "holds no results of a benchmark" in capsys.readouterr().err


def test_the_facts_of_a_table() -> None:
    fields = {
        "dataset_sha256": "d1", "split_id": "donor", "split_unit": "donor_id", "n_cells": 3301,
        "n_genes": 20125, "n_train": 2000, "n_val": 301, "n_test": 1000, "n_classes_train": 14,
        "n_classes_test": 13, "n_classes_unseen": 1, "git_commit": "abc", "git_dirty": True,
    }  # fmt: skip
    mapped = {"genes_in": 3000, "genes_matched": 2790, "umi_fraction_matched": 0.971}
    facts = facts_of([row("knn", 0.5, **fields), row("m", 0.5, **(fields | mapped))])
    assert facts == {
        "task": "annotation",
        "data": "pancreas (3,301 cells, 20,125 genes)",
        "data SHA-256": "d1",
        "split": "donor, held out by donor_id",
        "cells": "2,000 to train on, 301 to choose by, 1,000 to test on",
        "classes": "14 in training, 13 in the test set, 1 of these unseen in training",
        "genes matched": "m: 2,790 of 3,000 with 97.1 % of all counts",
        "code": "abc with changes",
    }
    assert facts_of([row("knn", 0.5)]) == {"task": "annotation", "data": "pancreas"}


def test_reported_values_stand_beside_the_real_data_they_are_of(tmp_path: Path) -> None:
    folder = keep(tmp_path / "bench", results("myeloid"))
    told: list[str] = []
    compare([str(folder)], told.append)
    text = "\n".join(told)
    assert "-- reported by others, not measured here --" in text
    assert "TOSICA †" in text
    assert HEAD.startswith("macro_f1")


def test_a_failed_seed_does_not_make_another_method_of_it() -> None:
    made = {"config_sha256": "aa", "checkpoint_sha256": "cc"}
    one = runs("m", [0.5, 0.6], **made)
    bad = failed_rows(row("m", None, 2, status="skipped", metric_id=""), "died")
    rows = merged([("one", one), ("two", [*bad, row("m", 0.7, 3, **made)])])
    assert {(r.method, r.seed, r.status) for r in rows} == {
        ("m", 0, "ok"), ("m", 1, "ok"), ("m", 2, "failed"), ("m", 3, "ok"),
    }  # fmt: skip
    again = merged([("one", bad), ("two", [row("m", 0.8, 2, **made)])])
    assert [(r.seed, r.status, r.value) for r in again] == [(2, "ok", 0.8)]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = keep(tmp_path / "bench", results())
    file = next((folder / "results").glob("*.json"))
    file.write_text(file.read_text()[:50])
    with pytest.raises(DataError, match=f"'{file}' is damaged, no result of a benchmark"):
        compare([str(folder)], print)
    for text in ("{", "{}", "[]", "3", '{"uri": 1}', "[" * 200_000):
        (folder / "mlflow.json").write_text(text)
        with pytest.raises(DataError, match="mlflow.json' is damaged, no note of an MLflow run"):
            compare([str(folder)], print)
