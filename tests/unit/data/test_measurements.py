"""Several measurements of one cell in one store, joined by cell id."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from cells_by_hand import dense, make_adata, make_counts
from scipy import sparse

from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.existing import stored_library_sizes, stored_medians
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.soma import open_store
from cellray.data.vocab import Vocab

RNA = make_counts(12, 8, seed=1)
ATAC = make_counts(10, 5, seed=2)
PEAKS = [f"chr1:{i}00-{i}99" for i in range(5)]


def run(files, uri, **keys):
    raw = {"files": [str(f) for f in files], "uri": str(uri), "workers": 1, **keys}
    return ingest(build_section(IngestConfig, raw))


def matrix(uri, measurement="RNA"):
    store = open_store(str(uri), measurement=measurement)
    every = np.arange(store.num_genes, dtype=np.int32)
    return dense(store.read_block(np.arange(store.num_cells), every), store.num_genes)


@pytest.fixture
def pair(write_h5ad):
    """RNA of cells 0 .. 11; ATAC of cells 9 .. 2 in that order, and of two that RNA lacks."""
    rna = write_h5ad("rna.h5ad", RNA)
    names = [f"cell{i}" for i in range(9, 1, -1)] + ["other1", "other2"]
    return rna, write_h5ad("atac.h5ad", ATAC, PEAKS, names=names)


def check_pair(uri):
    wanted = np.zeros((12, 5), np.float32)
    wanted[np.arange(9, 1, -1)] = ATAC[:8]
    assert (matrix(uri)[:12] == RNA).all()
    assert (matrix(uri, "ATAC")[:12] == wanted).all()
    frame = open_store(str(uri)).obs().iloc[:12]
    assert frame["has_ATAC"].tolist() == [2 <= i <= 9 for i in range(12)]
    assert frame["raw_sum_ATAC"].tolist() == wanted.sum(axis=1).tolist()
    assert frame["nnz_ATAC"].tolist() == (wanted > 0).sum(axis=1).tolist()


@pytest.mark.parametrize("cells_per_block", [1, 3, 4096])
def test_a_second_file_is_joined_by_cell_id(pair, tmp_path, cells_per_block):
    report = run(
        [pair[0]],
        tmp_path / "s",
        cells_per_block=cells_per_block,
        measurements={"ATAC": {"files": [pair[1]]}},
    )
    check_pair(tmp_path / "s")
    told = report.files[0].measurements["ATAC"]
    assert (told.cells, told.cells_absent, told.cells_left_out) == (8, 4, 2)
    assert (told.features, told.features_new, told.counts) == (5, 5, ATAC[:8].sum())
    assert "8 cells x 5 features (5 new), 4 cells lack it, 2 of its cells left out" in (
        "\n".join(report.lines())
    )
    store = open_store(str(tmp_path / "s"), measurement="ATAC")
    var = store.var()
    assert var["feature_id"].tolist() == PEAKS
    assert (
        len(Vocab.from_genes(var["feature_id"].tolist(), var["feature_name"].tolist(), specials=[]))
        == 5
    )
    assert store.ledger[0]["measurements"]["ATAC"]["cells"] == 8
    assert stored_medians(store.uri, measurement="ATAC").shape == (5,)
    assert stored_library_sizes(store.uri, measurement="ATAC")[0.5] == np.median(
        ATAC[:8].sum(axis=1)
    )


def test_cells_that_a_rule_drops_lose_their_other_measurements(pair, tmp_path):
    few = (RNA > 0).sum(axis=1)
    least = int(np.sort(few)[6])
    rules = {"min_genes_per_cell": least, "measurements": {"ATAC": {"files": [pair[1]]}}}
    run([pair[0]], tmp_path / "s", **rules)
    kept = np.flatnonzero(few >= least)
    wanted = np.zeros((12, 5), np.float32)
    wanted[np.arange(9, 1, -1)] = ATAC[:8]
    assert (matrix(tmp_path / "s", "ATAC") == wanted[kept]).all()


def test_appending_with_and_without_the_measurement(pair, write_h5ad, tmp_path):
    more = write_h5ad("more.h5ad", RNA + 1, prefix="m")
    peaks = write_h5ad("peaks.h5ad", ATAC + 1, [*PEAKS[3:], "chr2:1-9", "x", "y"], prefix="m")
    both = {"measurements": {"ATAC": {"files": [pair[1]]}}}
    run([pair[0]], tmp_path / "s", **both)
    run([more], tmp_path / "s")
    check_pair(tmp_path / "s")
    assert open_store(str(tmp_path / "s")).obs()["has_ATAC"].sum() == 8
    run([more], tmp_path / "t")
    run([pair[0]], tmp_path / "t", **both)
    assert (matrix(tmp_path / "t", "ATAC")[12:] == matrix(tmp_path / "s", "ATAC")[:12]).all()
    frame = open_store(str(tmp_path / "t")).obs()
    assert frame["has_ATAC"].tolist()[:12] == [False] * 12
    files = {"measurements": {"ATAC": {"files": [pair[1], peaks]}}}
    run([pair[0], more], tmp_path / "u", **files)
    found = matrix(tmp_path / "u", "ATAC")
    assert found.shape == (24, 8)
    assert (found[12:22, [3, 4, 5, 6, 7]] == ATAC + 1).all()
    run([pair[0], more], tmp_path / "v", measurements={"ATAC": {"files": [pair[1], ""]}})
    assert open_store(str(tmp_path / "v")).obs()["has_ATAC"].sum() == 8


@pytest.mark.parametrize("form", ["table", "array"])
def test_proteins_of_obsm(tmp_path, form):
    adata = make_adata(RNA)
    proteins = make_counts(12, 3, seed=3)
    names = ["CD3", "CD4", "CD8a"]
    if form == "table":
        adata.obsm["protein"] = pd.DataFrame(proteins, index=adata.obs_names, columns=names)
    else:
        adata.obsm["protein"] = proteins
        adata.uns["protein_names"] = names
    adata.write_h5ad(tmp_path / "a.h5ad")
    run([tmp_path / "a.h5ad"], tmp_path / "s", measurements={"ADT": {"obsm": "protein"}})
    assert (matrix(tmp_path / "s", "ADT") == proteins).all()
    var = open_store(str(tmp_path / "s"), measurement="ADT").var()
    assert var["feature_id"].tolist() == names
    with pytest.raises(DataError, match=r"has no obsm 'protien'. Did you mean 'protein'\?"):
        run([tmp_path / "a.h5ad"], tmp_path / "t", measurements={"ADT": {"obsm": "protien"}})


def test_feature_types_split_a_file(tmp_path):
    kinds = ["Gene Expression"] * 4 + ["Peaks"] * 3 + ["Gene Expression"]
    ids = [f"ENSG{i:011d}" if k[0] == "G" else f"chr1:{i}" for i, k in enumerate(kinds)]
    adata = make_adata(RNA, ids, var={"feature_types": kinds})
    adata.write_h5ad(tmp_path / "a.h5ad")
    report = run(
        [tmp_path / "a.h5ad"], tmp_path / "s", measurements={"ATAC": {"feature_types": "Peaks"}}
    )
    assert (matrix(tmp_path / "s") == RNA[:, [0, 1, 2, 3, 7]]).all()
    assert (matrix(tmp_path / "s", "ATAC") == RNA[:, 4:7]).all()
    assert report.files[0].counts == RNA[:, [0, 1, 2, 3, 7]].sum()
    assert report.num_genes == 5
    with pytest.raises(DataError, match=r"'Peak'. Did you mean 'Peaks'\? There are: Gene Expr"):
        run([tmp_path / "a.h5ad"], tmp_path / "t", measurements={"X": {"feature_types": "Peak"}})


@pytest.fixture
def h5mu(tmp_path):
    """RNA of cells 0 .. 11, ATAC of cells 9 .. 0."""
    path = tmp_path / "both.h5mu"
    atac = make_adata(ATAC, PEAKS, names=[f"cell{i}" for i in range(9, -1, -1)])
    atac.X = sparse.csc_matrix(atac.X)
    with h5py.File(path, "w") as file:
        group = file.create_group("mod")
        ad.io.write_elem(group, "rna", make_adata(RNA))
        ad.io.write_elem(group, "atac", atac)
    return path


def test_modalities_of_an_h5mu_file(h5mu, tmp_path):
    measurements = {"ATAC": {"modality": "atac"}}
    report = run([h5mu], tmp_path / "s", cells_per_block=4, measurements=measurements)
    wanted = np.zeros((12, 5), np.float32)
    wanted[np.arange(9, -1, -1)] = ATAC
    assert (matrix(tmp_path / "s") == RNA).all()
    assert (matrix(tmp_path / "s", "ATAC") == wanted).all()
    assert report.files[0].dataset_id == "both"
    assert report.files[0].measurements["ATAC"].origin == f"{h5mu}::atac"
    with pytest.raises(DataError, match=r"no modality 'atack'. Did you mean 'atac'\? It has: atac"):
        run([h5mu], tmp_path / "t", measurements={"ATAC": {"modality": "atack"}})


def test_an_h5ad_has_no_modalities(pair, tmp_path):
    with pytest.raises(DataError, match="has no modality 'atac'. It has: none: it is no h5mu"):
        run([pair[0]], tmp_path / "s", measurements={"ATAC": {"modality": "atac"}})


def test_what_does_not_fit_is_refused(pair, write_h5ad, tmp_path):
    stranger = write_h5ad("stranger.h5ad", ATAC, PEAKS, prefix="z")
    with pytest.raises(DataError, match=r"no cell of '.*stranger.h5ad' is among .* like 'z0'"):
        run([pair[0]], tmp_path / "s", measurements={"ATAC": {"files": [stranger]}})
    with pytest.raises(ConfigError, match="ATAC.files names 2 files for 1 files"):
        run([pair[0]], tmp_path / "s", measurements={"ATAC": {"files": [pair[1], ""]}})
    with pytest.raises(ConfigError, match="exactly one of files, obsm, feature_types"):
        run([pair[0]], tmp_path / "s", measurements={"ATAC": {}})
    with pytest.raises(ConfigError, match="not RNA, which the main files hold"):
        run([pair[0]], tmp_path / "s", measurements={"RNA": {"obsm": "x"}})
    with pytest.raises(DataError, match="to be split by feature_types, but var has no such"):
        run([pair[0]], tmp_path / "s", measurements={"ATAC": {"feature_types": "Peaks"}})
    twice = write_h5ad("twice.h5ad", ATAC, ["p", "o", "q", "r", "s"])
    with h5py.File(twice, "r+") as file:
        file["var/_index"][1] = "p"
    with pytest.raises(DataError, match="features of ATAC occur more than once: 'p'"):
        run([pair[0]], tmp_path / "s", measurements={"ATAC": {"files": [twice]}})


def test_real_multiome(cellray_data, tmp_path):
    rna, atac = (cellray_data / "cells" / f"multiome_a549_0h3h_{k}.h5ad" for k in ("rna", "atac"))
    report = run([rna], tmp_path / "s", measurements={"ATAC": {"files": [str(atac)]}})
    told = report.files[0].measurements["ATAC"]
    assert (told.cells, told.cells_absent, told.features) == (1658, 0, 52_761)
    wanted = ad.read_h5ad(atac)
    store = open_store(str(tmp_path / "s"), measurement="ATAC")
    block = store.read_block(np.arange(100), np.arange(52_761, dtype=np.int32))
    assert len(block.counts) == wanted.X[:100].nnz
    assert block.counts.sum() == wanted.X[:100].sum()


def test_real_cite(cellray_data, tmp_path):
    path = cellray_data / "cells" / "cite_pbmc_5k10k_400.h5ad"
    run([path], tmp_path / "s", measurements={"ADT": {"obsm": "protein_counts"}})
    wanted = np.asarray(ad.read_h5ad(path).obsm["protein_counts"])
    assert (matrix(tmp_path / "s", "ADT") == wanted).all()


def test_files_without_any_name_are_refused(pair, tmp_path):
    with pytest.raises(ConfigError, match='files holds only ""; leave the measurement out'):
        run([pair[0]], tmp_path / "s", measurements={"ADT": {"files": [""]}})


def test_an_obsm_without_raw_counts_names_no_layer_of_the_genes(tmp_path):
    adata = make_adata(make_counts(4, 6))
    adata.obsm["protein"] = pd.DataFrame(
        np.full((4, 2), 0.5), index=adata.obs_names, columns=["CD3", "CD4"]
    )
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DataError, match=r"protein.*Give another obsm") as found:
        run([tmp_path / "a.h5ad"], tmp_path / "s", measurements={"ADT": {"obsm": "protein"}})
    assert "ingest.layer" not in str(found.value)
