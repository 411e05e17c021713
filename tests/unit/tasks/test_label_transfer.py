"""Label transfer: whole batches on either side, unknown ones refused, scored batch by batch."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.metrics.base import metric
from cellray.models.base import EmbedsCells
from cellray.tasks.base import ids_sha256, score_labels, task
from cellray.tasks.label_transfer import TASK, LabelTransferConfig, transfer_split


def config_of(**keys: object) -> LabelTransferConfig:
    raw = {"name": "label_transfer", "batch": "sample", "query": ["s3"]} | keys
    return build_section(LabelTransferConfig, raw)


def make_obs(num: int = 400) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(num) + 7,
            "cell_type": rng.choice(["alpha", "beta", "delta"], num).astype(object),
            "sample": rng.choice(["s0", "s1", "s2", "s3"], num).astype(object),
        }
    )
    obs.loc[0, "cell_type"] = None
    return obs


def test_the_unit_is_complete() -> None:
    assert task("label_transfer") is TASK
    assert TASK.needs == (EmbedsCells,)
    assert metric(TASK.headline).higher_is_better
    assert TASK.answers == "labels"


def test_batches_are_kept_whole() -> None:
    obs = make_obs()
    split = transfer_split(obs, config_of(), seed=0)
    sample = obs.set_index("soma_joinid")["sample"]
    assert set(sample[split.test]) == {"s3"}
    assert set(sample[split.train]) == set(sample[split.validation]) == {"s0", "s1", "s2"}
    parts = [split.train, split.validation, split.test]
    joined = np.concatenate(parts)
    assert len(set(joined)) == len(joined) == 399
    assert split.left_out == {"no label": 1}
    assert split.unit == "sample"
    assert split.split_sha256 == ids_sha256(split.test)
    other = transfer_split(obs, config_of(), seed=5)
    np.testing.assert_array_equal(other.test, split.test)
    assert set(other.validation) != set(split.validation)


def test_named_references_leave_other_batches_out() -> None:
    obs = make_obs()
    split = transfer_split(obs, config_of(reference=["s1"]), seed=0)
    sample = obs.set_index("soma_joinid")["sample"]
    assert set(sample[split.train]) == {"s1"}
    others = obs["sample"].isin(["s0", "s2"]).sum()
    assert split.left_out["neither reference nor query"] == others
    rest = transfer_split(obs, config_of(query=[], reference=["s1"]), seed=0)
    assert set(sample[rest.test]) == {"s0", "s2", "s3"}


def test_classes_are_of_the_reference_and_what_it_lacks_is_said() -> None:
    obs = make_obs()
    rare = obs.index[obs["sample"] == "s3"][:5]
    obs.loc[rare, "cell_type"] = "epsilon"
    split = transfer_split(obs, config_of(), seed=0)
    targets = TASK.fit(obs, config_of(), split)
    assert targets.classes == ("alpha", "beta", "delta")
    assert (targets.codes[rare] == -1).all()
    assert targets.objective == "classification"
    assert any("1 test classes (5 of" in w and "epsilon" in w for w in split.warnings)


def test_donors_on_both_sides_are_said() -> None:
    obs = make_obs().assign(donor="d1")
    split = transfer_split(obs, config_of(), seed=0)
    said = "1 values of 'donor' have cells in reference and query: d1"
    assert any(said in warning for warning in split.warnings)


def test_scores_are_of_all_cells_and_of_each_batch() -> None:
    obs = make_obs()
    config = config_of(query=["s2", "s3"])
    split = transfer_split(obs, config, seed=0)
    classes = TASK.fit(obs, config, split).classes
    cells = obs[obs["soma_joinid"].isin(split.test)]
    truth = cells["cell_type"].to_numpy()
    guess = np.where(cells["sample"] == "s2", truth, "alpha")
    scores = score_labels(TASK, cells, config, truth, guess, classes)
    assert scores["macro_f1_test.batch_01.v1"] == 1.0
    assert scores["macro_f1_test.batch_min.v1"] == scores["macro_f1_test.batch_02.v1"] < 0.5
    assert scores["accuracy.v1"] == pytest.approx((truth == guess).mean())
    assert scores["n_query_batches"] == 2


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="task.batch is missing: label transfer needs"):
        config_of(batch="")
    with pytest.raises(ConfigError, match="give task.reference or task.query"):
        config_of(query=[])
    with pytest.raises(ConfigError, match="batches are both reference and query: s3"):
        config_of(reference=["s3", "s1"])
    with pytest.raises(ConfigError, match="label transfer holds out batches: give task.batch with"):
        config_of(split={"column": "sample", "test_values": ["s3"]})
    obs = make_obs()
    with pytest.raises(DataError, match=r"task.query: no cell has sample = 's33'. Did you mean"):
        transfer_split(obs, config_of(query=["s33"]), seed=0)
    everything = ["s0", "s1", "s2", "s3"]
    with pytest.raises(DataError, match="no batch is left as reference: 'sample' has s0, s1, s2"):
        transfer_split(obs, config_of(query=everything), seed=0)
    with pytest.raises(DataError, match="no batch is left as query"):
        transfer_split(obs, config_of(query=[], reference=everything), seed=0)
