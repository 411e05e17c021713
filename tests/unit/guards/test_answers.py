"""Answers that cannot be scored, that are constant, or that two methods share."""

from __future__ import annotations

import numpy as np
import pytest

from cellray.core.errors import ConfigError, DataError
from cellray.data.mixture import MixturePlan
from cellray.data.plan import EpochPlan
from cellray.guards.answers import (
    align_answers,
    check_predictions,
    identical_methods,
    near_constant,
)
from cellray.guards.training import did_it_train, effective_batch
from cellray.metrics.classification import confusion_matrix

LABELS = np.array(["a", "b", "a", "b"], dtype=object)
GOOD = np.ones(4)
VECTORS = np.arange(8.0).reshape(4, 2)


def test_whole_answers_pass():
    check_predictions(LABELS, GOOD, None, 4)
    check_predictions(LABELS, None, None, 4)
    check_predictions(None, None, VECTORS, 4)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((None, None, None), "neither labels nor an embedding"),
        ((LABELS[:3], None, None), "3 labels were predicted for 4 cells"),
        ((["a", None, "b", float("nan")], None, None), "2 of 4 predicted labels are missing"),
        ((LABELS, [1.0, np.nan, 1.0, 1.0], None), "confidence of 1 of 4 cells is NaN or infinite"),
        ((LABELS, GOOD[:2], None), "the confidence has 2 rows for 4 cells"),
        (
            (None, None, np.where(VECTORS == 3, np.inf, VECTORS)),
            r"embedding of 1 of 4 cells is NaN or infinite \(the first is cell 1\).*not 0",
        ),
        ((None, None, VECTORS[:3]), "the embedding has 3 rows for 4 cells"),
    ],
)
def test_broken_answers_are_refused(answer, told):
    with pytest.raises(DataError, match=told):
        check_predictions(*answer, 4)


def test_cells_left_out_count_as_wrong():
    expected = np.array([5, 7, 9, 11])
    filled, told = align_answers(expected, np.array([9, 5]), ["b", "a"], fill="Unassigned")
    assert filled.tolist() == ["a", "Unassigned", "b", "Unassigned"]
    assert told == ["2 of 4 test cells were not answered: counted as wrong"]
    matrix, _ = confusion_matrix(["a", "a", "b", "b"], filled)
    assert np.trace(matrix) / matrix.sum() == 0.5
    same, told = align_answers(expected, expected[::-1], ["d", "c", "b", "a"], fill="x")
    assert same.tolist() == ["a", "b", "c", "d"]
    assert told == []


def test_answers_about_other_cells_are_refused():
    with pytest.raises(DataError, match=r"1 cells that are not in the test set \(joinids 4\)"):
        align_answers(np.array([5, 7]), np.array([5, 4]), ["a", "b"], fill="x")
    with pytest.raises(DataError, match="answered for a cell more than once"):
        align_answers(np.array([5, 7]), np.array([5, 5]), ["a", "b"], fill="x")


def test_one_answer_for_all_is_flagged():
    told = near_constant(["a"] * 199 + ["b"], ["a"] * 100 + ["b"] * 100)
    assert told == "near-constant: 99.5% of the cells are called 'a' (50% are)"
    assert near_constant(["a"] * 5) == "near-constant: 100.0% of the cells are called 'a'"
    assert near_constant(["a"] * 190 + ["b"] * 10, ["b"] * 200) == ""
    assert near_constant(["a"] * 200, ["a"] * 198 + ["b"] * 2) == ""  # and right to do so


def test_one_point_for_all_is_flagged():
    assert near_constant(np.full((5, 3), 7.0)) == "near-constant: all cells have the same embedding"
    assert near_constant(np.zeros((5, 3))) != ""
    assert near_constant(VECTORS) == ""


def test_methods_with_the_same_answers_are_found():
    rng = np.random.default_rng(0)
    first = rng.choice(["a", "b", "c"], 5000)
    second = first.copy()
    second[:4] = "other"
    third = np.where(np.arange(5000) < 50, "other", first)
    found = identical_methods({"one": first, "two": second, "three": third})
    assert found == [("one", "two", 1 - 4 / 5000)]
    assert identical_methods({}) == []
    with pytest.raises(DataError, match="different numbers of cells: {'one': 2, 'two': 1}"):
        identical_methods({"one": ["a", "b"], "two": ["a"]})


def test_a_model_that_learnt_nothing_is_flagged():
    assert did_it_train(0.9, 0.4) == ""
    told = did_it_train(0.41, 0.4)
    assert told.startswith("did not train: right on 41.0% of its own training cells, where always")
    assert did_it_train(0.43, 0.4) == ""
    assert did_it_train(0.43, 0.4, num_cells=100) != ""  # within two standard errors of 0.049
    assert did_it_train(0.51, 0.4, num_cells=100) == ""
    assert did_it_train(0.1, 0.4).startswith("did not train")


def test_where_one_class_has_almost_all_cells_there_is_less_room():
    assert did_it_train(1.0, 0.995) == ""
    assert did_it_train(0.995, 0.995) != ""
    assert did_it_train(1.0, 0.98, num_cells=50) == ""


def test_losses_say_it_too():
    assert did_it_train(0.9, 0.4, losses=[1.1, 0.3]) == ""
    assert did_it_train(0.9, 0.4, losses=[1.1, 1.095]).endswith("the loss went from 1.1 to 1.095")
    assert "NaN or infinite" in did_it_train(0.9, 0.4, losses=[1.1, float("nan")])
    with pytest.raises(DataError, match="train_accuracy = 90 is not between 0 and 1"):
        did_it_train(90, 0.4)


def plan(cells_global: int, lanes: int) -> EpochPlan:
    return EpochPlan(
        joinids=np.arange(960), lengths=None, seed=0, cells_global=cells_global, lanes=lanes,
        run_cells=4, window_batches=2,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("lanes", [8, 24])
def test_the_effective_batch_does_not_depend_on_workers(workers, lanes):
    assert effective_batch(plan(48, lanes), workers=workers, cells_global=48) == 48
    mixed = MixturePlan((plan(24, lanes // 2), plan(24, lanes // 2)), np.arange(lanes) % 2)
    expected = mixed.cells_global
    assert effective_batch(mixed, workers=workers, cells_global=expected) == expected


def test_another_effective_batch_is_refused():
    with pytest.raises(
        ConfigError, match="2 workers train on 48 cells a step, .*cells_global is 6"
    ):
        effective_batch(plan(48, 8), workers=2, cells_global=64)
