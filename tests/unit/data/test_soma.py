import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
from cells_by_hand import dense, make_counts
from scipy import sparse

from cellray.core.errors import DataError
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.rows import RowLookup
from cellray.data.soma import Store, open_store

NUM_CELLS, NUM_GENES = 150, 40
COUNTS = make_counts(NUM_CELLS, NUM_GENES, seed=1)
OBS = {
    "donor": [f"d{i % 3}" for i in range(NUM_CELLS)],
    "age": [20 + i % 5 for i in range(NUM_CELLS)],
}


@pytest.fixture
def store(make_store):
    return make_store(COUNTS, obs=OBS)


def every_gene(store):
    return np.arange(store.num_genes, dtype=np.int32)


@pytest.mark.parametrize("seed", range(4))
def test_a_block_is_the_cells_asked_for_in_that_order(store, seed):
    joinids = np.random.default_rng(seed).permutation(NUM_CELLS)[: 30 + 40 * seed]
    block = store.read_block(joinids, every_gene(store))
    assert (block.joinids == joinids).all()
    assert (dense(block, NUM_GENES) == COUNTS[joinids]).all()
    assert (block.library_sizes == COUNTS[joinids].sum(axis=1)).all()
    assert (block.genes.dtype, block.counts.dtype, block.indptr.dtype) == (
        np.int32,
        np.float32,
        np.int64,
    )


def test_coordinates_as_values_show_that_nothing_is_misplaced(make_store):
    rows, genes = np.meshgrid(np.arange(60), np.arange(30), indexing="ij")
    store = make_store(rows * 30 + genes + 1, uri="coords")
    joinids = np.random.default_rng(0).permutation(60)
    block = store.read_block(joinids, every_gene(store))
    expected = joinids[:, None] * 30 + np.arange(30) + 1
    assert (block.counts.reshape(60, 30) == expected).all()


def test_genes_are_remapped_permuted_and_dropped(store):
    rng = np.random.default_rng(5)
    gene_map = np.full(NUM_GENES, -1, dtype=np.int32)
    kept = rng.permutation(NUM_GENES)[:25]
    gene_map[kept] = rng.permutation(25)
    joinids = rng.permutation(NUM_CELLS)
    block = store.read_block(joinids, gene_map)
    expected = np.zeros((NUM_CELLS, 25), np.float32)
    expected[:, gene_map[kept]] = COUNTS[joinids][:, kept]
    assert (dense(block, 25) == expected).all()
    assert (block.library_sizes == COUNTS[joinids].sum(axis=1)).all()


def test_a_vocabulary_without_any_gene_gives_empty_cells(store):
    block = store.read_block(np.array([3, 1]), np.full(NUM_GENES, -1, np.int32))
    assert block.indptr.tolist() == [0, 0, 0]
    assert (block.library_sizes == COUNTS[[3, 1]].sum(axis=1)).all()


def test_empty_cells_and_empty_requests(make_store):
    counts = np.zeros((4, 3), np.float32)
    counts[2] = [1, 0, 2]
    store = make_store(counts, uri="sparse")
    block = store.read_block(np.array([3, 2, 0]), every_gene(store))
    assert block.indptr.tolist() == [0, 0, 2, 2]
    assert len(store.read_block(np.array([0, 1]), every_gene(store)).genes) == 0
    assert len(store.read_block(np.array([], np.int64), every_gene(store))) == 0


def test_wrong_requests_are_refused(store):
    genes = every_gene(store)
    with pytest.raises(DataError, match="joinid 7 is asked for more than once"):
        store.read_block(np.array([7, 3, 7]), genes)
    with pytest.raises(DataError, match=r"joinid 150 is not in .* \(0 .. 149\)"):
        store.read_block(np.array([3, 150]), genes)
    with pytest.raises(DataError, match=r"joinid -1 is not in"):
        store.read_block(np.array([-1]), genes)
    with pytest.raises(DataError, match=r"gene_map has \(3,\) entries, var of .* has 40 genes"):
        store.read_block(np.array([0]), genes[:3])


def test_obs_columns_travel_with_a_block(store):
    joinids = np.array([10, 4, 149])
    block = store.read_block(joinids, every_gene(store), obs=["donor", "age"])
    assert block.obs["donor"].tolist() == ["d1", "d1", "d2"]
    assert block.obs["age"].tolist() == [20, 24, 24]


def test_a_wide_span_is_looked_up_like_a_narrow_one():
    assert RowLookup(np.array([10, 1 << 40, 3]))(np.array([1 << 40, 3, 3])).tolist() == [1, 2, 2]
    assert RowLookup(np.array([10, 3]))(np.array([10, 3])).tolist() == [0, 1]


def test_obs_is_sorted_and_filtered_in_the_store(store):
    frame = store.obs(["donor"])
    assert frame.columns.tolist() == ["soma_joinid", "donor"]
    assert frame["soma_joinid"].tolist() == list(range(NUM_CELLS))
    assert frame["donor"].tolist() == OBS["donor"]
    some = store.obs(["age"], value_filter="donor == 'd1' and age >= 22")
    expected = [i for i in range(NUM_CELLS) if i % 3 == 1 and i % 5 >= 2]
    assert some["soma_joinid"].tolist() == expected
    labels = store.obs(["donor"], value_filter="donor in ['d0', 'd2']")["donor"].cat.categories
    assert labels.tolist() == ["d0", "d2"]
    assert len(store.obs(value_filter="donor == 'nobody'")) == 0


def test_obs_has_the_census_columns(store):
    frame = store.obs()
    assert (frame["raw_sum"] == COUNTS.sum(axis=1)).all()
    assert (frame["nnz"] == (COUNTS > 0).sum(axis=1)).all()
    assert (frame["n_measured_vars"] == NUM_GENES).all()
    assert frame["obs_id"].tolist() == [f"cell{i}" for i in range(NUM_CELLS)]


def test_unknown_columns_and_bad_filters_are_refused(store):
    with pytest.raises(DataError, match=r"no column 'doner'. Did you mean 'donor'\? It has: soma"):
        store.obs(["doner"])
    for text in ("donor = 'd1'", "doner == 'd1'", "age == 'x'", "donor =="):
        with pytest.raises(DataError, match="obs filter .* is not understood: .*columns: soma"):
            store.obs(["donor"], value_filter=text)


def test_var_names_the_genes(store):
    var = store.var()
    assert var.columns.tolist() == ["soma_joinid", "feature_id", "feature_name"]
    assert var["feature_id"].tolist() == [f"ENSG{i:011d}" for i in range(NUM_GENES)]
    assert var["feature_name"].iloc[3] == "TSPAN6"


def test_a_store_is_cheap_to_pickle_and_equal_by_place(store):
    store.read_block(np.array([0]), every_gene(store))
    data = pickle.dumps(store)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again == store
    assert hash(again) == hash(store)
    assert (again.read_block(np.array([5]), every_gene(store)).counts > 0).all()


def test_describe_says_what_is_there(store):
    said = store.describe()
    assert (said["cells"], said["genes"], said["layers"]) == (NUM_CELLS, NUM_GENES, ["raw"])
    assert said["obs_columns"]["donor"] == {"type": "string", "distinct": 3}
    assert said["obs_columns"]["obs_id"] == {"type": "string", "distinct": NUM_CELLS}
    assert said["obs_columns"]["age"] == {"type": "int64"}
    assert [f["dataset_id"] for f in said["files"]] == ["store"]
    assert said["bytes_on_disk"] > 1000


def test_fingerprint_is_of_content_not_of_order_or_place(store, make_store, tmp_path):
    ids = np.array([5, 3, 100])
    assert store.fingerprint(ids) == store.fingerprint(ids[::-1])
    assert store.fingerprint(ids) != store.fingerprint(ids[:2])
    order = np.random.default_rng(2).permutation(NUM_GENES)
    turned = make_store(COUNTS[:, order], [f"ENSG{i:011d}.7" for i in order], obs=OBS, uri="turned")
    everything = np.arange(NUM_CELLS)
    assert turned.fingerprint(everything) == store.fingerprint(everything)
    changed = COUNTS.copy()
    changed[17, 3] += 1
    other = make_store(changed, obs=OBS, uri="changed")
    assert other.fingerprint(everything) != store.fingerprint(everything)
    assert other.fingerprint(everything[:17]) == store.fingerprint(everything[:17])
    assert len(store.fingerprint(np.array([], np.int64))) == 64


def make_census(folder, counts, *, layer="raw", tile=16):
    """An experiment as Census writes it: its tiling, its column names, no cell_hash."""
    num_cells, num_genes = counts.shape
    obs = pa.table(
        {
            "soma_joinid": np.arange(num_cells),
            "observation_joinid": [f"cell{i}" for i in range(num_cells)],
        }
    )
    var = pa.table(
        {
            "soma_joinid": np.arange(num_genes),
            "feature_id": [f"ENSG{i:011d}" for i in range(num_genes)],
            "feature_name": [f"S{i}" for i in range(num_genes)],
        }
    )
    dims = {d: {"tile": tile} for d in ("soma_dim_0", "soma_dim_1")}
    options = {"tiledb": {"create": {"capacity": 50, "dims": dims}}}
    with tiledbsoma.Experiment.create(str(folder)) as experiment:
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        for parent, name, table in ((experiment, "obs", obs), (rna, "var", var)):
            parent.add_new_dataframe(
                name,
                schema=table.schema,
                index_column_names=["soma_joinid"],
                domain=[(0, len(table) - 1)],
            ).write(table)
        x = rna.add_new_collection("X").add_new_sparse_ndarray(
            layer, type=pa.float32(), shape=counts.shape, platform_config=options
        )
        coo = sparse.coo_matrix(counts)
        x.write(
            pa.table(
                {
                    "soma_dim_0": coo.row.astype(np.int64),
                    "soma_dim_1": coo.col.astype(np.int64),
                    "soma_data": coo.data,
                }
            )
        )
    return str(folder)


def test_a_census_store_is_read_by_the_same_code(tmp_path, store):
    census = open_store(make_census(tmp_path / "homo_sapiens", COUNTS))
    joinids = np.random.default_rng(0).permutation(NUM_CELLS)
    block = census.read_block(joinids, every_gene(census))
    assert (dense(block, NUM_GENES) == COUNTS[joinids]).all()
    assert census.var()["feature_name"].iloc[2] == "S2"
    assert census.ledger == []


def test_the_fingerprint_of_a_foreign_store_is_of_what_x_consists_of(tmp_path):
    uri = make_census(tmp_path / "homo_sapiens", COUNTS)
    census, ids = open_store(uri), np.array([5, 3, 100])
    assert census.fingerprint(ids) == open_store(uri).fingerprint(ids[::-1])
    assert census.fingerprint(ids) != census.fingerprint(ids[:2])
    shutil.copytree(uri, tmp_path / "elsewhere")
    assert open_store(str(tmp_path / "elsewhere")).fingerprint(ids) == census.fingerprint(ids)
    other = make_census(tmp_path / "again", COUNTS)
    assert open_store(other).fingerprint(ids) != census.fingerprint(ids)
    before = census.fingerprint(ids)
    with tiledbsoma.open(f"{uri}/ms/RNA/X/raw", "w") as x:
        cell = {"soma_dim_0": [7], "soma_dim_1": [0], "soma_data": np.float32([9])}
        x.write(pa.table(cell))
    assert census.fingerprint(ids) == before  # what it saw when it was opened
    assert open_store(uri).fingerprint(ids) != before


def test_ingest_does_not_touch_a_store_it_did_not_write(tmp_path, write_h5ad):
    uri = make_census(tmp_path / "homo_sapiens", COUNTS)
    with pytest.raises(DataError, match="is a SOMA experiment that cellray did not write"):
        ingest(IngestConfig(files=[write_h5ad("a.h5ad", COUNTS)], uri=uri))
    assert open_store(uri).num_cells == NUM_CELLS


def test_missing_measurement_and_layer_name_those_there(store):
    with pytest.raises(DataError, match=r"no measurement 'rna'.* It has: RNA; set data.measurem"):
        open_store(store.uri, measurement="rna")
    with pytest.raises(DataError, match=r"no layer 'row'. Did you mean 'raw'\? It has: raw"):
        open_store(store.uri, layer="row")


def test_a_store_that_is_not_there_suggests_a_neighbour(store, tmp_path):
    with pytest.raises(DataError, match=r"no store at .*Did you mean 'store'\? .* holds: store"):
        open_store(str(tmp_path / "stor"))
    with pytest.raises(DataError, match="there is no folder .* either"):
        open_store(str(tmp_path / "no" / "where"))


def test_things_that_are_not_stores(store, tmp_path):
    with pytest.raises(DataError, match="is a file, not a SOMA store; `cellray ingest` makes"):
        open_store(str(tmp_path / "store.h5ad"))
    with pytest.raises(DataError, match="a folder but not a SOMA store. It holds the stores store"):
        open_store(str(tmp_path))
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match="not a SOMA store. It holds nothing"):
        open_store(str(tmp_path / "plain"))
    with pytest.raises(DataError, match="is a SOMADataFrame, not a SOMAExperiment"):
        open_store(f"{store.uri}/obs")
    with pytest.raises(DataError, match="cannot be opened as a SOMA experiment"):
        open_store("nosuch://bucket/store")


def test_a_store_that_lost_its_members(store):
    shutil.rmtree(f"{store.uri}/__group")
    with pytest.raises(DataError, match="is a SOMA experiment without ms"):
        open_store(store.uri)


def test_an_experiment_without_obs_and_one_from_the_future(tmp_path, store):
    with tiledbsoma.Experiment.create(str(tmp_path / "bare")) as experiment:
        experiment.add_new_collection("ms")
    with pytest.raises(DataError, match="a SOMA experiment without obs"):
        open_store(str(tmp_path / "bare"))
    with tiledbsoma.open(store.uri, "w") as experiment:
        experiment.metadata["cellray_format"] = 99
    with pytest.raises(DataError, match="has store format 99; this version of cellray reads up"):
        open_store(store.uri)


def test_a_file_uri_is_a_path(store):
    assert open_store(f"file://{store.uri}") == store
    assert isinstance(store, Store)


@pytest.mark.parametrize("name", ["soma-exp-pbmc-small", "soma-exp-pbmc-small-pre-1.15"])
def test_experiments_written_by_r_are_read(cellray_data, tmp_path, name):
    shutil.unpack_archive(cellray_data / "formats" / f"{name}.tar.gz", tmp_path / name)
    with pytest.raises(DataError, match="no layer 'raw'.*It has: counts, data, scale_data"):
        open_store(str(tmp_path / name))
    store = open_store(str(tmp_path / name), layer="counts")
    assert (store.num_cells, store.num_genes) == (80, 230)
    joinids = np.random.default_rng(0).permutation(80)
    block = store.read_block(joinids, every_gene(store), obs=["groups"])
    assert block.counts.sum() == block.library_sizes.sum() == store.obs()["nCount_RNA"].sum()
    assert len(block.counts) == 4456
    assert store.var()["feature_id"].iloc[0] == store.var()["feature_name"].iloc[0]
    assert set(block.obs["groups"]) == {"g1", "g2"}
    assert len(store.fingerprint(joinids)) == 64
