"""Answers on test cells as files and pictures, and the threshold that a model keeps."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from cellray.core.errors import ConfigError
from cellray.core.section import build_section
from cellray.infer.pictures import plot_coverage
from cellray.metrics.refusal import coverage_curve
from cellray.tasks._refusal import RefuseSection
from cellray.tasks.annotation import AnnotationConfig
from cellray.train.answers import Answers, refuse_section, with_threshold, write_answers
from cellray.train.checkpoint import Manifest


def made(num_cells=200, classes=4):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, size=num_cells).astype(str).astype(object)
    right = rng.random(num_cells) < 0.8
    guess = np.where(right, truth, rng.integers(0, classes, size=num_cells).astype(str))
    confidence = np.clip(rng.normal(0.6 + 0.2 * right, 0.15), 0, 1).astype(np.float32)
    return Answers(np.arange(num_cells), truth, guess.astype(object), confidence)


@dataclass(frozen=True)
class Kept:
    """What of a loaded model the threshold is written to."""

    manifest: Manifest
    path: str


@pytest.fixture
def model(tmp_path):
    return Kept(Manifest("scgpt", {}, {}, {}, "v", "d"), str(tmp_path))


def test_predictions_confusion_and_curve_are_written(tmp_path):
    answers = made()
    said: list[str] = []
    files = write_answers(tmp_path / "t", answers, threshold=0.6, title="x", say=said.append)
    assert [f.name for f in files] == ["predictions.csv", "confusion.png", "coverage.png"]
    table = pd.read_csv(files[0], dtype={"truth": str, "predicted": str})
    assert table.columns.tolist() == ["cell", "truth", "predicted", "confidence", "refused"]
    assert table["truth"].tolist() == answers.truth.tolist()
    assert table["predicted"].tolist() == answers.predicted.tolist()
    np.testing.assert_allclose(table["confidence"], answers.confidence, rtol=1e-6)
    assert table["refused"].tolist() == (answers.confidence < 0.6).tolist()
    for file in files[1:]:
        pixels = image.imread(file)
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.01
    assert not said
    assert not list((tmp_path / "t").glob("*.partial"))


def test_a_confusion_of_very_many_classes_is_said_not_drawn(tmp_path):
    said: list[str] = []
    files = write_answers(
        tmp_path, made(2000, classes=70), threshold=0.0, title="", say=said.append
    )
    assert [f.name for f in files] == ["predictions.csv", "coverage.png"]
    assert said == ["no picture of the confusion matrix: 70 classes cannot be read"]


def test_the_picture_marks_the_threshold_only_if_it_refuses_some_cells(tmp_path):
    answers = made()
    curve = coverage_curve(answers.truth, answers.predicted, answers.confidence)
    shown = {
        name: image.imread(plot_coverage(curve, path=tmp_path / f"{name}.png", threshold=cut))
        for name, cut in (("none", None), ("zero", 0.0), ("half", 0.6), ("all", 2.0))
    }
    assert np.array_equal(shown["none"], shown["zero"])
    assert np.array_equal(shown["none"], shown["all"])
    assert not np.array_equal(shown["none"], shown["half"])


def test_the_threshold_is_kept_in_the_manifest(model, tmp_path):
    answers = made()
    correct = answers.truth == answers.predicted

    def validation():
        return answers.confidence, correct

    said: list[str] = []
    same = with_threshold(model, RefuseSection(), validation, said.append)
    assert same is model
    assert not (tmp_path / "manifest.json").exists()
    for section, kept in (
        (RefuseSection(target_coverage=0.7), lambda cut: np.mean(answers.confidence >= cut) >= 0.7),
        (
            RefuseSection(target_accuracy=0.9),
            lambda cut: correct[answers.confidence >= cut].mean() >= 0.9,
        ),
        (RefuseSection(below=0.25), lambda cut: cut == 0.25),
    ):
        changed = with_threshold(model, section, validation, said.append)
        cut = json.loads((tmp_path / "manifest.json").read_text())["refuse_below"]
        assert kept(cut)
        assert changed.manifest.refuse_below == cut
    # no longer asked for: back to the family's own
    other = replace(model, manifest=replace(model.manifest, refuse_below=0.25))
    assert with_threshold(other, RefuseSection(), validation, said.append).manifest == (
        model.manifest
    )
    assert json.loads((tmp_path / "manifest.json").read_text())["refuse_below"] is None
    assert not said


def test_a_target_out_of_reach_is_said_and_the_familys_cutoff_stays(model):
    said: list[str] = []
    wrong = np.zeros(4, dtype=bool)
    found = with_threshold(
        model,
        RefuseSection(target_accuracy=0.9),
        lambda: (np.linspace(0.1, 0.9, 4, dtype=np.float32), wrong),
        said.append,
    )
    assert found is model
    assert "task.refuse: no threshold reaches an accuracy of 0.9" in said[0]


def test_one_way_of_refusing_at_most():
    split = {"test_fraction": 0.2}
    raw = {"refuse": {"below": 0.5, "target_accuracy": 0.9}, "split": split}
    with pytest.raises(ConfigError, match="one of .* not target_accuracy and below"):
        build_section(AnnotationConfig, raw)
    with pytest.raises(ConfigError, match=r"refuse.target_coverage = 1.5 is not allowed"):
        build_section(AnnotationConfig, {"refuse": {"target_coverage": 1.5}, "split": split})
    config = build_section(AnnotationConfig, {"refuse": {"below": 0.5}, "split": split})
    assert refuse_section(config).wanted == {"below": 0.5}
    assert refuse_section(SimpleNamespace()).wanted == {}
