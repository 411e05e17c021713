"""Ingest in parts: the same store for any number of workers, and going on where one was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import tiledbsoma
from cells_by_hand import dense, make_adata, make_counts
from scipy import sparse

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data import parts as parts_module
from cellray.data import schema
from cellray.data.existing import stored_library_sizes, stored_medians, stored_sketch
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.ingest_job import check_ingest
from cellray.data.ingest_tasks import num_workers
from cellray.data.schema import STAGING_SUFFIX
from cellray.data.soma import open_store
from cellray.data.stats import nonzero_medians
from cellray.runs import build_run

COUNTS = make_counts(300, 25, seed=7)
GENES = [f"ENSG{i:011d}" for i in range(25)]


def run(files, uri, said=None, **keys):
    files = [files] if isinstance(files, str) else files
    config = IngestConfig(files=files, uri=str(uri), **keys)
    return ingest(config, progress=(lambda _: None) if said is None else said.append)


def content(uri):
    """All that a store holds, in an order of its own."""
    store = open_store(str(uri))
    rows = np.arange(store.num_cells)
    every_gene = np.arange(store.num_genes, dtype=np.int32)
    with tiledbsoma.open(str(uri)) as experiment:
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
        x = experiment.ms["RNA"].X["raw"]
        assert x.nnz == sum(len(t) for t in x.read().tables())
        metadata = {k: v for k, v in experiment.metadata.items() if k.startswith("cellray")}
        ledger = json.loads(metadata[schema.META_LEDGER])
        metadata[schema.META_LEDGER] = [{**entry, "added_at": ""} for entry in ledger]
    return (
        dense(store.read_block(rows, every_gene), store.num_genes).tobytes(),
        store.obs().to_csv(),
        var.to_csv(),
        stored_sketch(str(uri)).to_bytes(),
        metadata,
    )


@pytest.fixture
def three(write_h5ad):
    cut = [0, 100, 170, 300]
    return [
        write_h5ad(
            f"f{i}.h5ad",
            COUNTS[a:b, i : 20 + i],
            GENES[i : 20 + i],
            prefix=f"f{i}_",
            obs={"donor": [f"d{j % 3}" for j in range(a, b)]},
        )
        for i, (a, b) in enumerate(pairwise(cut))
    ]


@pytest.mark.ray
@pytest.mark.parametrize("keys", [{}, {"min_genes_per_cell": 7, "duplicate_cells": "drop"}])
def test_the_store_is_the_same_for_any_number_of_workers(ray_cluster, three, tmp_path, keys):
    found = []
    for workers in (1, 2, 3):
        uri = tmp_path / f"s{workers}"
        report = run(three, uri, workers=workers, cells_per_block=4, **keys)
        assert report.workers == workers
        found.append(content(uri))
    assert found[0] == found[1] == found[2]
    if not keys:
        matrix = np.frombuffer(found[0][0], np.float32).reshape(300, -1)
        assert (matrix[:100, :20] == COUNTS[:100, :20]).all()
        assert matrix.sum() == sum(
            COUNTS[a:b, i : 20 + i].sum()
            for i, (a, b) in enumerate([(0, 100), (100, 170), (170, 300)])
        )


@pytest.mark.ray
def test_an_error_in_a_task_is_the_error_of_the_ingest(ray_cluster, three, tmp_path, monkeypatch):
    monkeypatch.setattr("cellray.data.h5ad._PROBE_VALUES", 4)
    with h5py.File(three[1], "r+") as file:
        file["X/data"][30] = -3
    with pytest.raises(DataError, match=r"f1.h5ad' layer X, .* negative values, e.g. -3"):
        run(three, tmp_path / "s", workers=2, cells_per_block=2)
    assert not (tmp_path / "s").exists()


def test_as_many_workers_as_pay(monkeypatch):
    monkeypatch.setattr("cellray.data.ingest_tasks._cpus", lambda: 8)
    assert [num_workers(0, n) for n in (10, 39_999, 40_000, 10**7)] == [1, 1, 2, 8]
    assert num_workers(3, 10) == 3


def test_the_files_before_an_error_are_taken_over(three, tmp_path, monkeypatch):
    monkeypatch.setattr("cellray.data.h5ad._PROBE_VALUES", 4)
    with h5py.File(three[2], "r+") as file:
        kept = file["X/data"][30]
        file["X/data"][30] = 0.5
    with pytest.raises(DataError, match="log-normalised"):
        run(three, tmp_path / "s", workers=1)
    assert not (tmp_path / "s").exists()
    with h5py.File(three[2], "r+") as file:
        file["X/data"][30] = kept
    said = []
    report = run(three, tmp_path / "s", said, workers=1)
    assert report.parts_taken_over == 2
    assert (
        "written: 2 of 3 parts (170 cells) taken over from an ingest that was interrupted" in said
    )
    assert said[-1].startswith("file 3/3: 300 of 300 cells written, ")
    run(three, tmp_path / "t", workers=1)
    assert content(tmp_path / "s") == content(tmp_path / "t")
    assert not (tmp_path / f"s{STAGING_SUFFIX}").exists()


KILLED = """
import os, signal, sys
from cellray.data import parts as module
from cellray.data.ingest import IngestConfig, ingest
real, seen = module.write_rows, []
def write(*args):
    real(*args)
    seen.append(1)
    if len(seen) == 70:
        os.kill(os.getpid(), signal.SIGKILL)
module.write_rows = write
ingest(IngestConfig(files=sys.argv[2:], uri=sys.argv[1], cells_per_block=2, workers=1))
"""


def kill(uri, files):
    done = subprocess.run([sys.executable, "-c", KILLED, str(uri), *files], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_ingest_goes_on_where_it_was(three, tmp_path):
    uri = tmp_path / "s"
    run(three[0], uri, workers=1)
    before = content(uri)
    kill(uri, three[1:])
    assert content(uri) == before
    said = []
    report = run(three[1:], uri, said, cells_per_block=2, workers=1)
    assert report.parts_taken_over == 17  # 35 blocks a file, 4 a part: 9 parts, and 8 of 9
    run(three, tmp_path / "t", workers=1)
    mine, whole = content(uri), content(tmp_path / "t")
    assert mine[:4] == whole[:4]


def test_parts_of_another_command_are_discarded(three, tmp_path):
    kill(tmp_path / "killed", three)
    left = tmp_path / f"killed{STAGING_SUFFIX}"
    for change in ("config", "touched", "other files"):
        uri = tmp_path / change
        shutil.copytree(left, tmp_path / f"{change}{STAGING_SUFFIX}")
        said, files, keys = [], three, {}
        if change == "config":
            keys = {"min_genes_per_cell": 8}
        elif change == "touched":
            for path in three:
                os.utime(path, (1, 1))
        else:
            files = three[1:]
        report = run(files, uri, said, cells_per_block=2, workers=1, **keys)
        assert report.parts_taken_over == 0
        assert any("parts of another, interrupted ingest are discarded" in line for line in said)
        run(files, tmp_path / "clean" / change, cells_per_block=64, workers=1, **keys)
        assert content(uri) == content(tmp_path / "clean" / change)


def test_quality_rules_and_their_report(write_h5ad, tmp_path):
    counts = np.zeros((6, 4), np.float32)
    counts[:, 0] = [5, 5, 0, 1, 5, 5]
    counts[:, 1] = [5, 5, 0, 0, 5, 4]
    counts[:, 3] = [0, 90, 0, 0, 10, 1]  # MT-ND1
    genes = ["ENSG00000254647", "ENSG00000141510", "ENSG00000000003", "ENSG00000198888"]
    obs = {"is_primary_data": [True, True, True, True, True, False]}
    path = write_h5ad("a.h5ad", counts, genes, obs=obs)
    rules = {
        "min_genes_per_cell": 1,
        "min_counts_per_cell": 2,
        "max_mito_fraction": 0.5,
        "primary_only": True,
    }
    report = run(path, tmp_path / "s", **rules)
    file = report.files[0]
    assert file.dropped == {
        "primary_only": 1,
        "min_genes_per_cell": 1,
        "min_counts_per_cell": 1,
        "max_mito_fraction": 1,
    }
    assert (file.cells_read, file.cells, file.cells_dropped) == (6, 2, 4)
    assert (file.counts, file.counts_lost) == (30, 100 + 0 + 1 + 10)
    assert open_store(str(tmp_path / "s")).obs(["obs_id"])["obs_id"].tolist() == ["cell0", "cell4"]
    assert open_store(str(tmp_path / "s")).ledger[0]["dropped"] == file.dropped
    lines = report.lines()
    assert (
        "  6 cells read, 4 left out (1 by primary_only, 1 by min_genes_per_cell, 1 by " in lines[1]
    )
    assert "30 counts written, 111 lost in cells left out" in lines[1]
    whole = run(path, tmp_path / "t", primary_only=True)
    assert whole.files[0].dropped == {"primary_only": 1}


def test_show_tells_the_sum_over_all_files(three, tmp_path):
    from cellray.ops.show import show

    few = int(((COUNTS[:100, :20] > 0).sum(axis=1) < 7).sum())
    run(three[0], tmp_path / "s", min_genes_per_cell=7)
    run(three[1], tmp_path / "s")
    told = "\n".join(show(str(tmp_path / "s")))
    sum_line = f"170 cells read, {170 - few} written, {few} left out ({few} by min_genes_per_cell)"
    assert f"in all: {sum_line}, 0 exact duplicates" in told
    lost = COUNTS[:100, :20][(COUNTS[:100, :20] > 0).sum(axis=1) < 7].sum()
    assert f"counts written, {lost:.0f} lost in cells left out" in told
    median = np.median(open_store(str(tmp_path / "s")).obs()["raw_sum"])
    assert f"0.5: {median:.0f}" in told
    assert "measurements: RNA" in told


@pytest.fixture
def copies(write_h5ad):
    """Cells 0 1 2 | 3 4 5: 2 is empty, 3 has 0's counts, 4 has 3's, 5 is empty."""
    counts = np.array([[1, 2, 0], [3, 0, 0], [0, 0, 0]], np.float32)
    more = np.array([[0, 2, 1], [0, 2, 1], [0, 0, 0]], np.float32)
    other_order = [GENES[2], GENES[1], GENES[0]]
    return [
        write_h5ad("a.h5ad", counts, GENES[:3], prefix="a"),
        write_h5ad("b.h5ad", more, other_order, prefix="b"),
    ]


@pytest.mark.parametrize("at_once", [True, False])
def test_exact_duplicates_are_flagged(copies, tmp_path, at_once):
    for files in [copies] if at_once else [[copies[0]], [copies[1]]]:
        report = run(files, tmp_path / "s")
    frame = open_store(str(tmp_path / "s")).obs()
    assert frame["is_duplicate"].tolist() == [False, False, False, True, True, False]
    assert report.files[-1].duplicates == 2
    assert "  2 exact duplicates of earlier cells, flagged" in report.lines()


@pytest.mark.parametrize("at_once", [True, False])
def test_exact_duplicates_are_dropped(copies, tmp_path, at_once):
    for files in [copies] if at_once else [[copies[0]], [copies[1]]]:
        report = run(files, tmp_path / "s", duplicate_cells="drop")
    frame = open_store(str(tmp_path / "s")).obs()
    assert frame["obs_id"].tolist() == ["a0", "a1", "a2", "b2"]
    assert (report.files[-1].dropped, report.files[-1].duplicates) == ({"duplicate_cells": 2}, 2)
    assert "is_duplicate" not in frame


def test_duplicates_may_be_kept(copies, tmp_path):
    report = run(copies, tmp_path / "s", duplicate_cells="keep")
    frame = open_store(str(tmp_path / "s")).obs()
    assert len(frame) == 6
    assert "is_duplicate" not in frame
    assert report.files[1].duplicates == 2


def test_a_duplicate_of_a_cell_that_a_rule_drops_is_none(write_h5ad, tmp_path):
    obs = {"is_primary_data": [False, True, True]}
    path = write_h5ad("a.h5ad", np.ones((3, 4), np.float32), obs=obs)
    report = run(path, tmp_path / "s", duplicate_cells="drop", primary_only=True)
    assert report.files[0].dropped == {"primary_only": 1, "duplicate_cells": 1}
    assert open_store(str(tmp_path / "s")).obs()["obs_id"].tolist() == ["cell1"]


def test_figures_of_all_cells_are_stored_and_grow_with_the_store(three, tmp_path):
    run(three[:2], tmp_path / "s")
    run(three[2], tmp_path / "s")
    run(three, tmp_path / "t", cells_per_block=13)
    uri = str(tmp_path / "s")
    assert stored_sketch(uri).to_bytes() == stored_sketch(str(tmp_path / "t")).to_bytes()
    store = open_store(uri)
    every_gene = np.arange(store.num_genes, dtype=np.int32)
    exact = nonzero_medians(store, np.arange(300), every_gene, store.num_genes)
    assert np.abs(stored_medians(uri) / exact - 1).max() < 0.004
    sizes = stored_library_sizes(uri)
    assert sizes[0.5] == np.median(store.obs()["raw_sum"])
    assert sizes[0.99] == np.quantile(store.obs()["raw_sum"], 0.99)


def test_a_store_without_a_sketch_gets_one_when_it_is_appended_to(three, tmp_path):
    run(three[:2], tmp_path / "s")
    with tiledbsoma.open(str(tmp_path / "s/ms/RNA"), "w") as measurement:
        del measurement["varm"]
    assert stored_sketch(str(tmp_path / "s")) is None
    run(three[2], tmp_path / "s")
    run(three, tmp_path / "t")
    assert (
        stored_sketch(str(tmp_path / "s")).to_bytes()
        == stored_sketch(str(tmp_path / "t")).to_bytes()
    )


def test_figures_of_what_is_not_there(three, tmp_path):
    run(three[0], tmp_path / "s")
    for read in (stored_sketch, stored_medians, stored_library_sizes):
        with pytest.raises(DataError, match="no store at"):
            read(str(tmp_path / "none"))
        with pytest.raises(DataError, match="has no measurement 'ATAC'"):
            read(str(tmp_path / "s"), measurement="ATAC")


def test_medians_of_real_cells_are_within_the_bound(tmp_path):
    folder = Path(__file__).parents[2] / "data" / "pancreas"
    run([str(folder / f"human{i}.h5ad") for i in (1, 2, 3)], tmp_path / "s", workers=1)
    store = open_store(str(tmp_path / "s"))
    every_gene = np.arange(store.num_genes, dtype=np.int32)
    exact = nonzero_medians(store, np.arange(store.num_cells), every_gene, store.num_genes)
    found = stored_medians(store.uri)
    assert len(found) == store.num_genes > 10_000
    assert np.abs(found / exact - 1).max() < 0.004


def test_a_matrix_by_columns_gives_the_same_store(write_h5ad, tmp_path, monkeypatch):
    monkeypatch.setattr("cellray.data.spool._CHUNK", 100)
    rows = write_h5ad("a.h5ad", COUNTS, GENES)
    adata = make_adata(COUNTS, GENES)
    adata.X = sparse.csc_matrix(COUNTS)
    (tmp_path / "csc").mkdir()
    adata.write_h5ad(tmp_path / "csc" / "a.h5ad")
    run(rows, tmp_path / "s", cells_per_block=7)
    said = []
    run(str(tmp_path / "csc" / "a.h5ad"), tmp_path / "t", said, cells_per_block=7)
    assert "stored by columns: turning it into rows on disk" in said[0]
    assert content(tmp_path / "s")[:4] == content(tmp_path / "t")[:4]
    assert not (tmp_path / f"t{STAGING_SUFFIX}").exists()


def huge(path, rows):
    """A file whose offsets pass 2^31 without its size: what HDF5 never wrote reads as zero."""
    make_adata(np.ones((3, 5), np.float32)).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name, kind in (("data", "f4"), ("indices", "i4")):
            del file[f"X/{name}"]
            node = file["X"].create_dataset(
                name, shape=(int(rows[-1]),), chunks=(1 << 20,), dtype=kind
            )
            node[int(rows[1]) :] = np.arange(1, rows[-1] - rows[1] + 1)
        del file["X/indptr"]
        file["X"]["indptr"] = np.array(rows, np.int64)


def test_offsets_beyond_2_31(tmp_path):
    first = (1 << 31) + 10
    path = tmp_path / "a.h5ad"
    huge(path, [0, first, first + 2, first + 4])
    from cellray.data.h5ad import H5adFile

    with H5adFile(path) as file:
        found = next(block for _, block in file.blocks("X", 2, rows=(1, 3)))
        assert found.toarray().tolist() == [[0, 1, 2, 0, 0], [0, 0, 0, 3, 4]]
        with pytest.raises(
            DataError, match=r"cells 0-1 hold 2,147,483,660 values.*cells_per_block"
        ):
            next(file.blocks("X", 2))
    with pytest.raises(DataError, match=r"set cells_per_block to \d+ or less"):
        run(str(path), tmp_path / "s", workers=1)


def test_only_whole_parts_count(three, tmp_path):
    parts_module.prepare(tmp_path / "p")
    (tmp_path / "p" / "abc.123").mkdir()
    parts_module.prepare(tmp_path / "p")
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["template"]


def test_obs_of_old_and_new_anndata_are_the_same(write_h5ad, tmp_path):
    obs = {"donor": pd.Categorical(["x", None, "y"]), "n": [1, 2, 3], "f": [0.5, np.nan, 1]}
    path = write_h5ad("a.h5ad", COUNTS[:3], GENES, obs=obs)
    run(path, tmp_path / "s")
    frame = open_store(str(tmp_path / "s")).obs()
    wanted = ad.read_h5ad(path).obs
    assert frame["donor"].isna().tolist() == [False, True, False]
    assert frame["n"].tolist() == wanted["n"].tolist()
    assert frame["f"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "said", [[1, 0, 1], [1.0, 0.0, np.nan], ["True", "FALSE", "true"], pd.Categorical(list("101"))]
)
def test_copies_by_whatever_word(write_h5ad, tmp_path, said):
    path = write_h5ad("a.h5ad", COUNTS[:3, :9], obs={"is_primary_data": said})
    report = run(path, tmp_path / "s", primary_only=True)
    assert report.files[0].dropped == {"primary_only": 1}
    assert open_store(str(tmp_path / "s")).obs()["obs_id"].tolist() == ["cell0", "cell2"]


def test_a_word_that_is_neither_true_nor_false_is_refused_before_anything_is_read(
    write_h5ad, tmp_path
):
    path = write_h5ad("a.h5ad", COUNTS[:3, :9], obs={"is_primary_data": ["yes", "no", "maybe"]})
    with pytest.raises(DataError, match=r"is_primary_data holds 'yes'; it must be true or false"):
        run(path, tmp_path / "s", primary_only=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]
    assert run(path, tmp_path / "s").num_cells == 3  # the rule was not asked for


@pytest.mark.parametrize(
    ("name", "reason"),
    [("s?", r"holds '\?'"), ("a#1", "holds '#'"), ("s.ingesting", "ends in .ingesting")],
)
def test_a_path_at_which_a_store_would_be_lost_is_refused(three, tmp_path, name, reason):
    with pytest.raises(DataError, match=reason):
        run(three[0], tmp_path / name)
    assert not (tmp_path / name).exists()


def test_sums_beyond_float32_are_refused(write_h5ad, tmp_path):
    genes = ["ENSG00000000003", "ENSG00000000003.2", "ENSG00000000005"]
    path = write_h5ad("a.h5ad", np.array([[1 << 24, 1, 5]], np.float32), genes)
    with pytest.raises(DataError, match="same gene id add up to 16777216 or more"):
        run(path, tmp_path / "s", duplicate_genes="sum")
    whole = write_h5ad("b.h5ad", np.array([[1 << 24, 5]], np.float32), genes[1:])
    assert run(whole, tmp_path / "t", duplicate_genes="sum").num_cells == 1


def test_counts_of_half_precision(write_h5ad, tmp_path):
    path = write_h5ad("a.h5ad", COUNTS[:3, :9])
    adata = ad.read_h5ad(path)
    adata.X = adata.X.toarray().astype(np.float16)
    adata.write_h5ad(tmp_path / "half.h5ad")
    run(str(tmp_path / "half.h5ad"), tmp_path / "s")
    store = open_store(str(tmp_path / "s"))
    block = store.read_block(np.arange(3), np.arange(9, dtype=np.int32))
    assert np.array_equal(dense(block, 9), COUNTS[:3, :9])


def test_a_rule_about_genes_that_are_not_there_is_refused(three, tmp_path):
    with pytest.raises(DataError, match=r"max_mito_fraction = 0.2 would leave out no cell: no gen"):
        run(three[0], tmp_path / "s", max_mito_fraction=0.2)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "uri", ["s3://", "s3:/bucket/x", "s3:", "gs:///", "census:stable/homo_sapiens"]
)
def test_an_address_that_is_none_makes_no_folder(three, tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="bucket|release of the Census"):
        run(three[0], uri)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ConfigError, match="uri"):
        build_section(IngestConfig, {"files": three, "uri": ""})


def test_a_link_to_a_store_stays_one(three, tmp_path):
    run(three[0], tmp_path / "s")
    (tmp_path / "link").symlink_to(tmp_path / "s")
    run(three[1], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_store(str(tmp_path / "s")).num_cells == open_store(str(tmp_path / "link")).num_cells
    assert open_store(str(tmp_path / "s")).num_cells == 170


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_a_check_finds_that_the_place_is_taken(three, tmp_path, taken):
    target = tmp_path / "there"
    if taken == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    job = build_run("ingest", {"ingest": {"files": three, "uri": str(target)}})
    with pytest.raises(DataError, match="not a SOMA store"):
        check_ingest(job)
