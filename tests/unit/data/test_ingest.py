import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from cells_by_hand import dense, make_adata, make_counts
from scipy import sparse

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data import staging as staging_module
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.schema import STAGING_SUFFIX
from cellray.data.soma import open_store

ONE = make_counts(41, 20, seed=1)
TWO = make_counts(33, 18, seed=2)
GENES_ONE = [f"ENSG{i:011d}" for i in range(20)]
GENES_TWO = [f"ENSG{i:011d}.3" for i in range(30, 7, -1)][:18]  # 30 .. 13, other order


def run(files, uri, **keys):
    files = [files] if isinstance(files, str) else files
    return ingest(IngestConfig(files=files, uri=str(uri), **keys))


def matrix(store, joinids=None):
    joinids = np.arange(store.num_cells) if joinids is None else joinids
    every_gene = np.arange(store.num_genes, dtype=np.int32)
    return dense(store.read_block(joinids, every_gene), store.num_genes)


def by_gene(store):
    return pd.DataFrame(matrix(store), columns=store.var()["feature_id"])


def tree(folder):
    """Every file under a folder with its content."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture
def one(write_h5ad):
    return write_h5ad(
        "one.h5ad", ONE, GENES_ONE, prefix="a", obs={"donor": ["d1", "d2"] * 20 + ["d1"]}
    )


@pytest.fixture
def two(write_h5ad):
    return write_h5ad("two.h5ad", TWO, GENES_TWO, prefix="b", obs={"age": np.arange(33)})


def check_joined(store):
    frame = by_gene(store)
    assert frame.shape == (74, 31 - 0)
    assert (frame.loc[:40, GENES_ONE].to_numpy() == ONE).all()
    assert (frame.loc[41:, [g[:15] for g in GENES_TWO]].to_numpy() == TWO).all()
    assert frame.to_numpy().sum() == ONE.sum() + TWO.sum()


@pytest.mark.parametrize("cells_per_block", [5, 64, 4096])
def test_files_with_other_genes_are_joined(one, two, tmp_path, cells_per_block):
    report = run([one, two], tmp_path / "s", cells_per_block=cells_per_block)
    assert [(f.cells, f.genes, f.genes_new) for f in report.files] == [(41, 20, 20), (33, 18, 11)]
    assert (report.num_cells, report.num_genes) == (74, 31)
    assert [f.counts for f in report.files] == [ONE.sum(), TWO.sum()]
    check_joined(open_store(str(tmp_path / "s")))


def test_appending_gives_the_store_that_one_call_gives(one, two, tmp_path):
    run([one, two], tmp_path / "whole", cells_per_block=10)
    run(one, tmp_path / "parts", cells_per_block=10)
    run(two, tmp_path / "parts", cells_per_block=10)
    whole, parts = (open_store(str(tmp_path / n)) for n in ("whole", "parts"))
    check_joined(parts)
    pd.testing.assert_frame_equal(whole.obs(), parts.obs())
    pd.testing.assert_frame_equal(whole.var(), parts.var())
    everything = np.arange(74)
    assert whole.fingerprint(everything) == parts.fingerprint(everything)
    assert [e["dataset_id"] for e in parts.ledger] == ["one", "two"]


def test_obs_columns_are_the_union(one, two, tmp_path):
    run([one, two], tmp_path / "s")
    frame = open_store(str(tmp_path / "s")).obs()
    assert frame["donor"].isna().tolist() == [False] * 41 + [True] * 33
    assert frame["donor"].tolist()[:3] == ["d1", "d2", "d1"]
    assert frame["age"].tolist()[41:] == list(range(33))
    assert frame["age"].isna().sum() == 41
    assert frame["dataset_id"].tolist() == ["one"] * 41 + ["two"] * 33
    assert frame["n_measured_vars"].tolist() == [20] * 41 + [18] * 33
    assert (frame["raw_sum"].to_numpy()[:41] == ONE.sum(axis=1)).all()


def test_var_counts_the_cells_of_each_gene(one, two, tmp_path):
    import tiledbsoma

    run(one, tmp_path / "s")
    run(two, tmp_path / "s")
    with tiledbsoma.open(str(tmp_path / "s")) as experiment:
        found = experiment.ms["RNA"].var.read().concat().to_pandas()["nnz"]
    assert found.tolist() == (by_gene(open_store(str(tmp_path / "s"))) > 0).sum().tolist()


def test_the_layout_is_as_planned(one, tmp_path):
    import tiledbsoma

    run(one, tmp_path / "s")
    with tiledbsoma.open(str(tmp_path / "s")) as experiment:
        assert set(experiment) == {"obs", "ms"}
        x = experiment.ms["RNA"].X["raw"]
        assert x.shape == (41, 20)
        options = x.schema_config_options()
        assert options.capacity == 65_536
        assert options.allows_duplicates
        assert '"tile":64' in options.dims.replace(" ", "") or "64" in options.dims


def test_symbols_and_ensembl_ids_meet_on_one_gene(write_h5ad, tmp_path):
    by_id = write_h5ad(
        "ids.h5ad", [[1, 2], [3, 4]], ["ENSG00000254647.7", "ENSG00000141510"], prefix="x"
    )
    by_symbol = write_h5ad("symbols.h5ad", [[5, 6, 7]], ["TP53", "INS", "RP11-1.1"], prefix="y")
    run([by_id, by_symbol], tmp_path / "s", organism="human")
    store = open_store(str(tmp_path / "s"))
    assert store.var()["feature_id"].tolist() == [
        "ENSG00000254647",
        "ENSG00000141510",
        "RP11-1.1",
    ]
    assert store.var()["feature_name"].tolist() == ["INS", "TP53", "RP11-1.1"]
    assert matrix(store).tolist() == [[1, 2, 0], [3, 4, 0], [6, 5, 7]]


def test_rows_of_one_gene_are_added_and_said(write_h5ad, tmp_path):
    adata = make_adata(
        [[1, 2, 0], [0, 4, 5]],
        ["CCL3L3", "CCL3L1", "TP53"],
        var={"ensembl_id": ["ENSG00000276085", "ENSG00000276085", ""]},
    )
    said = []
    config = IngestConfig(files=[write_h5ad("a.h5ad", adata)], uri=str(tmp_path / "s"))
    report = ingest(config, progress=said.append)
    assert matrix(open_store(str(tmp_path / "s"))).tolist() == [[3, 0], [4, 5]]
    assert report.files[0].genes_merged == {"ENSG00000276085": ("CCL3L3", "CCL3L1")}
    assert any("ENSG00000276085 = CCL3L3 + CCL3L1" in line for line in said)


def test_duplicate_genes_are_refused_or_added(write_h5ad, tmp_path):
    path = write_h5ad("a.h5ad", [[1, 2]], ["ENSG00000141510.1", "ENSG00000141510.2"])
    with pytest.raises(DataError, match=r"a.h5ad': gene ids occur more than once"):
        run(path, tmp_path / "s")
    run(path, tmp_path / "s", duplicate_genes="sum")
    assert matrix(open_store(str(tmp_path / "s"))).tolist() == [[3]]


def test_raw_layers_are_found(tmp_path):
    adata = make_adata(ONE, GENES_ONE)
    adata.raw = adata.copy()
    adata = adata[:, :5].copy()
    adata.X = sparse.csr_matrix(np.log1p(adata.X.toarray()))
    adata.write_h5ad(tmp_path / "a.h5ad")
    report = run(str(tmp_path / "a.h5ad"), tmp_path / "s")
    assert report.files[0].layer == "raw.X"
    assert (matrix(open_store(str(tmp_path / "s"))) == ONE).all()


def test_log_values_past_the_first_look_are_refused_and_nothing_is_left(write_h5ad, tmp_path):
    counts = np.ones((100_000, 5), np.float32)
    counts[15_000, 2] = 0.5
    path = write_h5ad("a.h5ad", counts)
    with pytest.raises(DataError, match="layer X, cells 12288-16383, looks log-normalised"):
        run(path, tmp_path / "s", workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad"]


@pytest.mark.parametrize(
    ("value", "text"), [(-1, "negative values"), (np.nan, "holds nan"), (0.25, "log-normalised")]
)
def test_values_that_are_no_counts_are_refused_before_work(write_h5ad, tmp_path, value, text):
    counts = ONE.copy()
    counts[3, 4] = value
    with pytest.raises(DataError, match=text):
        run(write_h5ad("a.h5ad", counts), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / f"s{STAGING_SUFFIX}").exists()


def test_duplicate_cell_ids_in_a_file(write_h5ad, tmp_path):
    path = write_h5ad("a.h5ad", ONE[:4], names=["a", "b", "y", "c"])
    with h5py.File(path, "r+") as file:
        file["obs/_index"][2] = "a"
    with pytest.raises(DataError, match="cell ids occur more than once: 'a'"):
        run(path, tmp_path / "s")


def test_the_cell_id_column(write_h5ad, tmp_path):
    path = write_h5ad("a.h5ad", ONE[:3], obs={"barcode": ["x", "y", "z"]})
    run(path, tmp_path / "s", cell_id_column="barcode")
    assert open_store(str(tmp_path / "s")).obs(["obs_id"])["obs_id"].tolist() == ["x", "y", "z"]
    with pytest.raises(DataError, match=r"'barcod' is not in obs. Did you mean 'barcode'\?"):
        run(path, tmp_path / "t", cell_id_column="barcod")


def test_the_same_cells_under_the_same_dataset_are_refused(write_h5ad, tmp_path):
    first = write_h5ad("p1.h5ad", ONE)
    second = write_h5ad("p2.h5ad", TWO)  # other counts, the same names cell0 ...
    run(first, tmp_path / "s", dataset_ids=["study"])
    with pytest.raises(
        DataError, match=r"33 cell ids are in dataset 'study' already, e.g. 'cell0'"
    ):
        run(second, tmp_path / "s", dataset_ids=["study"])
    with pytest.raises(DataError, match="cell ids are in dataset 'x' already"):
        run([first, second], tmp_path / "t", dataset_ids=["x", "x"])
    run(second, tmp_path / "s")
    assert open_store(str(tmp_path / "s")).num_cells == 74


def test_parts_of_one_dataset_may_be_added_under_its_name(one, two, tmp_path):
    run(one, tmp_path / "s", dataset_ids=["study"])
    run(two, tmp_path / "s", dataset_ids=["study"])
    assert set(open_store(str(tmp_path / "s")).obs(["dataset_id"])["dataset_id"]) == {"study"}


def test_a_dataset_name_is_not_taken_twice_by_accident(one, two, tmp_path):
    (tmp_path / "other").mkdir()
    again = shutil.copy(two, tmp_path / "other" / "one.h5ad")
    with pytest.raises(DataError, match=r"would be dataset 'one', which '.*one.h5ad' is already"):
        run([one, str(again)], tmp_path / "s")


def test_appending_a_file_twice_is_refused(one, tmp_path):
    run(one, tmp_path / "s")
    before = tree(tmp_path / "s")
    with pytest.raises(DataError, match=r"same cells and counts as '.*one.h5ad'.*dataset 'one'"):
        run(one, tmp_path / "s")
    assert tree(tmp_path / "s") == before


def test_a_renamed_recompressed_and_reordered_copy_is_the_same_content(one, two, tmp_path):
    adata = ad.read_h5ad(one)
    adata = adata[::-1, ::-1].copy()
    adata.var_names = [f"{g}.9" for g in adata.var_names]
    adata.X = adata.X.astype(np.int64)
    adata.write_h5ad(tmp_path / "renamed.h5ad", compression="gzip")
    run([one, two], tmp_path / "s")
    with pytest.raises(DataError, match=r"renamed.h5ad' holds the same cells .* dataset 'one'"):
        run(str(tmp_path / "renamed.h5ad"), tmp_path / "s", dataset_ids=["new"])
    with pytest.raises(DataError, match=r"renamed.h5ad' holds the same cells .*'.*one.h5ad'"):
        run([one, two, str(tmp_path / "renamed.h5ad")], tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_other_counts_under_the_same_cell_ids_are_other_content(write_h5ad, tmp_path):
    changed = ONE.copy()
    changed[0, 0] += 1
    run([write_h5ad("a.h5ad", ONE), write_h5ad("b.h5ad", changed)], tmp_path / "s")
    assert open_store(str(tmp_path / "s")).num_cells == 82


def test_min_genes_per_cell_leaves_cells_out(write_h5ad, tmp_path):
    path = write_h5ad("a.h5ad", ONE)
    rich = (ONE > 0).sum(axis=1) >= 7
    assert 0 < rich.sum() < 41
    report = run(path, tmp_path / "s", min_genes_per_cell=7, cells_per_block=6)
    assert (report.files[0].cells, report.files[0].cells_dropped) == (rich.sum(), (~rich).sum())
    assert (matrix(open_store(str(tmp_path / "s"))) == ONE[rich]).all()
    with pytest.raises(
        DataError, match="none of the 41 cells is left: 41 by min_genes_per_cell = 99"
    ):
        run(path, tmp_path / "t", min_genes_per_cell=99)
    with pytest.raises(DataError, match="same cells and counts"):
        run(path, tmp_path / "s", dataset_ids=["again"])


def test_an_open_handle_reads_through_an_append(one, two, tmp_path):
    run(one, tmp_path / "s", cells_per_block=10)
    joinids = np.random.default_rng(0).permutation(41)
    every_gene = np.arange(20, dtype=np.int32)
    idle, used = open_store(str(tmp_path / "s")), open_store(str(tmp_path / "s"))
    before = used.read_block(joinids[:20], every_gene)
    files_before = tree(tmp_path / "s" / "ms" / "RNA" / "X" / "raw")
    inodes = {p.stat().st_ino for p in (tmp_path / "s/ms/RNA/X/raw").rglob("*.tdb")}
    run(two, tmp_path / "s", cells_per_block=10)
    for store in (used, idle):
        block = store.read_block(joinids, every_gene, obs=["donor"])
        assert (dense(block, 20) == ONE[joinids]).all()
        assert (store.num_cells, store.num_genes) == (41, 20)
        assert len(store.obs()) == 41
        assert store.var()["feature_id"].tolist() == GENES_ONE
    assert (before.counts == used.read_block(joinids[:20], every_gene).counts).all()
    files_after = tree(tmp_path / "s" / "ms" / "RNA" / "X" / "raw")
    assert {k: files_after[k] for k in files_before} == files_before
    assert inodes <= {p.stat().st_ino for p in (tmp_path / "s/ms/RNA/X/raw").rglob("*.tdb")}
    check_joined(open_store(str(tmp_path / "s")))


def test_appending_does_not_change_a_linked_copy_of_the_old_store(one, two, tmp_path):
    run(one, tmp_path / "s")
    staging_module.link_tree(tmp_path / "s", tmp_path / "linked")
    run(two, tmp_path / "s")
    assert (matrix(open_store(str(tmp_path / "linked"))) == ONE).all()
    check_joined(open_store(str(tmp_path / "s")))


def test_links_become_copies_where_they_must(one, two, tmp_path, monkeypatch):
    def no_links(old, new):
        raise OSError("no hard links here")

    run(one, tmp_path / "s")
    monkeypatch.setattr(os, "link", no_links)
    run(two, tmp_path / "s")
    check_joined(open_store(str(tmp_path / "s")))


KILLED = """
import os, signal, sys
from cellray.data import parts as module
from cellray.data.ingest import IngestConfig, ingest
real = module.write_rows
seen = []
def write(*args):
    real(*args)
    seen.append(1)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
module.write_rows = write
ingest(IngestConfig(files=[sys.argv[1]], uri=sys.argv[2], cells_per_block=5))
"""


@pytest.mark.parametrize("append", [False, True])
def test_a_killed_ingest_can_be_run_again(one, two, tmp_path, append):
    uri = tmp_path / "s"
    if append:
        run(one, uri)
    before = tree(uri) if append else None
    done = subprocess.run([sys.executable, "-c", KILLED, two, str(uri)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / f"s{STAGING_SUFFIX}").exists()
    if append:
        assert tree(uri) == before
        assert (matrix(open_store(str(uri))) == ONE).all()
    else:
        with pytest.raises(DataError, match="an ingest into it was interrupted"):
            open_store(str(uri))
    with pytest.raises(DataError, match="is an unfinished ingest, not a store"):
        open_store(f"{uri}{STAGING_SUFFIX}/experiment")
    if not append:
        run(one, uri)
    run(two, uri)
    check_joined(open_store(str(uri)))
    assert not (tmp_path / f"s{STAGING_SUFFIX}").exists()


def test_a_crash_between_the_renames_is_put_right(one, two, tmp_path):
    uri = tmp_path / "s"
    run(one, uri)
    folder = tmp_path / f"s{STAGING_SUFFIX}"
    folder.mkdir()
    shutil.copytree(uri, folder / "experiment")
    uri.rename(folder / "previous")
    with pytest.raises(DataError, match=r"no store at .* but an ingest into it was interrupted"):
        open_store(str(uri))
    run(two, uri)
    check_joined(open_store(str(uri)))


def test_a_failing_swap_puts_the_old_store_back(one, two, tmp_path, monkeypatch):
    uri = tmp_path / "s"
    run(one, uri)
    before = tree(uri)
    real = Path.rename

    def rename(self, target):
        if self.name == "experiment":
            raise OSError("disk on fire")
        return real(self, target)

    monkeypatch.setattr(staging_module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((DataError, OSError), match="disk on fire"):
        run(two, uri)
    monkeypatch.undo()
    assert tree(uri) == before


def test_a_store_is_exchanged_for_the_next_at_once(tmp_path, monkeypatch):
    """No moment without a store, where the system can; two renames where it cannot."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    if not staging_module._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("not run: this file system does not exchange folders")
    assert [(tmp_path / n / "x").read_text() for n in ("one", "other")] == ["other", "one"]
    assert not staging_module._exchange(tmp_path / "one", tmp_path / "none")

    def rename(self, target):
        raise AssertionError(f"'{self}' is renamed")

    monkeypatch.setattr(Path, "rename", rename)
    with staging_module.staging(tmp_path / "one") as place:
        place.mkdir()
        (place / "x").write_text("new")
    assert (tmp_path / "one" / "x").read_text() == "new"
    assert not staging_module.staging_of(tmp_path / "one").exists()


def test_two_ingests_into_one_store_do_not_mix(one, two, tmp_path):
    with staging_module.staging(tmp_path / "s") as place:
        place.mkdir()
        with pytest.raises(DataError, match="another ingest into .* is running"):
            run(one, tmp_path / "s")
        (place / "x").write_text("kept")
    assert (tmp_path / "s" / "x").read_text() == "kept"


def test_append_false_refuses_a_store_that_is_there(one, two, tmp_path):
    run(one, tmp_path / "s", append=False)
    with pytest.raises(DataError, match="there is a store at .* and ingest.append = false"):
        run(two, tmp_path / "s", append=False)


def test_a_folder_of_something_else_is_not_overwritten(one, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="a folder but not a SOMA store. It holds thesis.txt"):
        run(one, tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    run(one, tmp_path / "empty")
    assert open_store(str(tmp_path / "empty")).num_cells == 41


def test_globs_and_missing_files(one, two, tmp_path):
    report = run(str(tmp_path / "*.h5ad"), tmp_path / "s")
    assert [f.dataset_id for f in report.files] == ["one", "two"]
    with pytest.raises(DataError, match=r"nothing matches '.*\*.h5'"):
        run(str(tmp_path / "*.h5"), tmp_path / "t")
    with pytest.raises(DataError, match=r"no file at .*Did you mean 'one.h5ad'\?"):
        run(str(tmp_path / "onne.h5ad"), tmp_path / "t")
    with pytest.raises(ConfigError, match="ingest.files is empty"):
        run([], tmp_path / "t")
    with pytest.raises(ConfigError, match="names 1 datasets for 2 files"):
        run([one, two], tmp_path / "t", dataset_ids=["x"])
    with pytest.raises(ConfigError, match="a name is empty"):
        run([one], tmp_path / "t", dataset_ids=[""])


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_files_without_cells_or_genes(write_h5ad, tmp_path, shape):
    path = write_h5ad("a.h5ad", np.zeros(shape, np.float32))
    with pytest.raises(DataError, match=f"has {shape[0]} cells and {shape[1]} genes: nothing"):
        run(path, tmp_path / "s")


def test_a_matrix_of_another_shape_than_obs(one, tmp_path):
    with h5py.File(one, "r+") as file:
        file["X"].attrs["shape"] = (40, 20)
    with pytest.raises(DataError, match="layer X is 40 x 20, but obs has 41 cells and var 20"):
        run(one, tmp_path / "s")


def test_a_gene_index_beyond_var(one, tmp_path):
    with h5py.File(one, "r+") as file:
        file["X/indices"][0] = 77
    with pytest.raises(DataError, match="names a gene beyond var|cannot read"):
        run(one, tmp_path / "s")


def test_a_disk_that_cannot_be_written(one, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write beside"):
        run(one, tmp_path / "file" / "s")


def test_progress_names_files_speed_and_time_left(one, two, tmp_path):
    said = []
    config = IngestConfig(files=[one, two], uri=str(tmp_path / "s"))
    ingest(config, progress=said.append)
    assert said[0].startswith("file 1/2 ")
    assert "41 cells from X" in said[0]
    assert said[-1].startswith("file 2/2: 74 of 74 cells written, ")
    assert "cells/s, ETA 0 s" in said[-1]


def test_the_section_refuses_unknown_keys_and_values():
    raw = {"files": ["a"], "uri": "s"}
    with pytest.raises(ConfigError, match=r"unknown key 'layr'. Did you mean 'layer'\?"):
        build_section(IngestConfig, raw | {"layr": "X"})
    with pytest.raises(ConfigError, match='duplicate_genes = "drop" is not allowed'):
        build_section(IngestConfig, raw | {"duplicate_genes": "drop"})


@pytest.mark.parametrize("donors", [("human1", "human2", "human3")])
def test_the_demonstration_files_join(tmp_path, donors):
    folder = Path(__file__).parents[2] / "data" / "pancreas"
    assert sum(p.stat().st_size for p in folder.glob("*.h5ad")) <= 7_500_000
    started = time.monotonic()
    report = run([str(folder / f"{d}.h5ad") for d in donors], tmp_path / "s")
    assert time.monotonic() - started < 60
    assert [f.cells for f in report.files] == [1065, 428, 668]
    assert report.num_genes < sum(f.genes for f in report.files)
    store = open_store(str(tmp_path / "s"))
    assert store.obs(["cell_type"])["cell_type"].nunique() == 14
    full = ad.read_h5ad(folder / "human2.h5ad")
    rows = np.arange(1065, 1065 + 428)
    block = store.read_block(rows, np.arange(store.num_genes, dtype=np.int32))
    assert (block.library_sizes == np.asarray(full.X.sum(axis=1)).ravel()).all()
    assert len(block.counts) == full.X.nnz


@pytest.mark.parametrize(
    ("name", "cells", "genes"),
    [("pbmc3k_1000cells", 1000, 13713), ("endocrinogenesis_mouse_2000g", 3696, 2000)],
)
def test_real_files_load(cellray_data, tmp_path, name, cells, genes):
    report = run(str(cellray_data / "cells" / f"{name}.h5ad"), tmp_path / "s")
    assert (report.num_cells, report.num_genes) == (cells, genes)
    store = open_store(str(tmp_path / "s"))
    adata = ad.read_h5ad(cellray_data / "cells" / f"{name}.h5ad")
    assert (store.obs(["raw_sum"])["raw_sum"] == np.asarray(adata.X.sum(axis=1)).ravel()).all()


def test_a_real_log_file_is_refused(cellray_data, tmp_path):
    with pytest.raises(DataError, match="looks log-normalised"):
        run(str(cellray_data / "cells" / "grn_mDC_log_string_edges.h5ad"), tmp_path / "s")
