"""Labels that a batch or a covariate gives away."""

from __future__ import annotations

import numpy as np
import pytest

from cellray.core.errors import DataError
from cellray.guards.confounding import check_covariates, confounding, confounding_warnings

RNG = np.random.default_rng(0)
LABELS = np.array(["alpha", "beta", "delta"])[RNG.integers(0, 3, 600)]
NONE = np.array([f"b{i}" for i in RNG.integers(0, 4, 600)])
SAME = np.char.add("plate of ", LABELS)
NESTED = np.where(LABELS == "alpha", "left", "right")  # the label says the batch, not the reverse


def test_the_strongest_comes_first_and_pairs_are_named():
    nothing, same, nested = "nothing", "same", "nested"
    found = confounding(
        LABELS, {nothing: NONE, same: SAME, nested: NESTED, "one": ["x"] * len(LABELS)}
    )
    assert [one.column for one in found] == [same, nested, nothing]
    assert found[0].cramers_v == pytest.approx(1.0, abs=1e-9)
    assert found[0].purity == 1.0
    assert found[0].single == {name: f"plate of {name}" for name in ("alpha", "beta", "delta")}
    assert found[2].cramers_v < 0.1
    assert found[2].single == {}
    told = confounding_warnings(found, label="cell_type")
    assert len(told) == 2
    assert "'cell_type' and 'same' are confounded (Cramér's V 1.00, shown from 0.5)" in told[0]
    assert "alpha only in plate of alpha" in told[0]


def test_a_class_of_few_cells_is_in_one_batch_by_chance():
    labels = [*LABELS, *["rare"] * 9]
    (one,) = confounding(labels, {"batch": [*NONE, *["b0"] * 9]})
    assert "rare" not in one.single
    (one,) = confounding([*labels, "rare"], {"batch": [*NONE, *["b0"] * 10]})
    assert one.single == {"rare": "b0"}


def test_a_covariate_that_is_the_label_is_refused():
    found = confounding(LABELS, {"plate": SAME, "tissue": NESTED, "batch": NONE})
    with pytest.raises(DataError, match="covariate 'plate' gives the label away: .* 100.0% of the"):
        check_covariates(found, ["batch", "plate"], label="cell_type")
    check_covariates(found, ["batch", "tissue"], label="cell_type")  # confounded, but no leak
    with pytest.raises(DataError, match="data.covariates names 'cell_type', the label that is to"):
        check_covariates(found, ["cell_type"], label="cell_type")


def test_a_nearly_perfect_covariate_is_refused_too():
    noisy = SAME.copy()
    noisy[:3] = "plate of beta"
    found = confounding(LABELS, {"plate": noisy})
    with pytest.raises(DataError, match="gives the label away"):
        check_covariates(found, ["plate"], label="cell_type")


def test_a_name_of_each_cell_is_no_leak():
    """It says nothing of a new cell; the correction for bias knows."""
    found = confounding(LABELS, {"barcode": [f"c{i}" for i in range(len(LABELS))]})
    assert found[0].purity == 1.0
    assert found[0].cramers_v < 0.1
    check_covariates(found, ["barcode"], label="cell_type")
