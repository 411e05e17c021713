"""Published files in their documented layout, with invented counts: loaded, split, refused."""

from __future__ import annotations

import hashlib
import tomllib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

from cellray.cli import main
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section, to_dict
from cellray.data import published as table
from cellray.data.published import (
    Published,
    check_hash,
    default_folder,
    known,
    listing,
    locate,
    published,
    read_pins,
)
from cellray.data.published_store import make_store
from cellray.data.soma import open_store

SYMBOLS = ["CD3D", "CD8A", "CD4", "MS4A1", "NKG7", "LYZ", "GNLY", "CST3", "PPBP", "IL7R"]
ENSEMBL = [
    "ENSG00000167286", "ENSG00000153563", "ENSG00000010610", "ENSG00000156738",
    "ENSG00000105374", "ENSG00000090382", "ENSG00000115523", "ENSG00000101439",
    "ENSG00000163736", "ENSG00000168685",
]  # fmt: skip
MS_LABEL = "Factor Value[inferred cell type - authors labels]"


def counts_of(num, seed):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(4.0, (num, len(SYMBOLS))).astype(np.float64)
    counts[:, 0] = 1
    counts[:, 1] += 2
    return counts


def log_normalised(counts, base=np.e):
    return (np.log1p(counts / counts.sum(1, keepdims=True) * 1e4) / np.log(base)).astype(np.float32)


def adata_of(values, obs, *, var=None, prefix="cell", layers=None):
    names = [f"{prefix}-{i}" for i in range(values.shape[0])]
    genes = pd.DataFrame(index=SYMBOLS) if var is None else var
    made = ad.AnnData(values, obs=pd.DataFrame(obs, index=names), var=genes)
    for name, layer in (layers or {}).items():
        made.layers[name] = layer
    return made


def sizes(monkeypatch, name, *held):
    """Let the table expect small files: (cells, genes, classes) of each."""
    raw = {k: to_dict(entry) for k, entry in known().items()}
    for file, (cells, genes, classes) in zip(raw[name]["files"], held, strict=True):
        file.update(cells=cells, genes=genes, classes=classes, md5="")
    small = {k: build_section(Published, v) for k, v in raw.items()}
    monkeypatch.setattr(table, "known", lambda: small)


def write(adata, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(path)


def kinds(num, names=("a", "b")):
    return [names[i % len(names)] for i in range(num)]


def read_back(store):
    """(obs, counts) of a store by cell id."""
    opened = open_store(str(store))
    columns = [c for c in ("cell_type", "split", "batch", "donor_id", "dataset_id")
               if c in opened.obs_columns()]  # fmt: skip
    obs = opened.obs(columns)
    joinids = obs["soma_joinid"].to_numpy()
    block = opened.read_block(joinids, np.arange(opened.num_genes, dtype=np.int32))
    dense = sparse.csr_matrix(
        (block.counts, block.genes, block.indptr), shape=(len(obs), opened.num_genes)
    ).toarray()
    order = opened.var()["feature_name"].tolist()
    return obs, dense[:, [order.index(symbol) for symbol in SYMBOLS]]


@pytest.fixture
def ms(tmp_path, monkeypatch):
    """Ensembl ids as index, symbols in gene_name, log1p values by columns."""
    var = pd.DataFrame({"gene_name": SYMBOLS}, index=ENSEMBL)
    train, test = counts_of(12, 1), counts_of(8, 2)
    for name, counts, site in (("c_data", train, "premotor"), ("filtered_ms_adata", test, "pre")):
        obs = {MS_LABEL: kinds(len(counts)), "Factor Value[sampling site]": site}
        values = sparse.csc_matrix(log_normalised(counts))
        write(adata_of(values, obs, var=var), tmp_path / "files" / "ms" / f"{name}.h5ad")
    sizes(monkeypatch, "multiple_sclerosis", (12, 10, 2), (8, 10, 2))
    return tmp_path / "files", train, test


def test_ms_comes_back_as_counts_with_its_split(ms, tmp_path):
    folder, train, test = ms
    said = []
    made = make_store("multiple_sclerosis", folder, str(tmp_path / "store"), progress=said.append)
    obs, counts = read_back(tmp_path / "store")
    assert obs["split"].tolist() == ["train"] * 12 + ["test"] * 8
    assert obs["cell_type"].tolist() == kinds(12) + kinds(8)
    assert set(obs["batch"]) == {"premotor", "pre"}
    assert obs["dataset_id"].unique().tolist() == [
        "multiple_sclerosis/train",
        "multiple_sclerosis/test",
    ]
    np.testing.assert_array_equal(counts, np.concatenate([train, test]))
    assert 'column = "split"' in made.task
    assert 'test_values = ["test"]' in made.task
    told = tomllib.loads(made.dataset)["datasets"]["multiple_sclerosis"]
    assert told["split_id"] == "scgpt_v1"
    assert told["data"] == {"uri": str(tmp_path / "store")}
    assert {"task": told["task"]} == tomllib.loads(made.task)
    assert any("log1p (base e) of 12 cells; undone exactly" in line for line in said)


def test_the_benchmark_takes_the_task_table_as_it_is(ms, tmp_path):
    from cellray.runs import build_run
    from cellray.tasks.base import task

    made = make_store("multiple_sclerosis", ms[0], str(tmp_path / "store"))
    raw = tomllib.loads(made.task)
    run = build_run("benchmark", {"name": "b", "data": {"uri": str(tmp_path / "store")}, **raw})
    section = run.datasets["store"]
    unit = task("annotation")
    store = open_store(str(tmp_path / "store"))
    obs = store.obs(unit.columns(section.task, store.obs_columns()))
    split = unit.split(obs, section.task, seed=0)
    assert (len(split.test), len(split.train) + len(split.validation)) == (8, 12)
    assert split.unit == "split"


@pytest.mark.parametrize(
    ("name", "label", "files"),
    [
        ("myeloid", "cell_type", ["mye/reference_adata.h5ad", "mye/query_adata.h5ad"]),
        ("hpancreas", "Celltype", ["demo_train.h5ad", "demo_test.h5ad"]),
    ],
)
def test_scgpts_other_sets(tmp_path, monkeypatch, name, label, files):
    both = counts_of(9, 3), counts_of(6, 4)
    for file, counts, batch in zip(files, both, ("s1", "s2"), strict=True):
        obs = {label: kinds(len(counts)), "batch": batch}
        write(adata_of(log_normalised(counts), obs), tmp_path / "files" / file)
    sizes(monkeypatch, name, (9, 10, 2), (6, 10, 2))
    make_store(name, tmp_path / "files", str(tmp_path / "store"))
    obs, counts = read_back(tmp_path / "store")
    assert obs["split"].tolist() == ["train"] * 9 + ["test"] * 6
    assert obs["batch"].tolist() == ["s1"] * 9 + ["s2"] * 6
    np.testing.assert_array_equal(counts, np.concatenate(both))


def test_zheng68k_of_scbert_is_split_within_classes(tmp_path, monkeypatch):
    counts = counts_of(60, 5)
    obs = {"celltype": kinds(60, ("x", "x", "y"))}
    write(adata_of(log_normalised(counts, 2.0), obs), tmp_path / "files" / "Zheng68K.h5ad")
    sizes(monkeypatch, "zheng68k", (60, 10, 2))
    said = []
    make_store("zheng68k", tmp_path / "files", str(tmp_path / "store"), progress=said.append)
    found, back = read_back(tmp_path / "store")
    np.testing.assert_array_equal(back, counts)
    share = found.groupby("cell_type", observed=True)["split"].agg(lambda s: (s == "test").sum())
    assert share.to_dict() == {"x": 8, "y": 4}
    assert any("log1p (base 2) of 60 cells" in line for line in said)
    # the split is of ids: the order of the file does not matter
    mixed = np.random.default_rng(0).permutation(60)
    whole = ad.read_h5ad(tmp_path / "files" / "Zheng68K.h5ad")[mixed].copy()
    write(whole, tmp_path / "other" / "Zheng68K.h5ad")
    make_store("zheng68k", tmp_path / "other", str(tmp_path / "again"))
    again = read_back(tmp_path / "again")[0]["split"].to_numpy()
    assert (again == found["split"].to_numpy()[mixed]).all()


@pytest.fixture
def tenx(tmp_path, monkeypatch):
    folder = tmp_path / "files" / "filtered_matrices_mex" / "hg19"
    folder.mkdir(parents=True)
    counts = counts_of(20, 6)
    io.mmwrite(folder / "matrix.mtx", sparse.coo_matrix(counts.T.astype(int)))
    rows = zip(ENSEMBL, SYMBOLS, strict=True)
    (folder / "genes.tsv").write_text("".join(f"{e}\t{s}\n" for e, s in rows))
    barcodes = [f"AAAC{i:04d}-1" for i in range(20)]
    (folder / "barcodes.tsv").write_text("".join(f"{b}\n" for b in barcodes))
    lines = ["TSNE.1\tTSNE.2\tbarcodes\tcelltype"]
    lines += [f"0\t0\t{b}\t{k}" for b, k in zip(barcodes, kinds(20), strict=True)][::-1]
    (tmp_path / "files" / "68k_pbmc_barcodes_annotation.tsv").write_text("\n".join(lines))
    sizes(monkeypatch, "zheng68k_10x", (20, 10, 2))
    return tmp_path / "files", counts


def test_zheng68k_of_10x(tenx, tmp_path):
    folder, counts = tenx
    make_store("zheng68k_10x", folder, str(tmp_path / "store"))
    obs, back = read_back(tmp_path / "store")
    np.testing.assert_array_equal(back, counts)
    assert obs["cell_type"].tolist() == kinds(20)  # by barcode, not by line
    assert (obs["split"] == "test").sum() == 4


def test_a_10x_folder_that_is_not_complete(tenx, tmp_path):
    folder, _ = tenx
    inner = folder / "filtered_matrices_mex" / "hg19"
    genes = (inner / "genes.tsv").read_text()
    (inner / "genes.tsv").write_text(genes.split("\n", 1)[1])
    with pytest.raises(DataError, match="is 10 x 20 but genes.tsv has 9 lines and barcodes.tsv 20"):
        make_store("zheng68k_10x", folder, str(tmp_path / "store"))
    (inner / "genes.tsv").unlink()
    with pytest.raises(DataError, match="is not complete: there is no file at .*genes.tsv"):
        make_store("zheng68k_10x", folder, str(tmp_path / "store"))
    (inner / "genes.tsv").write_text(genes)
    annotation = folder / "68k_pbmc_barcodes_annotation.tsv"
    annotation.write_text(annotation.read_text().replace("barcodes", "codes"))
    with pytest.raises(DataError, match="has no column 'barcodes'; it has: .*codes"):
        make_store("zheng68k_10x", folder, str(tmp_path / "store"))


SCIB = {
    "scib_immune": ("Immune_ALL_human.h5ad", "final_annotation", "batch"),
    "scib_pancreas": ("human_pancreas_norm_complexBatch.h5ad", "celltype", "tech"),
    "scib_lung": ("Lung_atlas_public.h5ad", "cell_type", "batch"),
}


@pytest.mark.parametrize("name", SCIB)
def test_scib_sets_hold_counts_in_a_layer_and_some_batches_hold_none(tmp_path, monkeypatch, name):
    file, label, batch = SCIB[name]
    counts = counts_of(30, 7)
    layer = counts.copy()
    layer[10:20] = -256 * np.log1p(-counts[10:20] / 256)
    layer[20:] = counts[20:] * np.linspace(0.31, 2.7, 10)  # by gene, as RPKM
    batches = ["good"] * 10 + ["collided"] * 10 + ["rpkm"] * 10
    obs = {label: kinds(30), batch: batches}
    scran = np.log1p(counts / np.random.default_rng(0).uniform(1, 9, counts.shape))
    made = adata_of(scran.astype(np.float32), obs, layers={"counts": layer})
    write(made, tmp_path / "files" / file)
    sizes(monkeypatch, name, (30, 10, 2))
    message = r"layer counts gives no raw counts for 10 of 30 cells \(rpkm: 10 of 10\): it holds "
    with pytest.raises(DataError, match=message + "fractional values .* --leave-out ingests"):
        make_store(name, tmp_path / "files", str(tmp_path / "store"))
    assert not (tmp_path / "store").exists()
    found = make_store(name, tmp_path / "files", str(tmp_path / "store"), leave_out=True)
    assert found.left_out == {"rpkm": 10}
    obs_back, back = read_back(tmp_path / "store")
    np.testing.assert_array_equal(back, counts[:20])
    assert obs_back["batch"].tolist() == batches[:20]
    assert "split" not in obs_back
    assert found.task.splitlines() == [
        "[task]", 'name = "integration"', 'label = "cell_type"', 'batch = "batch"',
    ]  # fmt: skip
    assert any("left out, no counts are known: rpkm (10 cells)" in x for x in found.lines())
    assert "split_id" not in found.dataset  # no longer the split of the papers


@pytest.mark.parametrize(
    ("name", "file", "label"),
    [
        ("pbmc_10k", "pbmc10k.h5ad", "str_labels"),
        ("perirhinal_cortex", "perirhinal_cortex.h5ad", "cell_type"),
    ],
)
def test_raw_sets_of_scgpts_integration(tmp_path, monkeypatch, name, file, label):
    counts = counts_of(15, 8)
    made = adata_of(counts.astype(np.float32), {label: kinds(15), "batch": [0, 1, 1] * 5})
    write(made, tmp_path / "files" / file)
    sizes(monkeypatch, name, (15, 10, 2))
    make_store(name, tmp_path / "files", str(tmp_path / "store"))
    obs, back = read_back(tmp_path / "store")
    np.testing.assert_array_equal(back, counts)
    assert obs["batch"].tolist() == ["0", "1", "1"] * 5


def test_raw_counts_in_raw_are_found(tmp_path, monkeypatch):
    counts = counts_of(15, 9)
    made = adata_of(counts.astype(np.float32), {"str_labels": kinds(15), "batch": "x"})
    made.raw = made.copy()
    made.X = np.sqrt(made.X)
    write(made, tmp_path / "files" / "pbmc10k.h5ad")
    sizes(monkeypatch, "pbmc_10k", (15, 10, 2))
    said = []
    make_store("pbmc_10k", tmp_path / "files", str(tmp_path / "store"), progress=said.append)
    np.testing.assert_array_equal(read_back(tmp_path / "store")[1], counts)
    assert any("layer raw.X: counts of 15 cells" in line for line in said)


def test_files_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch):
    counts = counts_of(15, 10)
    file = tmp_path / "files" / "pbmc10k.h5ad"
    store = str(tmp_path / "store")
    write(adata_of(counts, {"str_labels": kinds(15), "batch": "x"}), file)
    with pytest.raises(DataError, match="holds 15 cells, the published file 11990: it is another"):
        make_store("pbmc_10k", tmp_path / "files", store)
    sizes(monkeypatch, "pbmc_10k", (15, 11, 2))
    with pytest.raises(DataError, match="holds 10 genes, the published file 11"):
        make_store("pbmc_10k", tmp_path / "files", store)
    sizes(monkeypatch, "pbmc_10k", (15, 10, 3))
    with pytest.raises(DataError, match="holds 2 classes, the published file 3"):
        make_store("pbmc_10k", tmp_path / "files", store)
    sizes(monkeypatch, "pbmc_10k", (15, 10, 2))
    write(adata_of(counts, {"labels": kinds(15), "batch": "x"}), file)
    with pytest.raises(DataError, match="no obs column 'str_labels' with the cell types; it has: "):
        make_store("pbmc_10k", tmp_path / "files", store)
    write(adata_of(counts, {"str_labels": kinds(15)}), file)
    with pytest.raises(DataError, match="no obs column 'batch' with the batches; it has: str_la"):
        make_store("pbmc_10k", tmp_path / "files", store)
    values = counts * np.linspace(0.31, 2.7, 10)
    write(adata_of(values, {"str_labels": kinds(15), "batch": "x"}), file)
    with pytest.raises(DataError, match="15 of 15 cells .* get the raw counts from the authors"):
        make_store("pbmc_10k", tmp_path / "files", store, leave_out=True)
    made = adata_of(counts, {"str_labels": kinds(15), "batch": "x"}, layers={"c": counts})
    made.X = None
    write(made, file)
    with pytest.raises(DataError, match="none of the layers X, raw.X; it has: c"):
        make_store("pbmc_10k", tmp_path / "files", store)


def test_hashes_are_told_pinned_and_compared(ms, tmp_path):
    folder = ms[0]
    path = folder / "ms" / "c_data.h5ad"
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    file = published("multiple_sclerosis").files[0]
    told = check_hash(file, path, {}).lines
    assert told[1:] == ("[published.sha256]", f'"ms/c_data.h5ad" = "{sha}"')
    assert "no published hash is known; to pin what you have" in told[0]
    (tmp_path / "pins.toml").write_text("\n".join(told[1:]))
    pins = read_pins(tmp_path / "pins.toml")
    assert check_hash(file, path, pins).sha256 == sha
    wrong = {"ms/c_data.h5ad": "0" * 64}
    with pytest.raises(DataError, match=f"its SHA-256 is {sha}, pinned is {'0' * 64}"):
        make_store("multiple_sclerosis", folder, str(tmp_path / "store"), pins=wrong)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    stated = build_section(type(file), {**to_dict(file), "md5": md5})
    assert f"MD5 {md5[:12]} is the published one" in check_hash(stated, path, {}).lines[0]
    other = build_section(type(file), {**to_dict(file), "md5": "f" * 32})
    with pytest.raises(DataError, match=f"its MD5 is {md5}, published is {'f' * 32}"):
        check_hash(other, path, {})
    assert check_hash(other, path, pins).sha256 == sha  # who trusts a file pins it


def test_pins_that_mean_nothing_are_refused(tmp_path):
    file = tmp_path / "pins.toml"
    file.write_text('[published.sha256]\n"ms/c_dat.h5ad" = "0"')
    with pytest.raises(ConfigError, match="pins 'ms/c_dat.h5ad', .* Did you mean 'ms/c_data.h5ad'"):
        read_pins(file)
    file.write_text("[published]\nsha256 = 3")
    with pytest.raises(ConfigError, match=r"write hashes as \[published.sha256\]"):
        read_pins(file)
    file.write_text("")
    assert read_pins(file) == {}


def test_what_is_not_there_is_said_and_is_no_error_in_the_list(ms, tmp_path, monkeypatch):
    folder = ms[0]
    lines = listing(folder)
    assert f"  present: {folder / 'ms' / 'c_data.h5ad'}" in lines
    assert sum("not present" in line for line in lines) == 11
    assert sum("not present" in line for line in listing(None)) == 13
    assert "$CELLRAY_DATA is not set" in listing(None)[0]
    with pytest.raises(DataError, match="'myeloid' is not present: no file at .*mye/reference_ad"):
        locate("myeloid", folder)
    with pytest.raises(ConfigError, match="no published set 'myelod'. Did you mean 'myeloid'"):
        published("myelod")
    monkeypatch.setenv("CELLRAY_DATA", str(tmp_path))
    assert default_folder() == tmp_path / "published"
    monkeypatch.delenv("CELLRAY_DATA")
    assert default_folder() is None


def test_the_table_says_what_the_literature_says():
    sizes_of = {name: [f.cells for f in entry.files] for name, entry in known().items()}
    assert sizes_of["multiple_sclerosis"] == [7844, 13468]
    assert sizes_of["myeloid"] == [9748, 3430]
    assert sizes_of["hpancreas"] == [10600, 4218]
    assert [f.classes for f in known()["hpancreas"].files] == [13, 11]
    for name, entry in known().items():
        parts = [file.part for file in entry.files]
        assert (parts == ["train", "test"]) or (len(parts) == 1 and parts == [""]), name
        assert entry.is_split == (parts == ["train", "test"] or entry.test_fraction > 0)
        assert entry.doi.startswith("10.")


def test_the_command_lists_and_loads(ms, tmp_path, capsys, monkeypatch):
    folder = ms[0]
    monkeypatch.delenv("CELLRAY_DATA", raising=False)
    assert main(["published"]) == 0
    assert "not present: ms/c_data.h5ad" in capsys.readouterr().out
    assert main(["published", "multiple_sclerosis", "--folder", str(folder)]) == 1
    assert "cellray published multiple_sclerosis needs --store" in capsys.readouterr().err
    assert main(["published", "multiple_sclerosis", "--store", "x"]) == 1
    assert "needs --folder (or set CELLRAY_DATA)" in capsys.readouterr().err
    words = ["--folder", str(folder), "--store", str(tmp_path / "store")]
    assert main(["published", "multiple_sclerosis", *words]) == 0
    out = capsys.readouterr().out
    assert "20 cells x 10 genes" in out
    assert "use it with:\n[task]" in out
    assert main(["published", "myeloid", *words]) == 1
    assert "'myeloid' is not present" in capsys.readouterr().err
