"""The integration task: all cells train, batches are seen, labels never."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.metrics.base import metric
from cellray.tasks.base import OWN, asked_cells, ids_sha256, task
from cellray.tasks.embedding import score_embedding
from cellray.tasks.integration import TASK, IntegrationConfig, integration_split


def config_of(**keys: object) -> IntegrationConfig:
    return build_section(IntegrationConfig, {"name": "integration", "batch": "batch", **keys})


def make_obs(num: int = 300) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(num) + 7,
            "cell_type": rng.choice(["alpha", "beta"], num).astype(object),
            "batch": rng.choice(["one", "two", "three"], num).astype(object),
        }
    )
    obs.loc[:9, "cell_type"] = None
    obs.loc[20, "batch"] = None
    return obs


def test_the_unit_is_complete() -> None:
    assert task("integration") is TASK
    assert TASK.answers == "embedding"
    assert TASK.score_embedding is score_embedding
    assert metric(TASK.headline).title == "total"
    assert "harmony" in TASK.compulsory


def test_all_cells_with_a_batch_are_trained_on_or_validate() -> None:
    obs = make_obs()
    split = integration_split(obs, config_of(), seed=0)
    placed = obs["soma_joinid"][obs["batch"].notna()].to_numpy()
    np.testing.assert_array_equal(asked_cells(TASK, split), placed)
    assert not set(split.train) & set(split.validation)
    assert len(split.test) == 0
    assert set(obs["soma_joinid"][:10]) & set(split.train)  # without a label, too
    assert abs(len(split.validation) / len(placed) - 0.1) < 0.05
    assert split.left_out == {"no batch": 1}
    assert split.split_sha256 == ids_sha256(placed)
    shuffled = integration_split(obs.sample(frac=1.0, random_state=1), config_of(), seed=0)
    np.testing.assert_array_equal(shuffled.train, split.train)
    other = integration_split(obs, config_of(), seed=4)
    assert other.split_sha256 == split.split_sha256
    assert set(other.validation) != set(split.validation)


def test_labels_are_never_learnt_and_batches_are_covariates() -> None:
    obs = make_obs()
    config = config_of(objective={"dar_weight": 0.5}, model={"domain_norm": "none"}, num_genes=50)
    targets = TASK.fit(obs, config, integration_split(obs, config, seed=0))
    assert (targets.codes == -1).all()
    assert targets.classes == ()
    assert targets.covariates == ("batch",)
    assert targets.objective == OWN
    assert (targets.recipe, targets.num_genes) == ("integration", 50)
    assert targets.settings == {"dar_weight": 0.5}
    assert targets.model == {"domain_norm": "none"}
    permuted = obs.assign(cell_type=obs["cell_type"].to_numpy()[::-1])
    again = TASK.fit(permuted, config, integration_split(permuted, config, seed=0))
    np.testing.assert_array_equal(again.codes, targets.codes)


def test_its_own_objective_alone_knows_no_batches() -> None:
    obs = make_obs()
    config = config_of(recipe="objective")
    targets = TASK.fit(obs, config, integration_split(obs, config, seed=0))
    assert (targets.covariates, targets.recipe, targets.num_genes) == ((), "", 0)
    assert targets.objective == OWN


def test_a_batch_that_only_validates_is_said() -> None:
    obs = make_obs(300)
    ids = obs["soma_joinid"].to_numpy()
    split = integration_split(obs, config_of(), seed=0)
    obs.loc[ids == split.validation[0], "batch"] = "alone"
    again = integration_split(obs, config_of(), seed=0)
    assert again.warnings == ("1 batches have no training cell: alone",)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="task.batch is missing: integration needs the obs"):
        build_section(IntegrationConfig, {"name": "integration"})
    with pytest.raises(DataError, match=r"the cells are of 1 batch \(one\); there is nothing to"):
        integration_split(make_obs().assign(batch="one"), config_of(), seed=0)
    few = make_obs(61)[21:]
    with pytest.raises(DataError, match="of 40 cells leaves 40 to train and 0 to validate on"):
        integration_split(few, config_of(validation_fraction=1e-6), seed=0)
    with pytest.raises(DataError, match=r"task.batch = 'bach': obs has no such column"):
        TASK.columns(config_of(batch="bach"), ["cell_type", "batch"])
