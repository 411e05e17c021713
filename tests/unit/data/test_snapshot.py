import pickle
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
from cells_by_hand import dense, make_counts
from scipy import sparse

from cellray.core.errors import ConfigError, DataError
from cellray.data import opening, snapshot, storage
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.soma import open_store
from helpers_census import census_counts, census_obs, write_organism

ONE, TWO = make_counts(40, 20, seed=1), make_counts(30, 25, seed=2)


def now():
    """A moment that nothing shares: between two others."""
    time.sleep(0.01)
    text = storage.iso(storage.now_ms())
    time.sleep(0.01)
    return text


@pytest.fixture
def grown(tmp_path, write_h5ad):
    """A store of ours that was appended to, and the moments before, between and after."""
    before = now()
    uri = str(tmp_path / "s")
    one = write_h5ad("one.h5ad", ONE, prefix="a")
    ingest(IngestConfig(files=[one], uri=uri))
    between = now()
    two = write_h5ad("two.h5ad", TWO, prefix="b")
    ingest(IngestConfig(files=[two], uri=uri))
    return uri, before, between, now()


def counts_of(store):
    every = np.arange(store.num_genes, dtype=np.int32)
    joinids = store.obs([])["soma_joinid"].to_numpy()
    return dense(store.read_block(joinids, every), store.num_genes)


def test_a_store_of_ours_is_read_as_it_was(grown):
    uri, _, between, after = grown
    old = open_store(uri, timestamp=between)
    assert (old.num_cells, old.shape) == (40, (40, 20))
    assert (counts_of(old) == ONE).all()
    assert [f["dataset_id"] for f in old.ledger] == ["one"]
    assert old.describe()["cells"] == 40
    assert open_store(uri, timestamp=after) == open_store(uri)
    assert counts_of(open_store(uri)).shape == (70, 25)
    assert pickle.loads(pickle.dumps(old)) == old
    assert old.fingerprint(np.arange(40)) == open_store(uri).fingerprint(np.arange(40))


def test_a_time_before_the_store_names_the_first(grown):
    uri, before, _, _ = grown
    first = open_store(uri).ledger[0]["added_at"]
    with pytest.raises(DataError, match=f"no store at .* at {before}: it exists since {first}"):
        open_store(uri, timestamp=before)


def test_the_ledger_says_when_and_how_many(grown):
    uri, before, between, after = grown
    one, two = open_store(uri).ledger
    assert before < one["added_at"] < between < two["added_at"] < after
    assert (one["cells_total"], one["genes_total"]) == (40, {"RNA": 20})
    assert (two["cells_total"], two["genes_total"]) == (70, {"RNA": 25})


def test_a_store_without_times_has_no_past():
    entries = [{"file": "a", "cells": 3}]
    with pytest.raises(DataError, match="'s' does not say when its cells came .* ingest it again"):
        snapshot.size_at("s", entries, 10, measurement="RNA")
    stamped = snapshot.stamp(entries, cells=3, genes={"RNA": 2})
    with pytest.raises(DataError, match="'s' had no measurement 'ATAC' at"):
        snapshot.size_at("s", stamped, storage.now_ms(), measurement="ATAC")


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "22.11.2026"])
def test_what_is_no_time_is_refused(grown, text):
    with pytest.raises(ConfigError, match=f"timestamp '{text}' is not a time; write it like 2026"):
        open_store(grown[0], timestamp=text)


def test_the_future_is_refused(grown):
    with pytest.raises(ConfigError, match="'2126-01-01' lies in the future .* take an earlier one"):
        open_store(grown[0], timestamp="2126-01-01")


def test_times_are_utc_unless_they_say_otherwise():
    day = storage.parse_moment("2026-01-01")
    assert day == storage.parse_moment("2026-01-01T00:00:00Z") == 1_767_225_600_000
    assert storage.parse_moment("2026-01-01T02:00:00+02:00") == day
    for at_ms in (day, day + 1, day + 999, 1_795_384_188_737):
        assert storage.parse_moment(storage.iso(at_ms)) == at_ms


def test_reading_goes_on_while_the_store_is_appended_to(tmp_path, write_h5ad):
    uri = str(tmp_path / "s")
    ingest(IngestConfig(files=[write_h5ad("one.h5ad", ONE, prefix="a")], uri=uri))
    more = [
        write_h5ad(f"m{i}.h5ad", make_counts(20, 22, seed=i), prefix=f"m{i}") for i in (3, 4, 5)
    ]
    store, done, reads = open_store(uri), threading.Event(), 0

    def append():
        for path in more:
            ingest(IngestConfig(files=[path], uri=uri))
        done.set()

    writer = threading.Thread(target=append)
    writer.start()
    every = np.arange(20, dtype=np.int32)
    while not done.is_set() or reads == 0:
        seen = pickle.loads(pickle.dumps(store))  # as another process has it: no open handle yet
        for reader in (store, seen):
            rows = np.random.default_rng(reads).permutation(40)
            block = reader.read_block(rows, every, obs=["obs_id"])
            assert (dense(block, 20) == ONE[rows]).all()
            assert block.obs["obs_id"].tolist() == [f"a{i}" for i in rows]
        assert len(seen.obs(["nnz"])) == 40
        assert len(seen.var()) == 20
        reads += 1
    writer.join()
    assert reads > 1
    assert open_store(uri).num_cells == 100


def test_a_store_that_is_replaced_while_it_is_opened_is_opened_again(
    tmp_path, write_h5ad, monkeypatch
):
    uri = str(tmp_path / "s")
    ingest(IngestConfig(files=[write_h5ad("one.h5ad", ONE, prefix="a")], uri=uri))
    real, tries = opening.open_soma, []

    def once_amiss(*args, **keys):
        tries.append(1)
        if len(tries) == 1:
            raise DataError("it is not a valid TileDB array or group")
        return real(*args, **keys)

    monkeypatch.setattr(opening, "open_soma", once_amiss)
    assert open_store(uri).num_cells == 40
    assert len(tries) == 2


def grow_in_place(uri, counts, first):
    """Append to a SOMA experiment as other writers do: resize, then write."""
    joinids = np.arange(first, first + len(counts))
    shape = (first + len(counts), counts.shape[1])
    with tiledbsoma.open(f"{uri}/obs", "w") as obs:
        obs.change_domain([(0, shape[0] - 1)])
    with tiledbsoma.open(f"{uri}/obs", "w") as obs:
        obs.write(census_obs(counts, joinids))
    with tiledbsoma.open(f"{uri}/ms/RNA/X/raw", "w") as x:
        x.resize(shape)
    with tiledbsoma.open(f"{uri}/ms/RNA/X/raw", "w") as x:
        coo = sparse.coo_matrix(counts)
        columns = {"soma_dim_0": joinids[coo.row], "soma_dim_1": coo.col.astype(np.int64)}
        x.write(pa.table({**columns, "soma_data": coo.data}))


@pytest.fixture
def foreign(tmp_path):
    uri = str(tmp_path / "foreign")
    counts = census_counts(120, 30)
    before = now()
    with tiledbsoma.Experiment.create(uri) as experiment:
        write_organism(experiment, counts[:60])
    return uri, counts, before


def test_a_foreign_store_is_pinned_while_it_grows(foreign):
    uri, counts, _ = foreign
    between = now()
    store, idle = open_store(uri), open_store(uri)
    digest = store.fingerprint(np.arange(60))
    assert between < store.timestamp
    assert (counts_of(store) == counts[:60]).all()
    grow_in_place(uri, counts[60:], 60)
    for seen in (store, idle, open_store(uri, timestamp=between)):
        assert (seen.num_cells, seen.shape) == (60, (60, 30))
        assert (counts_of(seen) == counts[:60]).all()
        assert seen.obs(["cell_type"])["cell_type"].notna().all()
        assert seen.fingerprint(np.arange(60)) == digest
    assert (counts_of(open_store(uri)) == counts).all()


def test_a_foreign_store_did_not_exist_before_it_was_written(foreign):
    uri, _, before = foreign
    with pytest.raises(DataError, match=f"no store at .* at {before}: it exists since 20"):
        open_store(uri, timestamp=before)
    with pytest.raises(DataError, match="at 2001-01-01T00:00:00.000Z: it exists since 20") as found:
        open_store(uri, timestamp="2001-01-01")
    first = storage.parse_moment(str(found.value).split("since ")[1])
    assert 0 <= first - storage.parse_moment(before) < 3000
