"""Baselines behind the annotation task: a donor held out of made and of real cells."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy import sparse

from cellray.baselines.base import BaselineUnit, Predictor, baseline
from cellray.core.section import build_section
from cellray.tasks.annotation import TASK, AnnotationConfig
from cellray.tasks.base import Split, Targets
from helpers_cells import known_cells

NAMES = ["knn", "logistic", "majority"]


def obs_of(cells: ad.AnnData) -> pd.DataFrame:
    obs = cells.obs[["cell_type", "donor"]].reset_index(drop=True)
    return obs.assign(soma_joinid=np.arange(len(obs), dtype=np.int64))


def held_out(donor: str) -> AnnotationConfig:
    split = {"column": "donor", "test_values": [donor], "validation_fraction": 0.0}
    return build_section(AnnotationConfig, {"name": "annotation", "split": split})


def fitted(
    unit: BaselineUnit, counts: sparse.csr_matrix, obs: pd.DataFrame, donor: str, **over: object
) -> tuple[Predictor, Split, Targets]:
    """Split, class list and fit, as a benchmark makes them; joinids are row numbers."""
    config = held_out(donor)
    split = TASK.split(obs, config, seed=0)
    targets = TASK.fit(obs, config, split)
    settings = unit.config.model_validate({"name": unit.name} | over)
    predictor = unit.fit(settings, counts[split.train], targets.codes[split.train], 0)
    return predictor, split, targets


def scores_of(
    predictor: Predictor, counts: sparse.csr_matrix, obs: pd.DataFrame, found: tuple[Split, Targets]
) -> dict[str, float]:
    split, targets = found
    guess = np.array(targets.classes)[predictor.predict(counts[split.test])]
    return TASK.score(obs["cell_type"].astype(str).to_numpy()[split.test], guess, targets.classes)


@pytest.mark.parametrize("name", ["knn", "logistic"])
def test_known_types_of_a_new_donor_are_found_and_majority_is_beaten(name: str) -> None:
    cells = known_cells()
    counts, obs = sparse.csr_matrix(cells.X), obs_of(cells)
    scores = {}
    for which in (name, "majority"):
        predictor, *found = fitted(baseline(which), counts, obs, "d3")
        scores[which] = scores_of(predictor, counts, obs, (found[0], found[1]))
    assert scores["majority"]["accuracy.v1"] == pytest.approx(1 / 3)
    assert scores["majority"]["macro_f1.test.v1"] == pytest.approx(1 / 6)
    assert scores[name]["accuracy.v1"] > 0.95
    assert scores[name]["macro_f1.union.v1"] > scores["majority"]["macro_f1.union.v1"] + 0.5


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_test_donor_reaches_the_fit(name: str) -> None:
    """Its cells permuted, relabelled, overwritten or absent: the same fit, byte for byte."""
    cells = known_cells(120)
    obs, dense = obs_of(cells), sparse.csr_matrix(cells.X).toarray()
    test = np.flatnonzero(obs["donor"] == "d3")
    rest = np.flatnonzero(obs["donor"] != "d3")
    turned, overwritten, relabelled = dense.copy(), dense.copy(), obs.copy()
    turned[test] = dense[test[::-1]]
    overwritten[test] = np.random.default_rng(0).poisson(50.0, (len(test), dense.shape[1]))
    relabelled["cell_type"] = obs["cell_type"].astype(str)
    relabelled.loc[test, "cell_type"] = "novel"
    cases: list[tuple[npt.NDArray[np.float32], pd.DataFrame]] = [
        (dense, obs), (turned, obs), (overwritten, relabelled),
    ]  # fmt: skip
    unit = baseline(name)
    states = set()
    for values, table in cases:
        predictor, _, targets = fitted(unit, sparse.csr_matrix(values), table, "d3")
        assert targets.classes == ("type0", "type1", "type2")
        states.add(pickle.dumps(predictor))
    codes = obs["cell_type"].cat.codes.to_numpy(dtype=np.int64)
    alone = unit.fit(unit.config(name=name), sparse.csr_matrix(dense[rest]), codes[rest], 0)
    assert states == {pickle.dumps(alone)}


@pytest.fixture(scope="module")
def pancreas(repository: Path) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    folder = repository / "tests" / "data" / "pancreas"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of joining files with different genes
        cells = ad.concat(
            [ad.read_h5ad(folder / f"human{i}.h5ad") for i in (1, 2, 3)],
            join="outer",
            fill_value=0,
        )
    return sparse.csr_matrix(cells.X, dtype=np.float32), obs_of(cells)


@pytest.mark.parametrize(
    ("name", "over", "accuracy", "macro_f1"),
    [
        ("majority", {}, 0.2246, 0.0306),
        ("knn", {}, 0.958, 0.872),
        ("logistic", {"strengths": [10.0]}, 0.976, 0.975),
    ],
)
def test_a_real_donor_scores_where_it_was_measured(
    pancreas: tuple[sparse.csr_matrix, pd.DataFrame],
    name: str,
    over: dict[str, object],
    accuracy: float,
    macro_f1: float,
) -> None:
    """Donors 1 and 2 learnt, donor 3 predicted; a cell alone gets what it gets in company."""
    counts, obs = pancreas
    predictor, split, targets = fitted(baseline(name), counts, obs, "human3", **over)
    found = scores_of(predictor, counts, obs, (split, targets))
    assert found["n_items"] == 668
    assert found["accuracy.v1"] == pytest.approx(accuracy, abs=0.006)
    assert found["macro_f1.test.v1"] == pytest.approx(macro_f1, abs=0.03)
    together = predictor.predict(counts[split.test])
    some = np.arange(0, len(split.test), 16)
    alone = [int(predictor.predict(counts[split.test[i : i + 1]])[0]) for i in some]
    assert alone == together[some].tolist()
