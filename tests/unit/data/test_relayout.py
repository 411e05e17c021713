"""A SOMA experiment rewritten in the training layout: nothing lost, bounded, atomic, ours after."""

import json
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledbsoma
from cells_by_hand import dense, make_adata, make_counts

from cellray.cli import main
from cellray.core.errors import ConfigError, DataError
from cellray.data import relayout_parts as module
from cellray.data.copying import copy_store
from cellray.data.digest import cell_hashes, hash64
from cellray.data.existing import stored_library_sizes, stored_sketch
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.relayout import SOURCE_JOINID, relayout
from cellray.data.relayout_parts import spans
from cellray.data.sketch import MAX_RELATIVE_ERROR
from cellray.data.soma import open_store
from cellray.data.staging import staging_of
from cellray.data.stats import nonzero_medians

NUM_CELLS, NUM_GENES = 5000, 30
COUNTS = make_counts(NUM_CELLS, NUM_GENES, seed=3)
CELLS, GENES_RANGE = (0, NUM_CELLS - 1), (0, NUM_GENES - 1)
INDEX = ["soma_joinid"]
GENES = [f"ENSG{i:011d}" for i in range(NUM_GENES)]


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    """A store as the Census writes it: 2048 x 2048 tiles, its names, more columns than ours."""
    uri = str(tmp_path_factory.mktemp("census") / "homo_sapiens")
    obs = pa.table(
        {
            "soma_joinid": np.arange(NUM_CELLS),
            "dataset_id": pa.array([f"set{i // 1000}" for i in range(NUM_CELLS)]),
            "observation_joinid": pa.array([f"o{i:05d}" for i in range(NUM_CELLS)]),
            "tissue": pa.array(["liver" if i % 3 else None for i in range(NUM_CELLS)]),
            "is_primary_data": pa.array([i % 2 == 0 for i in range(NUM_CELLS)]),
            "raw_sum": COUNTS.sum(axis=1, dtype=np.float64),
            "nnz": np.full(NUM_CELLS, 7, dtype=np.int64),  # not what X says
        }
    )
    var = pa.table(
        {
            "soma_joinid": np.arange(NUM_GENES),
            "feature_id": pa.array(GENES),
            "feature_name": pa.array([f"G{i}" for i in range(NUM_GENES)]),
            "feature_length": np.arange(NUM_GENES) * 10,
        }
    )
    row, gene = np.nonzero(COUNTS)
    x = {"soma_dim_0": row, "soma_dim_1": gene, "soma_data": COUNTS[row, gene]}
    tiles = {"dims": {d: {"tile": 2048} for d in ("soma_dim_0", "soma_dim_1")}}
    with tiledbsoma.Experiment.create(uri) as experiment:
        frame = experiment.add_new_dataframe(
            "obs",
            schema=obs.schema,
            domain=[CELLS],
            index_column_names=["soma_joinid"],
        )
        frame.write(obs)
        ms = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        frame = ms.add_new_dataframe(
            "var",
            schema=var.schema,
            domain=[GENES_RANGE],
            index_column_names=["soma_joinid"],
        )
        frame.write(var)
        array = ms.add_new_collection("X").add_new_sparse_ndarray(
            "raw",
            type=pa.float32(),
            shape=(NUM_CELLS, NUM_GENES),
            platform_config={"tiledb": {"create": tiles}},
        )
        array.write(pa.table(x))
    return uri


@pytest.fixture(scope="module")
def rewritten(census, tmp_path_factory):
    lines = []
    uri = str(tmp_path_factory.mktemp("rewritten") / "store")
    report = relayout(census, uri, cells_per_block=2048, progress=lines.append)
    return open_store(uri), report, lines


def matrix(store, joinids=None):
    joinids = np.arange(store.num_cells) if joinids is None else joinids
    return dense(store.read_block(joinids, np.arange(store.num_genes, dtype=np.int32)), NUM_GENES)


def test_every_count_is_there_in_the_same_order(rewritten):
    store, report, lines = rewritten
    assert np.array_equal(matrix(store), COUNTS)
    assert (report.cells, report.genes) == (NUM_CELLS, NUM_GENES)
    assert report.nonzeros == np.count_nonzero(COUNTS)
    assert lines[-1].startswith("5,000 of 5,000 cells")
    assert lines[-1].endswith(" 0 s left")


def test_x_has_the_layout_of_our_stores(rewritten):
    store, _, _ = rewritten
    with tiledbsoma.open(f"{store.uri}/ms/RNA/X/raw") as x:
        found = json.loads(x.schema_config_options().dims)
    assert int(found["soma_dim_0"]["tile"]) == 64
    assert int(found["soma_dim_1"]["tile"]) >= NUM_GENES


def test_all_columns_are_kept_and_ours_are_added(rewritten, census):
    store, _, _ = rewritten
    obs, before = store.obs(), open_store(census).obs()
    for name in ("dataset_id", "observation_joinid", "tissue", "is_primary_data"):
        pd.testing.assert_series_equal(
            obs[name].astype(object), before[name].astype(object), check_dtype=False
        )
    assert obs[SOURCE_JOINID].tolist() == list(range(NUM_CELLS))
    assert obs["obs_id"].tolist() == before["observation_joinid"].tolist()
    assert np.array_equal(obs["nnz"], np.count_nonzero(COUNTS, axis=1))
    assert (obs["nnz_source"] == 7).all()  # said something else than X: kept beside ours
    assert "raw_sum_source" not in obs  # said the same
    assert (obs["n_measured_vars"] == NUM_GENES).all()
    var = store._experiment.ms["RNA"].var.read().concat().to_pandas()
    assert var["feature_length"].tolist() == [10 * i for i in range(NUM_GENES)]
    assert np.array_equal(var["nnz"], np.count_nonzero(COUNTS, axis=0))


def test_the_cells_have_the_hashes_of_the_source(rewritten, census):
    store, _, _ = rewritten
    every_gene = np.arange(NUM_GENES, dtype=np.int32)
    block = open_store(census).read_block(np.arange(NUM_CELLS), every_gene)
    expected = cell_hashes(block.indptr, block.genes, block.counts, hash64(GENES))
    assert np.array_equal(store.obs()["cell_hash"].to_numpy(), expected)
    assert len(np.unique(expected)) > 1


def test_a_filter_keeps_its_cells_with_their_old_ids(census, tmp_path):
    wanted = np.flatnonzero((np.arange(NUM_CELLS) % 2 == 0) & (np.arange(NUM_CELLS) >= 3000))
    rule = "is_primary_data == True and soma_joinid >= 3000"
    report = relayout(census, str(tmp_path / "store"), obs_filter=rule)
    store = open_store(str(tmp_path / "store"))
    assert report.cells == store.num_cells == len(wanted)
    assert np.array_equal(store.obs()[SOURCE_JOINID], wanted)
    assert np.array_equal(matrix(store), COUNTS[wanted])
    assert store.ledger[0]["cells_dropped"] == NUM_CELLS - len(wanted)


def test_blocks_end_where_tiles_of_the_census_do():
    joinids = np.array([0, 2047, 2048, 4100, 4101, 9000])
    parts = [joinids[s].tolist() for s in spans(joinids, 2048)]
    assert parts == [[0, 2047], [2048], [4100, 4101], [9000]]


def test_cells_can_be_appended_and_the_same_ones_are_refused(census, tmp_path, write_h5ad):
    uri = str(tmp_path / "store")
    relayout(census, uri)
    more = make_counts(9, NUM_GENES, seed=8)
    path = write_h5ad("more.h5ad", more, GENES, prefix="new")
    ingest(IngestConfig(files=[path], uri=uri, append=True))
    store = open_store(uri)
    assert np.array_equal(matrix(store), np.vstack([COUNTS, more]))
    assert len(store.ledger) == 2
    with pytest.raises(DataError):
        ingest(IngestConfig(files=[path], uri=uri, append=True))


def test_our_own_store_keeps_its_ledger(make_store, tmp_path):
    before = make_store(COUNTS[:40], GENES)
    relayout(before.uri, str(tmp_path / "again"))
    after = open_store(str(tmp_path / "again"))
    assert json.dumps(after.ledger) == json.dumps(before.ledger)
    assert np.array_equal(matrix(after), COUNTS[:40])
    every = np.arange(40)
    assert after.fingerprint(every) == before.fingerprint(every)


def test_nothing_is_left_when_a_block_cannot_be_read(census, tmp_path, monkeypatch):
    calls = []

    def fails(*args):
        calls.append(args)
        raise DataError("the disk is gone")

    monkeypatch.setattr(module, "write_block", fails)
    with pytest.raises(DataError, match="the disk is gone"):
        relayout(census, str(tmp_path / "store"))
    assert calls
    assert not (tmp_path / "store").exists()
    assert not staging_of(tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"cells_per_block": 1000}, ConfigError, "a multiple of 2048"),
        ({"workers": -1}, ConfigError, "workers = -1; it must be 0"),
        ({"obs_filter": "tissue == 'brain'"}, DataError, "keeps no cell"),
        ({"obs_filter": "tisue == 'brain'"}, DataError, "is not understood"),
        ({"measurement": "RMA"}, DataError, "Did you mean 'RNA'"),
        ({"layer": "rav"}, DataError, "no layer 'rav'"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_written(census, tmp_path, keys, error, text):
    with pytest.raises(error, match=text):
        relayout(census, str(tmp_path / "store"), **keys)
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_exists_or_is_remote_is_refused(census, tmp_path):
    with pytest.raises(DataError, match="exists; choose another target"):
        relayout(census, str(tmp_path))
    with pytest.raises(DataError, match="is not a local folder"):
        relayout(census, "s3://bucket/store")


def test_the_command(census, tmp_path, capsys):
    words = ["relayout", census, str(tmp_path / "store"), "--obs-filter", "soma_joinid < 10"]
    assert main(words) == 0
    assert "10 cells x 30 genes" in capsys.readouterr().out
    assert main([*words[:2], str(tmp_path / "b"), "--tiledb", "nonsense"]) != 0
    assert "--tiledb nonsense: write it KEY=VALUE" in capsys.readouterr().err
    assert main(words) == 1
    assert "exists" in capsys.readouterr().err


def test_the_new_store_keeps_medians_and_library_sizes(census, tmp_path):
    relayout(census, str(tmp_path / "new"))
    store = open_store(str(tmp_path / "new"))
    every = np.arange(store.num_genes, dtype=np.int32)
    rows = np.arange(store.num_cells)
    exact = nonzero_medians(store, rows, every, store.num_genes)
    assert np.abs(store.nonzero_medians() / exact - 1).max() <= MAX_RELATIVE_ERROR
    sizes = store.read_block(rows, every).library_sizes
    assert stored_library_sizes(store.uri)[0.5] == pytest.approx(np.median(sizes))


def test_a_layer_without_raw_counts_is_refused_and_nothing_is_written(census, tmp_path):
    with tiledbsoma.open(f"{census}/ms/RNA/X", "w") as layers:
        halves = layers.add_new_sparse_ndarray(
            "normalized", type=pa.float32(), shape=(NUM_CELLS, NUM_GENES)
        )
        halves.write(
            pa.table({"soma_dim_0": [3], "soma_dim_1": [2], "soma_data": np.float32([0.5])})
        )
    with pytest.raises(DataError, match=r"layer normalized, cells .*Raw counts are needed. Name"):
        relayout(census, str(tmp_path / "store"), layer="normalized")
    assert list(tmp_path.iterdir()) == []


def test_a_place_inside_a_store_is_refused(census, tmp_path, make_store):
    inside = f"{make_store(COUNTS[:9]).uri}/sub"
    for write in (relayout, copy_store):
        with pytest.raises(DataError, match="lies in the store .*would lose it"):
            write(census, inside)


def content(uri):
    """All that a store holds."""
    store = open_store(uri)
    with tiledbsoma.open(uri) as experiment:
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
    sketch = stored_sketch(uri).to_bytes()
    return matrix(store).tobytes(), store.obs().to_csv(), var.to_csv(), sketch


@pytest.fixture(scope="module")
def long(tmp_path_factory, census):
    """Five parts of cells: the source, thrice."""
    folder = tmp_path_factory.mktemp("long")
    for number in range(3):
        adata = make_adata(np.vstack([COUNTS, COUNTS[:3000]]), GENES, prefix=f"c{number}-")
        adata.write_h5ad(folder / f"{number}.h5ad")
    files = [str(folder / f"{n}.h5ad") for n in range(3)]
    ingest(IngestConfig(files=files, uri=str(folder / "store"), workers=1))
    return str(folder / "store")


def test_the_store_is_the_same_for_any_number_of_workers(ray_cluster, long, tmp_path):
    lines = []
    for workers in (1, 2):
        place = str(tmp_path / str(workers))
        relayout(long, place, cells_per_block=2048, workers=workers, progress=lines.append)
    assert content(str(tmp_path / "1")) == content(str(tmp_path / "2"))
    assert sum(line.startswith("24,000 of 24,000 cells, ") for line in lines) == 2


KILLED = """
import os, signal, sys
from cellray.data import relayout_parts as module
from cellray.data.relayout import relayout
real, seen = module.write_block, []
def write(*args):
    real(*args)
    seen.append(1)
    if len(seen) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
module.write_block = write
relayout(sys.argv[1], sys.argv[2], cells_per_block=2048, workers=1)
"""


def test_a_killed_relayout_goes_on_where_it_was(long, tmp_path):
    target = str(tmp_path / "store")
    done = subprocess.run([sys.executable, "-c", KILLED, long, target], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    lines = []
    relayout(long, target, cells_per_block=2048, workers=1, progress=lines.append)
    assert lines[0] == "16,384 of 24,000 cells taken over from one that was interrupted"
    relayout(long, str(tmp_path / "whole"), cells_per_block=2048, workers=1)
    assert content(target) == content(str(tmp_path / "whole"))
    assert not staging_of(tmp_path / "store").exists()


@pytest.mark.slow
def test_parts_of_another_state_of_the_source_are_not_taken_over(make_store, tmp_path, write_h5ad):
    source, target = make_store(np.vstack([COUNTS] * 2), GENES), str(tmp_path / "new")
    kill = KILLED.replace("== 10", "== 5")
    subprocess.run([sys.executable, "-c", kill, source.uri, target], check=False)
    left = staging_of(tmp_path / "new") / "parts"
    assert any((p / "figures.npz").is_file() for p in left.iterdir())
    path = write_h5ad("more.h5ad", make_counts(9, NUM_GENES, seed=8), GENES, prefix="new")
    ingest(IngestConfig(files=[path], uri=source.uri))
    lines = []
    relayout(source.uri, target, cells_per_block=2048, progress=lines.append)
    assert not any("taken over" in line for line in lines)
    assert open_store(target).num_cells == 10_009
