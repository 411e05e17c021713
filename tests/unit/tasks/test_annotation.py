"""The annotation task: its split as a function of obs, its classes from training cells only."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest

from cellray.core import registry
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.models.base import EmbedsCells
from cellray.tasks.annotation import TASK, AnnotationConfig, annotation_split, annotation_targets
from cellray.tasks.base import Split, check_columns, ids_sha256, task


def make_obs(num: int = 400, *, donors: int = 4, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "soma_joinid": np.arange(100, 100 + num, dtype=np.int64),
            "cell_type": rng.choice(["alpha", "beta", "delta"], num),
            "donor_id": [f"d{i:02d}" for i in rng.integers(0, donors, num)],
        }
    )


def config_of(**split: object) -> AnnotationConfig:
    settings = {"column": "donor_id", "test_values": ["d03"]} | split
    return build_section(AnnotationConfig, {"name": "annotation", "split": settings})


def split_of(obs: pd.DataFrame, *, seed: int = 0, **settings: object) -> Split:
    return annotation_split(obs, config_of(**settings), seed=seed)


def test_the_unit_is_found_and_complete() -> None:
    assert "annotation" in registry.names("cellray.tasks")
    assert task("annotation") is TASK
    assert TASK.needs == (EmbedsCells,)
    assert TASK.headline == "macro_f1.union.v1"
    assert TASK.compulsory == ("majority", "logistic", "knn", "hvg", "harmony")
    with pytest.raises(ConfigError, match="no 'anotation' in tasks. Did you mean 'annotation'"):
        task("anotation")


def test_parts_are_disjoint_and_cover_all_labelled_cells() -> None:
    obs = make_obs()
    split = split_of(obs)
    parts = np.concatenate([split.train, split.validation, split.test])
    np.testing.assert_array_equal(np.sort(parts), obs["soma_joinid"])
    np.testing.assert_array_equal(split.test, obs["soma_joinid"][obs["donor_id"] == "d03"])
    for part in (split.train, split.validation, split.test):
        assert (np.diff(part) > 0).all()
    assert split.unit == "donor_id"
    assert split.validation_unit == "cell"
    assert split.warnings == ()
    assert split.left_out == {}
    rest = len(split.train) + len(split.validation)
    assert abs(len(split.validation) / rest - 0.1) < 0.05


def test_split_is_pure_and_blind_to_row_order() -> None:
    obs = make_obs()
    shuffled = obs.sample(frac=1.0, random_state=3)
    first, again, other = split_of(obs), split_of(obs), split_of(shuffled)
    for found in (again, other):
        np.testing.assert_array_equal(found.train, first.train)
        np.testing.assert_array_equal(found.validation, first.validation)
        np.testing.assert_array_equal(found.test, first.test)
        assert found.split_sha256 == first.split_sha256


def test_seed_moves_validation_but_never_test() -> None:
    obs = make_obs()
    first, second = split_of(obs, seed=1), split_of(obs, seed=2)
    np.testing.assert_array_equal(first.test, second.test)
    assert first.split_sha256 == second.split_sha256
    assert set(first.validation) != set(second.validation)


def test_appended_cells_move_no_old_cell() -> None:
    old, new = make_obs(200), make_obs(400)
    new.loc[:199] = old
    before, after = split_of(old), split_of(new)
    assert set(before.validation) == set(after.validation) & set(old["soma_joinid"])


def test_appended_cells_move_no_old_cell_of_a_split_by_cell() -> None:
    settings = {"column": "", "test_values": [], "test_fraction": 0.3}
    old, new = make_obs(200), make_obs(500)
    before, after = split_of(old, **settings), split_of(new, **settings)
    for part in ("train", "validation", "test"):
        known = set(getattr(after, part)) & set(old["soma_joinid"])
        assert known == set(getattr(before, part)), part


@pytest.mark.parametrize("added", [1, 3, 8])
def test_added_donors_move_at_most_as_many_old_ones(added: int) -> None:
    """A share of donors is held out by rank of their hash: a new one can push one old one out."""
    names = [f"donor{i}" for i in range(30 + added)]
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(8 * len(names)),
            "cell_type": ["alpha", "beta"] * (4 * len(names)),
            "donor_id": np.repeat(names, 8),
        }
    )
    settings = {"test_values": [], "test_fraction": 0.4}
    held_out = []
    for table in (obs[: 8 * 30], obs):
        test = split_of(table, **settings).test
        held_out.append(set(obs["donor_id"].to_numpy()[test]) & set(names[:30]))
    assert len(held_out[0]) == 12
    assert len(held_out[0] ^ held_out[1]) <= added


def test_digest_is_of_the_sorted_test_ids() -> None:
    split = split_of(make_obs())
    expected = hashlib.sha256(np.sort(split.test).astype("<i8").tobytes()).hexdigest()
    assert split.split_sha256 == expected
    assert ids_sha256(split.test[::-1]) == expected


def test_validation_takes_whole_donors_when_there_are_enough() -> None:
    obs = make_obs(900, donors=21)
    split = split_of(obs, validation_fraction=0.2)
    donor = obs.set_index("soma_joinid")["donor_id"]
    chosen = set(donor[split.validation])
    assert split.validation_unit == "donor_id"
    assert len(chosen) == 4
    assert not chosen & set(donor[split.train])
    by_cell = split_of(obs, validation_fraction=0.2, validation_by="cell")
    assert by_cell.validation_unit == "cell"
    few = split_of(make_obs(), validation_by="group")
    assert len(set(make_obs().set_index("soma_joinid")["donor_id"][few.validation])) == 1


def test_a_fraction_of_donors_can_be_held_out() -> None:
    obs = make_obs(900, donors=20)
    split = split_of(obs, test_values=[], test_fraction=0.3)
    donor = obs.set_index("soma_joinid")["donor_id"]
    assert len(set(donor[split.test])) == 6
    assert not set(donor[split.test]) & set(donor[split.train])
    other = split_of(obs, test_values=[], test_fraction=0.3, seed=9)
    assert other.split_sha256 == split.split_sha256


def test_split_by_cell_warns_if_donors_exist() -> None:
    obs = make_obs(2000)
    split = split_of(obs, column="", test_values=[], test_fraction=0.2)
    assert split.unit == "cell"
    assert abs(len(split.test) / 2000 - 0.2) < 0.03
    assert len(split.warnings) == 1
    assert "cells are split one by one although obs has 'donor_id'" in split.warnings[0]
    without = obs.drop(columns="donor_id")
    assert split_of(without, column="", test_values=[], test_fraction=0.2).warnings == ()


def test_cells_without_label_or_donor_are_counted_and_left_out() -> None:
    obs = make_obs()
    obs.loc[0:4, "cell_type"] = None
    obs.loc[5:6, "cell_type"] = "unknown"
    obs.loc[7:9, "donor_id"] = np.nan
    split = split_of(obs)
    parts = np.concatenate([split.train, split.validation, split.test])
    assert split.left_out == {"no label": 7, "no group": 3}
    assert not set(parts) & set(range(100, 110))
    assert len(parts) == 390


def test_unseen_test_classes_are_kept_and_told() -> None:
    obs = make_obs()
    donor = obs["donor_id"] == "d03"
    rare = obs.index[donor][:4]
    obs.loc[rare, "cell_type"] = "epsilon"
    config = config_of()
    split = annotation_split(obs, config, seed=0)
    assert len(split.test) == donor.sum()
    assert f"1 test classes (4 of {donor.sum()} test cells)" in split.warnings[0]
    assert split.warnings[0].endswith("epsilon")
    targets = annotation_targets(obs, config, split)
    assert targets.classes == ("alpha", "beta", "delta")
    assert (targets.codes[rare] == -1).all()
    assert targets.objective == "classification"
    truth = obs["cell_type"][donor].to_numpy()
    guess = np.where(truth == "epsilon", "alpha", truth)
    scores = TASK.score(truth, guess, targets.classes)
    assert scores["n_unseen_classes"] == 1
    assert scores["n_unseen_cells"] == 4
    assert scores["accuracy.v1"] == pytest.approx(1 - 4 / donor.sum())


def test_classes_come_from_training_cells_alone() -> None:
    """Relabelling validation and test cells changes neither classes nor training codes."""
    obs, config = make_obs(), config_of()
    split = annotation_split(obs, config, seed=0)
    before = annotation_targets(obs, config, split)
    outside = ~obs["soma_joinid"].isin(split.train)
    changed = obs.copy()
    changed.loc[outside, "cell_type"] = "zeta"
    after = annotation_targets(changed, config, split)
    assert before.classes == after.classes == ("alpha", "beta", "delta")
    np.testing.assert_array_equal(before.codes[~outside], after.codes[~outside])
    assert (after.codes[outside] == -1).all()
    names = np.array(before.classes)
    np.testing.assert_array_equal(names[before.codes], obs["cell_type"])


def test_a_class_only_in_validation_is_told() -> None:
    obs, config = make_obs(), config_of()
    split = annotation_split(obs, config, seed=0)
    obs.loc[obs["soma_joinid"] == split.validation[0], "cell_type"] = "gamma"
    again = annotation_split(obs, config, seed=0)
    assert again.warnings == ("classes found in validation but not in training: gamma",)


def test_categorical_columns_work_like_text() -> None:
    obs = make_obs()
    split = split_of(obs.astype({"cell_type": "category", "donor_id": "category"}))
    np.testing.assert_array_equal(split.train, split_of(obs).train)


def test_columns_to_read() -> None:
    there = ["cell_type", "donor_id", "assay"]
    assert TASK.columns(config_of(), there) == ["cell_type", "donor_id"]
    by_cell = config_of(column="", test_values=[], test_fraction=0.2)
    assert TASK.columns(by_cell, there) == ["cell_type", "donor_id"]
    assert TASK.columns(by_cell, ["cell_type"]) == ["cell_type"]


def test_a_missing_label_column_is_explained() -> None:
    obs = make_obs().rename(columns={"cell_type": "celltype"})
    message = (
        r"task.label = 'cell_type': obs has no such column. Did you mean 'celltype'\? "
        "It has: celltype, donor_id"
    )
    with pytest.raises(DataError, match=message):
        split_of(obs)
    with pytest.raises(DataError, match=message):
        TASK.columns(config_of(), ["celltype", "donor_id"])


def test_a_missing_split_column_is_explained() -> None:
    with pytest.raises(DataError, match=r"task.split.column = 'doner_id'.*mean 'donor_id'"):
        split_of(make_obs(), column="doner_id")
    with pytest.raises(DataError, match="x = 'y': obs has no such column. It has: a, b"):
        check_columns(["b", "a"], {"x": "y"})


def test_test_values_that_no_cell_has_are_explained() -> None:
    with pytest.raises(
        DataError, match=r"no cell has donor_id = 'd3'. Did you mean 'd03'\? There are: d00, d01"
    ):
        split_of(make_obs(), test_values=["d02", "d3"])


def test_cells_without_joinid_are_refused() -> None:
    with pytest.raises(DataError, match="the cells have no 'soma_joinid' column"):
        split_of(make_obs().drop(columns="soma_joinid"))


def test_no_label_at_all() -> None:
    obs = make_obs().assign(cell_type="unknown")
    with pytest.raises(DataError, match="no cell has a label: all 400 values of 'cell_type'"):
        split_of(obs)


def test_an_empty_part_is_refused() -> None:
    every = ["d00", "d01", "d02", "d03"]
    with pytest.raises(DataError, match="the split leaves no labelled train cell"):
        split_of(make_obs(), test_values=every)
    obs = make_obs()
    obs.loc[obs["donor_id"] == "d03", "cell_type"] = None
    with pytest.raises(DataError, match="the split leaves no labelled test cell"):
        split_of(obs)
    with pytest.raises(DataError, match="the split leaves no labelled validation cell"):
        split_of(make_obs(), validation_fraction=1e-9)
    assert len(split_of(make_obs(), validation_fraction=0.0).validation) == 0


def test_one_class_is_nothing_to_learn() -> None:
    obs, config = make_obs().assign(cell_type="beta"), config_of()
    split = annotation_split(obs, config, seed=0)
    with pytest.raises(DataError, match=r"the training cells have 1 class of 'cell_type' \(beta\)"):
        annotation_targets(obs, config, split)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_fraction": 0.2}, "give either test_values .* not both"),
        ({"test_values": []}, "give either test_values .* not neither"),
        ({"column": ""}, "test_values needs column"),
        (
            {"column": "", "test_values": [], "test_fraction": 0.1, "validation_by": "group"},
            'validation_by = "group" needs column',
        ),
        ({"test_valuse": ["d"]}, "unknown key 'split.test_valuse'. Did you mean 'test_values'"),
    ],
)
def test_contradictory_splits_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**settings)
