"""The synthetic atlas as a store: the same for any block size and number of workers, and whole."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiledbsoma

from cellray.cli import main
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data import synthetic
from cellray.data.dataset_name import dataset_id_of, is_synthetic
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.soma import open_store
from cellray.data.synthetic import (
    SynthesizeConfig,
    load_truth,
    synthesize,
    synthesize_anndata,
)
from cellray.data.synthetic_blocks import BlockJob, write_blocks

KEYS = {
    "num_cells": 700,
    "num_genes": 400,
    "mean_genes_per_cell": 80.0,
    "num_lineages": 2,
    "num_types": 4,
    "markers_per_lineage": 5,
    "markers_per_type": 5,
    "num_datasets": 3,
    "num_tissues": 2,
    "num_regulators": 5,
    "targets_per_regulator": 6,
    "num_pathways": 3,
    "genes_per_pathway": 10,
    "num_knockouts": 2,
    "perturbed_fraction": 0.3,
    "cells_per_block": 100,
    "workers": 1,
}


def config(**keys) -> SynthesizeConfig:
    return build_section(SynthesizeConfig, KEYS | keys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("atlas")


@pytest.fixture(scope="module")
def uri(folder) -> str:
    """The atlas in blocks of 100, made in this process."""
    synthesize(config(uri=str(folder / "one")))
    return str(folder / "one")


def test_made_cells_say_so_in_tables(uri):
    assert is_synthetic(open_store(uri))
    assert dataset_id_of(open_store(uri)) == "synthetic/one"
    assert dataset_id_of(open_store(uri), "made") == "synthetic/made"
    assert dataset_id_of(open_store(uri), "synthetic/made") == "synthetic/made"


def content(uri: str) -> tuple[str, pd.DataFrame, pd.DataFrame]:
    store = open_store(uri)
    with tiledbsoma.open(f"{uri}/ms/RNA/var") as frame:
        var = frame.read().concat().to_pandas()
    return store.fingerprint(np.arange(store.num_cells)), store.obs(), var


def test_the_store_does_not_depend_on_the_block_size(uri, folder):
    synthesize(config(uri=str(folder / "big"), cells_per_block=1000))
    assert_same(uri, str(folder / "big"))


@pytest.mark.ray
def test_the_store_does_not_depend_on_the_number_of_workers(uri, folder, ray_cluster):
    synthesize(config(uri=str(folder / "three"), workers=3))
    assert_same(uri, str(folder / "three"))


def assert_same(one: str, two: str) -> None:
    first, second = content(one), content(two)
    assert first[0] == second[0]
    pd.testing.assert_frame_equal(first[1], second[1])
    pd.testing.assert_frame_equal(first[2], second[2])
    everything = np.arange(400, dtype=np.int32)
    blocks = [open_store(u).read_block(np.arange(700), everything) for u in (one, two)]
    assert np.array_equal(blocks[0].indptr, blocks[1].indptr)
    assert np.array_equal(blocks[0].genes, blocks[1].genes)
    assert np.array_equal(blocks[0].counts, blocks[1].counts)


def test_the_anndata_has_the_cells_of_the_store(uri):
    made, store = synthesize_anndata(config()), open_store(uri)
    block = store.read_block(np.arange(700), np.arange(400, dtype=np.int32))
    assert np.array_equal(block.indptr, made.X.indptr)
    assert np.array_equal(block.genes, made.X.indices)
    assert np.array_equal(block.counts, made.X.data)
    obs = store.obs().drop(columns="soma_joinid").set_index("obs_id")
    assert list(obs.index) == list(made.obs_names)
    assert set(obs.columns) == set(made.obs.columns)
    for name in obs.columns:
        assert obs[name].astype(str).tolist() == made.obs[name].astype(str).tolist(), name
    assert list(store.var()["feature_id"]) == list(made.var_names)


def test_obs_and_var_count_what_x_holds(uri):
    store = open_store(uri)
    block = store.read_block(np.arange(700), np.arange(400, dtype=np.int32))
    obs = store.obs()
    assert obs["nnz"].tolist() == np.diff(block.indptr).tolist()
    assert obs["raw_sum"].to_numpy() == pytest.approx(block.library_sizes)
    assert set(obs["n_measured_vars"]) == {400}
    _, _, var = content(uri)
    assert var["nnz"].tolist() == np.bincount(block.genes, minlength=400).tolist()
    assert store.ledger[0]["dataset_id"] == "dataset_000"
    assert sum(entry["cells"] for entry in store.ledger) == 700
    assert sum(e["counts"] for e in store.ledger) == pytest.approx(float(block.counts.sum()))


def test_obs_is_written_in_pieces_with_only_the_labels_that_occur(folder, uri, monkeypatch):
    monkeypatch.setattr(synthetic, "_OBS_ROWS", 64)
    synthesize(config(uri=str(folder / "pieces")))
    assert_same(uri, str(folder / "pieces"))
    synthesize(config(uri=str(folder / "few"), num_cells=20, num_types=40, markers_per_type=1))
    facts = open_store(str(folder / "few")).describe()["obs_columns"]
    occurring = open_store(str(folder / "few")).obs()["cell_type"].nunique()
    assert facts["cell_type"]["distinct"] == occurring < 20


def test_the_truth_travels_with_the_store(uri, folder):
    planted = synthesize_anndata(config()).uns["truth"]
    moved = folder / "elsewhere" / "moved"
    moved.parent.mkdir()
    Path(uri).rename(moved)
    try:
        found = load_truth(str(moved))
    finally:
        moved.rename(uri)
    assert found.config == planted["config"] | {"uri": uri}
    for name in ("genes", "types", "markers", "edges", "activities", "pathways", "knockouts",
                 "datasets", "donors"):  # fmt: skip
        pd.testing.assert_frame_equal(
            getattr(found, name), planted[name].reset_index(drop=True), check_dtype=False
        )
    assert np.array_equal(found.type_log_fold, planted["type_log_fold"])
    assert np.array_equal(found.batch_log_fold, planted["batch_log_fold"])
    assert found.type_log_fold.shape == (4, 400)
    assert found.batch_log_fold.shape == (3, 400)


def test_a_truth_without_edges_has_an_empty_table(folder):
    synthesize(config(uri=str(folder / "noedge"), num_regulators=0, num_knockouts=0, num_cells=30))
    assert list(load_truth(str(folder / "noedge")).edges.columns) == [
        "regulator",
        "target",
        "weight",
    ]
    assert len(load_truth(str(folder / "noedge")).knockouts) == 0


def test_a_file_can_be_ingested_into_an_atlas(folder, tmp_path):
    target = str(folder / "grown")
    synthesize(config(uri=target, num_cells=60))
    other = synthesize_anndata(config(num_cells=50, seed=9))
    del other.uns["truth"]
    other.obs = other.obs[["cell_type"]]
    other.write_h5ad(tmp_path / "other.h5ad")
    report = ingest(IngestConfig(files=[str(tmp_path / "other.h5ad")], uri=target))
    assert (report.num_cells, report.num_genes) == (110, 400)
    with pytest.raises(DataError, match="is not a synthetic atlas"):
        load_truth(target)
    same = synthesize_anndata(config(num_cells=60))
    first = same[same.obs["dataset_id"] == "dataset_000"].copy()
    del first.uns["truth"]
    first.write_h5ad(tmp_path / "again.h5ad")
    with pytest.raises(DataError, match="holds the same cells and counts as 'synthetic:dataset_0"):
        ingest(IngestConfig(files=[str(tmp_path / "again.h5ad")], uri=target))


def test_a_store_that_is_there_is_not_replaced_unasked(uri, folder, tmp_path):
    with pytest.raises(DataError, match="set overwrite = true"):
        synthesize(config(uri=uri))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(DataError, match="is not a synthetic atlas: overwrite replaces nothing"):
        synthesize(config(uri=str(tmp_path / "mine"), overwrite=True))
    assert (tmp_path / "mine" / "file").read_text() == "x"
    synthesize(config(uri=str(folder / "twice"), num_cells=40))
    synthesize(config(uri=str(folder / "twice"), num_cells=50, overwrite=True))
    assert open_store(str(folder / "twice")).num_cells == 50
    with pytest.raises(ConfigError, match="uri is missing"):
        synthesize(config())
    with pytest.raises(DataError, match="writes to a local folder, not to 's3://a/b'"):
        synthesize(config(uri="s3://a/b"))


def test_an_atlas_that_fails_leaves_nothing_behind(tmp_path):
    def stop(line: str) -> None:
        if "of 700 cells" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(config(uri=str(tmp_path / "x")), progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_workers_have_stopped_writing_when_an_atlas_fails(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setattr(synthetic, "_PROGRESS_EVERY_S", 0.0)

    def stop(line: str) -> None:
        if " of 20,000 cells" in line:
            raise KeyboardInterrupt

    keys = {"uri": str(tmp_path / "x"), "num_cells": 20_000, "cells_per_block": 1000}
    with pytest.raises(KeyboardInterrupt):
        synthesize(config(**keys, workers=3), progress=stop)
    assert list(tmp_path.iterdir()) == []
    time.sleep(1.0)
    assert list(tmp_path.iterdir()) == []


def test_progress_says_cells_a_second_and_what_is_left(tmp_path):
    lines: list[str] = []
    report = synthesize(config(uri=str(tmp_path / "x")), progress=lines.append)
    assert lines[0].startswith("atlas: 700 cells x 400 genes, median library size ")
    assert lines[-1].startswith("700 of 700 cells, ")
    assert lines[-1].endswith("cells/s, ETA 0 s")
    assert report.num_cells == 700
    assert report.genes_per_cell == pytest.approx(80, rel=0.05)


def test_other_stores_have_no_truth(small_store, tmp_path):
    with pytest.raises(DataError, match="is not a synthetic atlas: no truth was planted in it"):
        load_truth(small_store)
    with pytest.raises(DataError, match="no store at"):
        load_truth(str(tmp_path / "nothing"))


@pytest.mark.ray
def test_a_worker_that_fails_is_reported(tmp_path, ray_cluster):
    job = BlockJob(config(), str(tmp_path / "nowhere"), 100.0)
    with pytest.raises(DataError, match="making the atlas failed in a worker: .*nowhere"):
        list(write_blocks(job, workers=2))


def test_the_command_makes_an_atlas(tmp_path, capsys, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    small = str(repository / "jobs" / "configs" / "synthesize" / "small.toml")
    assert main(["synthesize", small, "uri=made", "num_cells=300", "--check"]) == 0
    assert "disk: about 0 MB" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main(["synthesize", small, "uri=made", "num_cells=300", "workers=1"]) == 0
    assert "store: " in capsys.readouterr().out
    assert open_store("made").num_cells == 300
    assert load_truth("made").config["num_cells"] == 300
    assert main(["synthesize", small, "uri=made", "--check"]) == 1
    assert "set overwrite = true" in capsys.readouterr().err


def peak_mb(uri: str, num_cells: int) -> float:
    """Peak memory of a process that makes an atlas."""
    code = (
        "import resource, sys\n"
        "from cellray.data.synthetic import SynthesizeConfig, synthesize\n"
        "synthesize(SynthesizeConfig(uri=sys.argv[1], num_cells=int(sys.argv[2]), num_genes=2000,"
        " mean_genes_per_cell=150.0, cells_per_block=2500, num_types=8, workers=1))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, uri, str(num_cells)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def test_memory_does_not_grow_with_the_number_of_cells(tmp_path):
    few = peak_mb(str(tmp_path / "few"), 5_000)
    many = peak_mb(str(tmp_path / "many"), 50_000)
    assert many < 1.1 * few
