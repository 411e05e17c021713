"""Refusal: the curve against a loop over thresholds, AUROC against scikit-learn, the threshold."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from cellray.core.errors import DataError
from cellray.metrics.base import metric
from cellray.metrics.refusal import (
    METRICS,
    accuracy_at,
    choose_threshold,
    coverage_curve,
    score_refusal,
    unknown_auroc,
)

CLASSES = ("a", "b", "c", "d")


def made(num_cells=300, seed=0, digits=2):
    """Truth with a class that is never predicted, and confidences with many ties."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([*CLASSES, "new"], size=num_cells)
    guess = np.where(rng.random(num_cells) < 0.7, truth, rng.choice(CLASSES, size=num_cells))
    guess[guess == "new"] = "a"
    confidence = np.round(np.clip(rng.normal(0.5 + 0.2 * (guess == truth), 0.2), 0, 1), digits)
    return truth, guess, confidence


def test_every_point_of_the_curve_against_a_loop() -> None:
    truth, guess, confidence = made()
    curve = coverage_curve(truth, guess, confidence)
    levels = np.unique(confidence)[::-1]
    assert len(levels) < 120
    np.testing.assert_array_equal(curve.thresholds, levels)
    risk = 0.0
    before = 0
    for at, level in enumerate(levels):
        kept = confidence >= level
        assert curve.kept[at] == kept.sum()
        assert curve.coverage[at] == pytest.approx(kept.mean(), abs=1e-12)
        accuracy = accuracy_score(truth[kept], guess[kept])
        assert curve.accuracy[at] == pytest.approx(accuracy, abs=1e-12)
        f1 = f1_score(truth[kept], guess[kept], average="macro", zero_division=0)
        assert curve.macro_f1[at] == pytest.approx(f1, abs=1e-12)
        risk += (kept.sum() - before) / len(truth) * (1 - accuracy)
        before = int(kept.sum())
    assert curve.aurc == pytest.approx(risk, abs=1e-12)


def test_aurc_without_ties_is_the_mean_of_the_running_error_rate() -> None:
    truth, guess, _ = made(seed=3)
    confidence = np.random.default_rng(4).permutation(len(truth)) / 1000.0
    wrong = (truth != guess)[np.argsort(-confidence)]
    running = np.cumsum(wrong) / np.arange(1, len(wrong) + 1)
    assert coverage_curve(truth, guess, confidence).aurc == pytest.approx(running.mean(), abs=1e-12)


def test_ties_are_one_step_whatever_order_they_come_in() -> None:
    truth, guess, confidence = made(seed=1, digits=1)
    shuffled = np.random.default_rng(5).permutation(len(truth))
    one = coverage_curve(truth, guess, confidence)
    other = coverage_curve(truth[shuffled], guess[shuffled], confidence[shuffled])
    np.testing.assert_array_equal(one.accuracy, other.accuracy)
    np.testing.assert_array_equal(one.macro_f1, other.macro_f1)
    assert one.aurc == other.aurc
    flat = coverage_curve(truth, guess, np.full(len(truth), 0.5))
    assert len(flat.kept) == 1
    assert flat.aurc == pytest.approx(1 - np.mean(truth == guess), abs=1e-12)


def test_the_better_the_confidence_the_smaller_the_area() -> None:
    truth, guess, confidence = made(seed=2)
    right = (truth == guess).astype(float)
    oracle = coverage_curve(truth, guess, right).aurc
    method = coverage_curve(truth, guess, confidence).aurc
    worst = coverage_curve(truth, guess, -right).aurc
    assert oracle < method < worst


def test_accuracy_at_a_coverage_takes_the_fewest_cells_that_reach_it() -> None:
    curve = coverage_curve(["a"] * 10, ["a"] * 4 + ["b"] * 6, [0.9] * 4 + [0.8] * 2 + [0.1] * 4)
    assert accuracy_at(curve, 0.3) == 1.0  # 40 %, the surest step
    assert accuracy_at(curve, 0.4) == 1.0
    assert accuracy_at(curve, 0.5) == pytest.approx(4 / 6)
    assert accuracy_at(curve, 0.95) == pytest.approx(0.4)
    assert accuracy_at(curve, 1.0) == pytest.approx(0.4)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_of_unknown_cells_against_scikit_learn(seed: int) -> None:
    truth, _, confidence = made(seed=seed, digits=1)
    unknown = truth == "new"
    want = roc_auc_score(unknown, -confidence)
    assert unknown_auroc(confidence, unknown) == pytest.approx(want, abs=1e-6)


def test_a_threshold_by_accuracy_keeps_the_most_cells() -> None:
    truth, guess, confidence = made(seed=7)
    correct = truth == guess
    cut = choose_threshold(confidence, correct, target_accuracy=0.8)
    kept = confidence >= cut
    assert correct[kept].mean() >= 0.8
    for lower in np.unique(confidence[confidence < cut]):
        assert correct[confidence >= lower].mean() < 0.8
    assert choose_threshold([0.2, 0.4], [True, True], target_accuracy=0.9) == 0.2


def test_a_threshold_by_coverage_keeps_just_enough_cells() -> None:
    _, _, confidence = made(seed=8)
    flags = np.ones(len(confidence), dtype=bool)
    for target in (0.5, 0.8, 0.95, 1.0):
        cut = choose_threshold(confidence, flags, target_coverage=target)
        assert np.mean(confidence >= cut) >= target
        assert np.mean(confidence > cut) < target
    assert choose_threshold(np.arange(10) / 10, np.ones(10, bool), target_coverage=0.9) == 0.1


def test_all_metrics_have_an_id_that_is_looked_up() -> None:
    truth, guess, confidence = made()
    found = score_refusal(truth, guess, confidence, train_classes=CLASSES, threshold=0.5)
    assert set(found) == set(METRICS)
    for name in found:
        assert metric(name).id == name
    kept = confidence >= 0.5
    assert found["accuracy_kept.v1"] == pytest.approx(np.mean((truth == guess)[kept]))
    assert found["coverage_kept.v1"] == pytest.approx(kept.mean())
    assert found["n_refused"] == (~kept).sum()
    known = truth != "new"
    less = score_refusal(
        truth[known], guess[known], confidence[known], train_classes=CLASSES, threshold=2.0
    )
    assert set(METRICS) - set(less) == {"unknown_auroc.v1", "accuracy_kept.v1"}
    assert less["coverage_kept.v1"] == 0.0


def test_a_hundred_thousand_cells_take_no_loop_over_cells() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 50, size=100_000).astype(str)
    started = time.perf_counter()
    curve = coverage_curve(truth, truth, rng.random(100_000))
    assert time.perf_counter() - started < 5
    assert len(curve.kept) == 100_000


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(DataError, match="2 true labels but 1 predictions; give one each"):
        coverage_curve(["a", "b"], ["a"], [0.1])
    with pytest.raises(DataError, match=r"shape \(1,\), but there are 2 cells; give one each"):
        coverage_curve(["a", "b"], ["a", "b"], [0.1])
    with pytest.raises(DataError, match="1 of 2 confidences are not finite"):
        coverage_curve(["a", "b"], ["a", "b"], [0.1, np.nan])
    with pytest.raises(DataError, match="no cell to score: the confidences are empty"):
        coverage_curve([], [], [])
    with pytest.raises(DataError, match="2 cells of unknown and 0 of known classes: an AUROC"):
        unknown_auroc([0.1, 0.2], [True, True])
    for targets in ({}, {"target_accuracy": 0.5, "target_coverage": 0.5}):
        with pytest.raises(DataError, match="either target_accuracy or target_coverage"):
            choose_threshold([0.1], [True], **targets)
    with pytest.raises(DataError, match=r"accuracy of 0.9 on the 2 .* surest are right at 0.500"):
        choose_threshold([0.9, 0.5], [False, True], target_accuracy=0.9)
