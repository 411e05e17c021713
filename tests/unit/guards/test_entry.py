"""Planted faults of a data set are refused or told, by the function that every run calls."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import DataError
from cellray.data.vocab import Vocab
from cellray.guards import entry
from cellray.guards.entry import check_table_data, guard_split
from cellray.tasks.base import ids_sha256
from helpers_cells import known_cells
from helpers_guards import config_of, selected, split_of, with_copies


def test_a_clean_set_has_facts_and_no_warning(small_store):
    cells = selected(small_store)
    split = split_of(cells, config_of())
    report = check_table_data(cells, split, config_of(), near=True)
    assert report.warnings == []
    assert report.split == replace(split, warnings=())
    assert report.facts["cells.test"] == 60
    assert report.facts["duplicates.test"] == report.facts["duplicates.near_test"] == 0
    assert report.facts["split.unit"] == "donor"
    assert not report.facts["synthetic"]
    assert report.facts["cramers_v.donor"] < 0.1
    again = check_table_data(cells, report.split, config_of(), near=False)
    assert again.warnings == []


def test_copies_across_the_split_are_refused(ingested):
    cells = selected(ingested(with_copies(3)))
    split = split_of(cells, config_of())
    for check in (guard_split, check_table_data):
        with pytest.raises(
            DataError, match="3 of 60 test cells have the same counts as 3 training"
        ):
            check(cells, split, config_of())


def test_copies_are_dropped_or_kept_as_the_task_says(ingested):
    cells = selected(ingested(with_copies(3)))
    split = split_of(cells, config_of())
    dropped = check_table_data(cells, split, config_of(duplicates="drop_train"))
    assert len(dropped.split.train) + len(dropped.split.validation) == 177
    assert dropped.split.split_sha256 == split.split_sha256
    assert dropped.facts["duplicates.test"] == 3
    assert dropped.facts["duplicates.near_test"] == 0
    kept = check_table_data(cells, split, config_of(duplicates="allow"))
    assert kept.split.train is split.train
    assert kept.facts["duplicates.near_test"] == 0  # exact ones are not counted twice
    (told,) = kept.warnings
    assert "scores are too high" in told
    twice = check_table_data(cells, kept.split, config_of(duplicates="allow"))
    assert twice.warnings == kept.warnings


def test_near_copies_are_told(ingested):
    rng = np.random.default_rng(0)
    cells = known_cells(num_genes=300)
    counts = rng.integers(0, 4, (240, 300)).astype(np.float32)
    for row in counts:
        row[rng.choice(300, 100, replace=False)] += 20
    d0, d3 = (np.flatnonzero((cells.obs["donor"] == d).to_numpy())[:5] for d in ("d0", "d3"))
    counts[d3] = counts[d0]
    for row in d3[1:]:  # the first stays an exact copy
        small = np.flatnonzero((counts[row] > 1) & (counts[row] < 4))[:2]
        counts[row, small] += [1, -1]
    cells.X = type(cells.X)(counts)
    found = selected(ingested(cells))
    split = split_of(found, config_of())
    report = check_table_data(found, split, config_of(duplicates="drop_train"))
    assert report.facts["duplicates.test"] == 1
    assert report.facts["duplicates.near_test"] == 4
    assert "4 of 60 test cells are near copies of training or validation" in report.warnings[-1]
    only = check_table_data(found, split, config_of(duplicates="allow"), near=False)
    assert "duplicates.near_test" not in only.facts


def test_a_covariate_that_is_the_label_is_refused(ingested):
    cells = known_cells()
    cells.obs["plate"] = [f"plate-{name}" for name in cells.obs["cell_type"].astype(str)]
    found = selected(ingested(cells))
    split = split_of(found, config_of())
    with pytest.raises(DataError, match="covariate 'plate' gives the label away"):
        guard_split(found, split, config_of(), covariates=["plate"])
    report = guard_split(found, split, config_of(batch="plate"))
    (told,) = report.warnings
    assert "'cell_type' and 'plate' are confounded (Cramér's V 1.00" in told
    assert report.facts["only_in_one.plate"]["type0"] == "plate-type0"
    with pytest.raises(DataError, match="names 'cell_type', the label"):
        guard_split(found, split, config_of(), covariates=["cell_type"])


def test_donors_on_both_sides_of_another_split_are_told(ingested):
    cells = known_cells()
    cells.obs["batch"] = pd.Categorical([f"b{i // 80}" for i in range(240)])
    found = selected(ingested(cells), "batch")
    config = config_of(split={"column": "batch", "test_values": ["b2"]})
    report = guard_split(found, split_of(found, config), config)
    (told,) = report.warnings
    assert told.startswith("in-distribution: 4 of 4 values of 'donor' in the test set")


def test_a_split_by_cell_is_called_in_distribution(small_store):
    cells = selected(small_store)
    config = config_of(split={"test_fraction": 0.3})
    (told,) = guard_split(cells, split_of(cells, config), config).warnings
    assert "cells are split one by one although obs has 'donor'" in told


def test_validation_that_overlaps_the_test_set_is_refused(small_store):
    cells = selected(small_store)
    split = split_of(cells, config_of())
    leaky = replace(split, validation=np.sort(np.append(split.validation, split.test[0])))
    with pytest.raises(DataError, match="1 cells are in the validation and the test part"):
        check_table_data(cells, leaky, config_of())
    swapped = replace(split, test=split.test[1:])
    with pytest.raises(DataError, match="were changed after the split was made"):
        check_table_data(cells, swapped, config_of())
    assert ids_sha256(split.test) == split.split_sha256


def test_a_vocabulary_that_loses_counts_is_refused(small_store):
    cells = selected(small_store)
    split = split_of(cells, config_of())
    vocab = Vocab.from_genes([f"ENSG{i:011d}" for i in range(12)], [""] * 12, specials=())
    with pytest.raises(DataError, match="At least 60% are asked for.*data.allow_gene_loss = true"):
        check_table_data(cells, split, config_of(), vocab=vocab)
    report = check_table_data(cells, split, config_of(), vocab=vocab, allow_gene_loss=True)
    assert "are lost to the model" in report.warnings[-1]
    assert report.facts["genes_in"] == 60
    assert report.facts["genes_matched"] == 12
    assert 0.1 < report.facts["umi_fraction_matched"] < 0.6


def test_what_would_mean_reading_too_much_is_told(small_store, monkeypatch):
    monkeypatch.setattr(entry, "READ_AT_MOST", 100)
    monkeypatch.setattr(entry, "keeps_hashes", lambda store: False)
    cells = selected(small_store)
    report = check_table_data(cells, split_of(cells, config_of()), config_of())
    assert len(report.warnings) == 2
    assert report.warnings[0].startswith("copies across the split were not looked for")
    assert report.warnings[1].startswith("near copies were not looked for: 240 cells")
    assert "duplicates.test" not in report.facts


def test_copies_within_training_are_told(ingested):
    cells = known_cells()
    cells.X = cells.X[np.arange(240) % 120].copy()  # every cell of the first half comes twice
    found = selected(ingested(cells))
    report = guard_split(found, split_of(found, config_of()), config_of(duplicates="drop_train"))
    assert report.facts["duplicates.validation_in_train"] > 0
    assert any("what is chosen by validation looks better" in told for told in report.warnings)


@pytest.mark.slow
def test_a_hundred_thousand_cells_take_seconds(tmp_path):
    from cellray.data.ingest import IngestConfig, ingest

    cells = known_cells(num_cells=100_000, num_genes=200)
    cells.write_h5ad(tmp_path / "large.h5ad")
    ingest(IngestConfig(files=[str(tmp_path / "large.h5ad")], uri=str(tmp_path / "large")))
    found = selected(str(tmp_path / "large"))
    split = split_of(found, config_of())
    guard_split(found, split, config_of())  # compiles
    started = time.perf_counter()
    guard_split(found, split, config_of())
    assert time.perf_counter() - started < 10
    started = time.perf_counter()
    check_table_data(found, split, config_of())
    assert time.perf_counter() - started < 60
