"""The reference mapping task: whole groups are queries, and no donor is on both sides."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.metrics.classification import score_annotation
from cellray.tasks.base import asked_cells, task
from cellray.tasks.reference_mapping import TASK, ReferenceMappingConfig, reference_split


def make_obs(num: int = 300) -> pd.DataFrame:
    """Two donors in each of three studies."""
    study = np.arange(num) % 3
    donor = 2 * study + (np.arange(num) // 3) % 2
    return pd.DataFrame(
        {
            "soma_joinid": np.arange(50, 50 + num, dtype=np.int64),
            "cell_type": np.where(np.arange(num) % 2, "alpha", "beta"),
            "study": [f"s{i}" for i in study],
            "donor_id": [f"d{i}" for i in donor],
        }
    )


def config_of(**keys: object) -> ReferenceMappingConfig:
    split = {"column": "study", "test_values": ["s2"], **keys.pop("split", {})}  # type: ignore[dict-item]
    raw = {"name": "reference_mapping", "split": split, **keys}
    return build_section(ReferenceMappingConfig, raw)


def test_the_unit_is_found_and_answers_by_neighbours():
    assert task("reference_mapping") is TASK
    assert TASK.neighbours
    assert TASK.answers == "labels"
    assert config_of().num_neighbors == 10
    assert config_of().split.validation_fraction == 0.0


def test_queries_are_whole_studies_and_the_reference_is_all_the_rest():
    obs = make_obs()
    split = reference_split(obs, config_of(), seed=0)
    is_query = (obs["study"] == "s2").to_numpy()
    np.testing.assert_array_equal(split.test, obs["soma_joinid"][is_query])
    np.testing.assert_array_equal(split.train, obs["soma_joinid"][~is_query])
    assert len(split.validation) == 0
    assert split.unit == "study"
    np.testing.assert_array_equal(asked_cells(TASK, split), split.test)
    targets = TASK.fit(obs, config_of(), split)
    assert targets.classes == ("alpha", "beta")


def test_a_donor_on_both_sides_is_refused():
    obs = make_obs()
    obs.loc[obs["study"] == "s2", "donor_id"] = "d1"
    message = r"1 values of 'donor_id' have cells both in the reference .* queries: d1; hold them"
    with pytest.raises(DataError, match=message):
        reference_split(obs, config_of(), seed=0)
    split = reference_split(obs, config_of(donor_columns=[]), seed=0)  # other people of one name
    assert len(split.test) == 100
    obs.loc[obs["study"] == "s2", "donor_id"] = None  # nothing is known of them
    assert len(reference_split(obs, config_of(), seed=0).test) == 100


def test_donors_of_validation_cells_are_of_the_reference():
    obs = make_obs()
    odd = obs.index[obs["study"] == "s0"][0]
    obs.loc[odd, "donor_id"] = "d4"
    config = config_of(split={"validation_fraction": 0.5})
    with pytest.raises(DataError, match="queries: d4"):
        reference_split(obs, config, seed=0)


def test_what_is_read_and_what_is_missing():
    available = ["cell_type", "study", "donor_id", "tech", "age"]
    assert TASK.columns(config_of(batch="tech"), available) == [
        "cell_type", "study", "tech", "donor_id",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"task.batch = 'teck'.*Did you mean 'tech'"):
        TASK.columns(config_of(batch="teck"), available)
    with pytest.raises(ConfigError, match="task.split.column is missing: reference mapping holds"):
        config_of(split={"column": "", "test_values": [], "test_fraction": 0.2})


def test_scores_are_those_of_annotation():
    truth, predicted = ["a", "a", "b", "c"], ["a", "b", "b", "a"]
    expected = score_annotation(truth, predicted, train_classes=["a", "b"])
    assert TASK.score(truth, predicted, ["a", "b"]) == expected
    assert expected["n_unseen_cells"] == 1
