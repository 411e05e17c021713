import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from cells_by_hand import make_adata, make_counts
from scipy import sparse

from cellray.core.errors import DataError
from cellray.data.h5ad import H5adFile, check_counts

COUNTS = make_counts(23, 9, seed=3)


def read_all(path, layer="X", cells_per_block=5):
    with H5adFile(path) as file:
        found = list(file.blocks(layer, cells_per_block))
    assert [first for first, _ in found] == list(range(0, 23, cells_per_block))
    return np.vstack([block.toarray() for _, block in found])


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
def test_blocks_of_every_storage_form_are_the_matrix(tmp_path, form, dtype):
    adata = make_adata(COUNTS)
    adata.X = form(COUNTS.astype(dtype))
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert (read_all(tmp_path / "a.h5ad") == COUNTS).all()


def test_raw_and_named_layers_are_read(tmp_path):
    adata = make_adata(COUNTS)
    adata.raw = adata.copy()
    adata.layers["spliced"] = sparse.csr_matrix(COUNTS + 1)
    adata = adata[:, :4].copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert (read_all(tmp_path / "a.h5ad", "raw.X") == COUNTS).all()
    assert (read_all(tmp_path / "a.h5ad", "spliced") == COUNTS[:, :4] + 1).all()
    with H5adFile(tmp_path / "a.h5ad") as file:
        assert file.layers == ["X", "raw.X", "spliced"]
        assert (len(file.var("X")), len(file.var("raw.X"))) == (4, 9)


def log_file(tmp_path, *, raw=False, layer=False):
    adata = make_adata(COUNTS)
    if raw:
        adata.raw = adata.copy()
    if layer:
        adata.layers["counts"] = adata.X.copy()
    adata.X = sparse.csr_matrix(np.log1p(COUNTS))
    path = tmp_path / "log.h5ad"
    adata.write_h5ad(path)
    return path


def test_auto_takes_x_then_raw(tmp_path):
    with H5adFile(log_file(tmp_path, raw=True)) as file:
        assert file.choose_layer("auto") == "raw.X"
        with pytest.raises(
            DataError, match=r"layer X looks log-normalised.*ingest.layer = 'raw.X'"
        ):
            file.choose_layer("X")


def test_auto_names_the_layer_that_is_raw(tmp_path):
    with H5adFile(log_file(tmp_path, layer=True)) as file:
        expected = r"looks log-normalised, e.g. [\d.]+\. Raw .*set ingest.layer = 'counts'"
        with pytest.raises(DataError, match=expected):
            file.choose_layer("auto")
        assert file.choose_layer("counts") == "counts"


def test_no_raw_counts_anywhere(tmp_path):
    with H5adFile(log_file(tmp_path)) as file:
        with pytest.raises(DataError, match="No other layer of the file holds them"):
            file.choose_layer("auto")


def test_a_missing_layer_is_named_with_those_there(tmp_path):
    with H5adFile(log_file(tmp_path, layer=True)) as file:
        expected = r"no layer 'count'. Did you mean 'counts'\? It has: X, counts"
        with pytest.raises(DataError, match=expected):
            file.choose_layer("count")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, np.nan], "holds nan: missing or infinite"),
        ([1.0, np.inf], "holds inf: missing or infinite"),
        ([-1.0, 2.0], "holds negative values, e.g. -1"),
        ([0.5, 2.0], "looks log-normalised, e.g. 0.5"),
        ([0.5, 2000.0], "is not whole numbers, e.g. 0.5"),
        ([2.0**25], r".*more than float32 can count \(16777216\)"),
    ],
)
def test_values_that_are_no_counts(values, text):
    with pytest.raises(DataError, match=f"file 'f' {text}.*Raw counts are needed. Do that"):
        check_counts(np.array(values), where="file 'f'", advice=" Do that")


def test_whole_numbers_pass_in_any_type():
    for dtype in (np.float32, np.float64, np.int64, np.uint8):
        check_counts(np.array([0, 1, 200], dtype=dtype), where="x")
    with pytest.raises(DataError, match="holds true/false"):
        check_counts(np.array([True]), where="x")


def test_a_missing_file_suggests_a_neighbour(tmp_path):
    make_adata(COUNTS).write_h5ad(tmp_path / "donor1.h5ad")
    with pytest.raises(DataError, match=r"Did you mean 'donor1.h5ad'\? In .*: donor1.h5ad"):
        H5adFile(tmp_path / "doner1.h5ad")


def test_a_truncated_file(tmp_path):
    make_adata(make_counts(200, 50)).write_h5ad(tmp_path / "a.h5ad")
    data = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cut.h5ad' is truncated: it ends before"):
        H5adFile(tmp_path / "cut.h5ad")


def test_a_damaged_chunk(tmp_path):
    path = tmp_path / "a.h5ad"
    make_adata(make_counts(200, 50)).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(chunk.byte_offset + 4)
        raw.write(b"\xff" * (chunk.size - 8))
    with H5adFile(path) as file, pytest.raises(DataError, match=r"cannot read .* damaged"):
        list(file.blocks("X", 50))


def test_not_hdf5(tmp_path):
    (tmp_path / "a.h5ad").write_text("cell,gene\n1,2\n")
    with pytest.raises(DataError, match="is not an h5ad"):
        H5adFile(tmp_path / "a.h5ad")


def test_hdf5_but_not_an_h5ad(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("matrix")
    with pytest.raises(DataError, match="no obs and no var. It looks like a 10x matrix"):
        H5adFile(tmp_path / "a.h5")


def test_a_file_of_an_old_anndata(tmp_path):
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        for part in ("obs", "var"):
            file[part] = np.zeros(2, dtype=[("index", "S3")])
    with pytest.raises(DataError, match="older than 0.7"):
        H5adFile(tmp_path / "a.h5ad")


def test_nothing_to_ingest(tmp_path):
    ad.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["g"])).write_h5ad(
        tmp_path / "a.h5ad"
    )
    with H5adFile(tmp_path / "a.h5ad") as file:
        with pytest.raises(DataError, match="no X, no raw.X and no layers"):
            file.choose_layer("auto")
