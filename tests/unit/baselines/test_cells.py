"""Cells, units and the two calls a benchmark makes: what they return and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from cells_for_baselines import made_cells
from scipy import sparse

from cellray.baselines.base import (
    BaselineUnit,
    CellCounts,
    annotate_with,
    baseline,
    check_available,
    embed_with,
    units_for,
)
from cellray.baselines.logistic import LogisticConfig
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section

LABELS = ["knn", "logistic", "majority", "shuffled_labels", "batch_only"]


def cells_of(num: int = 90, *, seed: int = 0) -> tuple[CellCounts, npt.NDArray[np.int64]]:
    counts, labels = made_cells(num, seed=seed)
    return CellCounts(counts, np.arange(num, dtype=np.int64) % 4 // 2), labels


def test_one_batch_a_cell() -> None:
    with pytest.raises(DataError, match="5 cells but 4 batches; give one a cell"):
        CellCounts(made_cells(5)[0], np.zeros(4, dtype=np.int64))


def test_rows_and_genes_are_picked_by_position_or_mask() -> None:
    cells, _ = cells_of(8)
    assert cells.batches is not None
    picked = cells.rows(np.array([5, 2]))
    assert picked.batches is not None
    assert picked.batches.tolist() == cells.batches[[5, 2]].tolist()
    np.testing.assert_array_equal(picked.counts.toarray(), cells.counts.toarray()[[5, 2]])
    mask = np.zeros(cells.num_genes, dtype=bool)
    mask[[3, 7]] = True
    for genes in (mask, np.array([3, 7])):
        few = cells.only(genes)
        assert (few.num_cells, few.num_genes) == (8, 2)
        np.testing.assert_array_equal(few.counts.toarray(), cells.counts.toarray()[:, [3, 7]])
    with pytest.raises(DataError, match="no gene is left to run baselines on"):
        cells.only(np.zeros(0, dtype=np.int64))


def test_a_baseline_on_the_matched_genes_alone_knows_no_other_gene() -> None:
    """The other genes changed at will: not one answer or confidence moves."""
    cells, labels = cells_of(120)
    matched = np.arange(60)
    dense = cells.counts.toarray()
    dense[:, 60:] = np.random.default_rng(0).poisson(9.0, (120, 60))
    changed = CellCounts(sparse.csr_matrix(dense))
    unit = baseline("logistic")
    config = LogisticConfig(strengths=[1.0])
    first, second = (
        annotate_with(unit, config, c.only(matched), labels, c.only(matched), 0)
        for c in (cells, changed)
    )
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.confidence, second.confidence)


@pytest.mark.parametrize("name", LABELS)
def test_codes_and_confidence_come_for_every_query_cell(name: str) -> None:
    cells, labels = cells_of(120)
    unit = baseline(name)
    found = annotate_with(unit, unit.config(name=name), cells, labels, cells.rows(np.arange(7)), 0)
    assert found.codes.dtype == np.int64
    assert found.confidence is not None
    assert found.codes.shape == found.confidence.shape == (7,)
    assert ((found.confidence > 0) & (found.confidence <= 1)).all()
    nobody = annotate_with(unit, unit.config(name=name), cells, labels, cells.rows(np.arange(0)), 0)
    assert nobody.codes.shape == (0,)


def test_confidences_are_what_they_say() -> None:
    cells, _ = cells_of(40)
    labels = np.repeat([1, 0, 2], [25, 10, 5]).astype(np.int64)
    unit = baseline("majority")
    most = annotate_with(unit, unit.config(name="majority"), cells, labels, cells, 0)
    assert most.confidence is not None
    assert most.confidence.tolist() == [25 / 40] * 40
    unit = baseline("logistic")
    config = LogisticConfig(strengths=[1.0])
    found = annotate_with(unit, config, cells, labels, cells, 0)
    predictor = unit.fit(config, cells.counts, labels, 0)
    each = predictor.model.predict_proba(predictor.genes.scaled(cells.counts))  # type: ignore[attr-defined]
    assert found.confidence is not None
    np.testing.assert_array_equal(each[np.arange(40), found.codes], found.confidence)
    alone = annotate_with(unit, config, cells, np.full(40, 3), cells, 0)
    assert alone.confidence is not None
    assert alone.codes.tolist() == [3] * 40
    assert alone.confidence.tolist() == [1.0] * 40


def test_the_tuning_budget_is_the_strengths_that_are_compared() -> None:
    trials = baseline("logistic").trials
    assert trials(LogisticConfig()) == 4
    assert trials(LogisticConfig(folds=0)) == 1
    assert trials(LogisticConfig(strengths=[1.0])) == 1
    assert baseline("knn").trials(baseline("knn").config(name="knn")) == 1


def test_units_by_what_they_answer() -> None:
    labels, embedding = units_for("labels"), units_for("embedding")
    assert set(labels) >= {"majority", "logistic", "knn", "pca", "hvg", "harmony", "scvi"}
    assert set(embedding) >= {"pca", "hvg", "harmony", "scvi", "combat", "noise"}
    assert {"celltype_jitter", "noise"}.isdisjoint(labels)
    assert {"majority", "logistic", "knn", "batch_only"}.isdisjoint(embedding)
    controls = {n for n in {*labels, *embedding} if baseline(n).family == "control"}
    assert controls == {"noise", "celltype_jitter", "shuffled_labels", "batch_only"}
    seeing = {n for n in {*labels, *embedding} if baseline(n).transductive}
    assert seeing == {"harmony", "combat", "scvi"}


def test_a_missing_extra_is_named_with_its_command() -> None:
    unit = replace(baseline("scvi"), requires=("no_such_module_at_all",))
    wanted = r"'scvi' needs the Python module no_such_module_at_all.*pip install 'cellray\[scvi\]'"
    cells, labels = cells_of()
    for call in (
        lambda: check_available(unit),
        lambda: embed_with(unit, unit.config(name="scvi"), cells, 0),
        lambda: annotate_with(unit, unit.config(name="scvi"), cells, labels, cells, 0),
    ):
        with pytest.raises(ConfigError, match=wanted):
            call()


@pytest.mark.parametrize("name", ["harmony", "combat", "batch_only"])
def test_batches_that_are_absent_missing_or_one_are_refused(name: str) -> None:
    cells, labels = cells_of()
    unit = baseline(name)
    assert cells.batches is not None
    none = CellCounts(cells.counts)
    holes = CellCounts(cells.counts, np.where(np.arange(90) < 3, -1, cells.batches))
    one = CellCounts(cells.counts, np.zeros(90, dtype=np.int64))
    cases = [
        (none, f"'{name}' needs the batch of every cell and there is none"),
        (holes, f"of (90|180) cells have no batch, which baseline '{name}' needs"),
        (one, f"baseline '{name}' (corrects|goes by) batches and the cells are of one"),
    ]
    for given, message in cases:
        with pytest.raises(DataError, match=message):
            annotate_with(unit, unit.config(name=name), given, labels, given, 0)
        if unit.embed is not None:
            with pytest.raises(DataError, match=message):
                embed_with(unit, unit.config(name=name), given, 0)
    if unit.embed is not None:  # a batch of its own for the query cells is enough
        other = CellCounts(cells.counts, np.ones(90, dtype=np.int64))
        annotate_with(unit, unit.config(name=name), one, labels, other, 0)


def test_a_unit_is_refused_what_it_cannot_answer() -> None:
    cells, labels = cells_of()
    unit = baseline("majority")
    with pytest.raises(ConfigError, match=r"'majority' has no embedding .* take one of .*combat"):
        embed_with(unit, unit.config(name="majority"), cells, 0)
    unit = baseline("celltype_jitter")
    with pytest.raises(
        ConfigError, match=r"'celltype_jitter' gives no labels .* one of batch_only"
    ):
        annotate_with(unit, unit.config(name="celltype_jitter"), cells, labels, cells, 0)
    with pytest.raises(ConfigError, match="'celltype_jitter' is made from the true labels; give"):
        embed_with(unit, unit.config(name="celltype_jitter"), cells, 0)
    unit = baseline("pca")
    with pytest.raises(ConfigError, match="'pca' is not fitted to labels; annotate_with lets the"):
        unit.fit(unit.config(name="pca"), cells.counts, labels, 0)


def test_only_a_control_made_from_the_truth_is_shown_it() -> None:
    cells, labels = cells_of()
    seen: list[object] = []

    def spy(config: object, given: CellCounts, query: object, seed: int) -> tuple[object, None]:
        seen.extend([config, given, query, seed])
        return np.zeros((given.num_cells, 1), dtype=np.float32), None

    unit = replace(baseline("pca"), embed=spy)  # type: ignore[arg-type]
    embed_with(unit, unit.config(name="pca"), cells, 4, truth=labels)
    assert seen[1:] == [cells, None, 4]
    assert not any(item is labels for item in seen)


def test_units_that_contradict_themselves_are_refused() -> None:
    jitter = baseline("celltype_jitter")
    with pytest.raises(ConfigError, match=r"made from the truth .* can be 'control' only, not 'ba"):
        replace(jitter, family="baseline")
    with pytest.raises(ConfigError, match="'x' offers none of fit, label, embed and embed_labels"):
        BaselineUnit(name="x", config=jitter.config, seed_scope="", title="")


@pytest.mark.parametrize("name", ["pca", "hvg", "noise", "harmony", "combat", "random_projection"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.log1p(), "these are not whole numbers"),
        (lambda c: -c, "these hold negative or missing values"),
        (lambda c: c[:0], "no cell to embed"),
    ],
)
def test_cells_that_cannot_be_embedded_are_refused(
    name: str, spoil: Callable[[sparse.csr_matrix], sparse.csr_matrix], message: str
) -> None:
    cells, _ = cells_of()
    counts = spoil(cells.counts)
    spoilt = CellCounts(counts, np.arange(counts.shape[0]) % 2)
    unit = baseline(name)
    with pytest.raises(DataError, match=message):
        embed_with(unit, build_section(unit.config, {"name": name}), spoilt, 0)
