"""What fine-tuning prepares: blind to test cells, without their labels, refusing what leaks."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellray.baselines.base import check_training
from cellray.core.errors import DataError
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.soma import open_store
from cellray.data.stats import check_coverage, coverage
from cellray.data.vocab import Vocab
from cellray.infer.load import block_of
from cellray.train.checkpoint import Manifest, write_checkpoint
from cellray.train.finetune import Finetuning, prepare_finetune
from cellray.train.job import for_workers
from helpers_cells import known_cells
from helpers_guards import finetune_run, with_copies

SECRET = "label-of-test-cells-only"


def prepared(uri: str, folder: Path, **more: dict) -> Finetuning:
    return prepare_finetune(finetune_run(uri, folder, **more))


def held_out(cells: ad.AnnData) -> np.ndarray:
    return (cells.obs["donor"] == "d3").to_numpy()


def altered(seed: int) -> ad.AnnData:
    """Known cells whose test cells have other counts and other labels."""
    cells, rng = known_cells(), np.random.default_rng(seed)
    test = np.flatnonzero(held_out(cells))
    counts = cells.X.toarray()
    counts[test] = rng.poisson(rng.gamma(0.5, 20.0, counts[test].shape))
    cells.X = type(cells.X)(counts)
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    labels[test] = rng.permutation([*labels[test][:-5], *["type9"] * 5])
    cells.obs["cell_type"] = pd.Categorical(labels)
    return cells


@pytest.mark.parametrize("vocab_genes", [0, 25])
def test_what_is_fitted_does_not_depend_on_test_cells(ingested, tmp_path, vocab_genes):
    """Medians, variable genes, classes, split and order: equal bit by bit."""
    stores = [ingested(known_cells(), "plain"), ingested(altered(1), "altered")]
    first, second = (
        prepared(uri, tmp_path / "runs", data={"uri": uri, "vocab_genes": vocab_genes})
        for uri in stores
    )
    one, two = first.job, second.job
    assert one.data.source.vocab.gene_ids == two.data.source.vocab.gene_ids
    assert len(one.data.source.vocab) == (vocab_genes or 60)
    assert one.manifest.vocab_fingerprint == two.manifest.vocab_fingerprint
    np.testing.assert_array_equal(one.data.source.vocab.medians, two.data.source.vocab.medians)
    assert first.targets.classes == second.targets.classes == ("type0", "type1", "type2")
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(first.split, part), getattr(second.split, part))
    assert first.split.split_sha256 == second.split.split_sha256
    learnt = np.concatenate([first.split.train, first.split.validation])
    rows = np.searchsorted(first.cells.joinids, learnt)
    np.testing.assert_array_equal(
        one.data.source.codes["label"][rows], two.data.source.codes["label"][rows]
    )
    assert one.steps == two.steps
    for epoch in (0, 3):
        for ours, theirs in zip(
            one.data.plan.rows(epoch, 0, 4), two.data.plan.rows(epoch, 0, 4), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert one.data.fingerprint != two.data.fingerprint  # which is over all cells: it did change


def test_a_job_holds_no_label_of_a_test_cell(ingested, tmp_path):
    """The store it names does hold the column: a worker could read it, but nothing in it does."""
    cells = known_cells()
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    labels[np.flatnonzero(held_out(cells))[::2]] = SECRET
    cells.obs["cell_type"] = pd.Categorical(labels)
    uri = ingested(cells)
    found = prepared(uri, tmp_path / "runs")
    assert SECRET in found.cells.obs["cell_type"].tolist()  # the driver, which scores, has it
    shipped = pickle.dumps(for_workers(found.job))
    assert SECRET.encode() not in shipped
    assert b"type0" in shipped  # a name of a training class is there: the search does find names
    codes = found.job.data.source.codes["label"]
    test = np.isin(found.cells.joinids, found.split.test)
    assert (codes[test] == -1).all()
    assert (codes[~test] >= 0).all()
    assert SECRET not in found.targets.classes
    assert any(
        "are not among the training cells and count as wrong" in w for w in found.job.data.warnings
    )


def test_planted_copies_stop_a_fine_tuning(ingested, tmp_path):
    uri = ingested(with_copies(3))
    with pytest.raises(DataError, match="3 of 60 test cells have the same counts"):
        prepared(uri, tmp_path / "runs")
    task = {
        "name": "annotation",
        "split": {"column": "donor", "test_values": ["d3"], "validation_fraction": 0.2},
        "duplicates": "drop_train",
    }
    found = prepared(uri, tmp_path / "runs", task=task)
    assert len(found.job.data.plan.joinids) + len(found.job.data.validation) == 177
    assert any("are left out of training" in told for told in found.job.data.warnings)


def test_a_covariate_that_is_the_label_stops_a_fine_tuning(ingested, tmp_path):
    cells = known_cells()
    cells.obs["plate"] = [f"plate-{name}" for name in cells.obs["cell_type"].astype(str)]
    uri = ingested(cells)
    with pytest.raises(DataError, match="covariate 'plate' gives the label away"):
        prepared(uri, tmp_path / "runs", data={"uri": uri, "covariates": ["plate"]})


def checkpoint(folder: Path, run: Finetuning, genes: int, **more: object) -> str:
    """A checkpoint of the run's family over the first so many genes."""
    ids = [f"ENSG{i:011d}" for i in range(genes)]
    specials = run.job.data.source.vocab.specials
    vocab = Vocab.from_genes(ids, [""] * genes, specials=list(specials))
    vocab = vocab.with_medians(np.ones(len(vocab), dtype=np.float32))
    source = run.job.manifest
    manifest = Manifest(
        family=source.family,
        model=source.model,
        tokenizer=source.tokenizer,
        objective=source.objective,
        vocab_fingerprint=vocab.fingerprint,
        data_fingerprint="",
        **more,
    )
    from cellray.train.checkpoint import model_of

    write_checkpoint(
        folder, manifest, vocab=vocab, weights=dict(model_of(manifest, vocab).state_dict())
    )
    return str(folder)


def from_checkpoint(uri: str, folder: Path, init_from: str, **data: object) -> Finetuning:
    run = finetune_run(uri, folder, data={"uri": uri, **data})
    from cellray.runs import build_run

    raw = {
        key: value
        for key, value in run.model_dump().items()
        if key not in ("model", "tokenizer") and value is not None
    }
    return prepare_finetune(build_run("finetune", {**raw, "init_from": init_from}))


def test_a_checkpoint_that_loses_most_counts_is_refused(small_store, tmp_path):
    plain = prepared(small_store, tmp_path / "runs")
    few = checkpoint(tmp_path / "few", plain, 12)
    with pytest.raises(DataError, match=r"covers only \d\d\.\d% of the counts \(12 of 60 genes"):
        from_checkpoint(small_store, tmp_path / "runs", few)
    allowed = from_checkpoint(small_store, tmp_path / "runs", few, allow_gene_loss=True)
    assert any("are lost to the model" in told for told in allowed.job.data.warnings)
    chosen = checkpoint(tmp_path / "chosen", plain, 12, chosen_genes=True)
    on_purpose = from_checkpoint(small_store, tmp_path / "runs", chosen)
    assert any("are lost to the model" in told for told in on_purpose.job.data.warnings)
    assert on_purpose.job.manifest.chosen_genes
    most = checkpoint(tmp_path / "most", plain, 55)
    assert from_checkpoint(small_store, tmp_path / "runs", most).job.data.warnings == []


def logged() -> ad.AnnData:
    cells = known_cells()
    cells.X = cells.X.copy()
    cells.X.data = np.log1p(cells.X.data)
    return cells


def test_log_data_is_refused_at_every_entry(tmp_path):
    cells = logged()
    cells.write_h5ad(tmp_path / "log.h5ad")
    with pytest.raises(DataError, match="looks log-normalised.*Raw counts are needed"):
        ingest(IngestConfig(files=[str(tmp_path / "log.h5ad")], uri=str(tmp_path / "store")))
    vocab = Vocab.from_genes(list(cells.var_names), [""] * 60, specials=())
    with pytest.raises(DataError, match=r"needs raw counts, but the matrix holds 1\.386"):
        block_of(cells, vocab)
    with pytest.raises(DataError, match="take raw counts"):
        check_training(cells.X, np.zeros(240, dtype=np.int64))


def test_a_store_of_log_values_is_refused(small_store, tmp_path):
    """What another tool wrote, or the wrong layer: seen in the cells that are looked at anyway."""
    store = open_store(small_store)
    every = np.arange(60, dtype=np.int32)
    read = type(store).read_block

    def logged_block(self, joinids, gene_map, *, obs=None):
        block = read(self, joinids, gene_map, obs=obs)
        return replace(block, counts=np.log1p(block.counts))

    vocab = Vocab.from_genes(store.var()["feature_id"].tolist(), [""] * 60, specials=())
    assert check_coverage(coverage(store, vocab), vocab) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "read_block", logged_block)
        assert store.read_block(np.arange(3), every).counts.max() < 10
        with pytest.raises(DataError, match=r"0\.0% of the values are whole numbers.*data.layer"):
            check_coverage(coverage(store, vocab), vocab)
        with pytest.raises(DataError, match="look like logarithms or shares"):
            prepared(small_store, tmp_path / "runs")
