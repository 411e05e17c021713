"""Stores in an S3-compatible object store: copied there, read as if local, through faults too."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cellray.cli import main
from cellray.core.errors import DataError
from cellray.data.config import DataSection
from cellray.data.copying import copy_store, publish_to
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.pipeline import token_stream
from cellray.data.soma import open_store
from cellray.testing import assert_same_cells
from helpers_cells import known_cells
from helpers_census import census_counts, write_census
from helpers_s3 import s3_server
from helpers_source import source_and_plan

BLOOD = "is_primary_data == True and tissue_general == 'blood'"
EVERY_GENE = np.arange(60, dtype=np.int32)
ROWS = np.random.default_rng(0).permutation(240)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        server.make_bucket("cells")
        yield server


@pytest.fixture
def options(s3):
    """Settings to reach the server, which has no faults before and after a test."""
    s3.faults()
    yield s3.options()
    s3.faults()


@pytest.fixture(scope="module")
def remote(s3, small_store):
    """The small store in the object store."""
    uri = "s3://cells/atlas/small"
    copy_store(small_store, uri, tiledb=s3.options())
    return uri


@pytest.fixture(scope="module")
def local(small_store):
    return open_store(small_store)


def blocks_equal(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("joinids", "indptr", "genes", "counts", "library_sizes")
    )


def same_cells(store, local):
    return blocks_equal(store.read_block(ROWS, EVERY_GENE), local.read_block(ROWS, EVERY_GENE))


def test_a_store_in_a_bucket_is_read_like_a_local_one(remote, options, local):
    store = open_store(remote, tiledb=options)
    assert (store.uri, store.shape, store.num_cells) == (remote, (240, 60), 240)
    assert same_cells(store, local)
    wanted = {"columns": ["donor", "nnz"], "value_filter": "donor in ['d1', 'd2'] and nnz > 20"}
    assert store.obs(**wanted).equals(local.obs(**wanted))
    assert store.var().equals(local.var())
    here, there = local.describe(), store.describe()
    assert there.pop("bytes_on_disk") is None
    assert {k: v for k, v in there.items() if k != "uri"} == {
        k: v for k, v in here.items() if k not in ("uri", "bytes_on_disk")
    }
    assert store.fingerprint(ROWS) == local.fingerprint(ROWS)
    when = local.ledger[0]["added_at"]
    assert open_store(remote, tiledb=options, timestamp=when) == store


@pytest.mark.ray
def test_actors_in_other_processes_stream_the_same_tokens(remote, options, local, ray_cluster):
    data = DataSection(uri=remote, tiledb=options, obs_filter="donor in ['d0', 'd3']")
    far, plan = source_and_plan(data)
    near, _ = source_and_plan(data.model_copy(update={"uri": local.uri, "tiledb": {}}))
    assert near.joinids.tolist() == far.joinids.tolist()
    steps = list(token_stream(far, plan, first_step=0, last_step=plan.batches_per_epoch, actors=2))
    assert_same_cells([np.concatenate([s.block.joinids for s in steps])], far.joinids)
    for step in steps:
        expected = near.tokens(step.block.joinids, epoch=0)
        assert np.array_equal(step.block.tokens, expected.tokens)
        assert np.array_equal(step.block.values, expected.values)


def test_the_command_line_copies_and_shows(small_store, options, tmp_path, capsys):
    words = [w for k, v in options.items() for w in ("--tiledb", f"{k}={v}")]
    assert main(["copy", small_store, "s3://cells/cli", *words]) == 0
    files = sum(1 for f in Path(small_store).rglob("*") if f.is_file())
    said = capsys.readouterr().out
    assert f"copied {files} of {files} files" in said
    assert f"s3://cells/cli: {files} files" in said
    assert main(["show", "s3://cells/cli", *words]) == 0
    assert "cells: 240" in capsys.readouterr().out
    assert main(["show", "s3://cells/cli", "--tiledb", "vfs.s3.region"]) == 1
    assert "--tiledb vfs.s3.region: write it KEY=VALUE" in capsys.readouterr().err
    assert main(["copy", "s3://cells/cli", str(tmp_path / "back"), *words]) == 0
    assert main(["show", str(tmp_path / "back")]) == 0
    assert "cells: 240" in capsys.readouterr().out


def test_a_store_that_came_back_can_be_appended_to(remote, options, local, tmp_path):
    back = str(tmp_path / "back")
    report = copy_store(remote, back, tiledb=options)
    assert (report.files_copied, report.source, report.target) == (report.files, remote, back)
    assert same_cells(open_store(back), local)
    more = known_cells(num_cells=12, seed=5)
    more.obs_names = [f"more{i}" for i in range(12)]
    more.write_h5ad(tmp_path / "more.h5ad")
    ingest(IngestConfig(files=[str(tmp_path / "more.h5ad")], uri=back))
    assert open_store(back).num_cells == 252


def test_a_complete_copy_is_left_and_another_store_is_not_overwritten(
    remote, options, small_store, tmp_path
):
    assert copy_store(small_store, remote, tiledb=options).files_copied == 0
    other = tmp_path / "other"
    shutil.copytree(small_store, other)
    (other / "more.txt").write_text("x")
    with pytest.raises(DataError, match=r"at 's3://.*' is a store already; .* append to the local"):
        copy_store(str(other), remote, tiledb=options)
    with pytest.raises(DataError, match=r"is a store already; .* is not appended to"):
        publish_to(remote, other, tiledb=options)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"is something else \(letter.txt, ...\) already"):
        copy_store(remote, str(tmp_path / "used"), tiledb=options)


def test_a_copy_that_broke_off_is_no_store_and_goes_on(s3, options, small_store, local):
    uri = "s3://cells/broken/off"
    s3.faults(every=1, kind="403", method="PUT", match="ms/RNA/X/raw/__fragments")
    with pytest.raises(DataError, match=r"copying .* failed: .*Run it again; what is there is not"):
        copy_store(small_store, uri, tiledb=options)
    s3.faults()
    with pytest.raises(DataError, match="'s3://.*' is an unfinished copy, not a store; run the"):
        open_store(uri, tiledb=options)
    shutil.copytree(small_store, f"{small_store}-2", dirs_exist_ok=True)
    with pytest.raises(DataError, match="is an unfinished copy of '.*store', not of '.*store-2'"):
        copy_store(f"{small_store}-2", uri, tiledb=options)
    report = copy_store(small_store, uri, tiledb=options)
    assert 0 < report.files_copied < report.files
    assert same_cells(open_store(uri, tiledb=options), local)


def test_an_unfinished_local_copy_is_said_to_be_one(small_store, tmp_path):
    target = tmp_path / "t"
    copy_store(small_store, str(target))
    (target / "cellray_copy.json").write_text(f'{{"source": "{small_store}"}}')
    (target / "obs" / "stale").write_text("of a source that has changed since")
    with pytest.raises(DataError, match="is an unfinished copy, not a store; run the same"):
        open_store(str(target))
    copy_store(small_store, str(target))
    assert not (target / "obs" / "stale").exists()
    assert open_store(str(target)).num_cells == 240


def test_a_staged_store_is_published(options, small_store, local):
    report = publish_to("s3://cells/published", Path(small_store), tiledb=options)
    assert report.files == report.files_copied
    assert same_cells(open_store("s3://cells/published", tiledb=options), local)


def test_an_ingest_into_a_bucket_is_built_aside_and_goes_on(options, tmp_path):
    known_cells(num_cells=50).write_h5ad(tmp_path / "cells.h5ad")
    uri = "s3://cells/ingested"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    keys = {"files": [str(tmp_path / "cells.h5ad")], "uri": uri, "scratch": str(scratch)}
    config = IngestConfig(**keys, tiledb=options)
    said = []

    def stop_at_the_copy(line):
        said.append(line)
        if "files" in line and "MB" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(config, progress=stop_at_the_copy)
    assert list(scratch.iterdir()), said  # what was built is kept
    again = []
    report = ingest(config, progress=again.append)
    assert again[0].startswith("the store was built already")
    assert (report.uri, report.num_cells) == (uri, 50)
    assert [(f.dataset_id, f.cells_read, f.cells) for f in report.files] == [("cells", 50, 50)]
    assert open_store(uri, tiledb=options).num_cells == 50
    assert not list(scratch.iterdir())
    with pytest.raises(DataError, match="there is a store at 's3://cells/ingested' already"):
        ingest(config)
    said.clear()
    nowhere = config.model_copy(update={"uri": "s3://nosuchbucket/store"})
    with pytest.raises(DataError, match="'s3://nosuchbucket/store' cannot be written to: .*ucket"):
        ingest(nowhere, progress=said.append)
    assert not said  # before a cell was read
    assert not list(scratch.iterdir())


def test_what_is_not_there_is_said(options, tmp_path):
    with pytest.raises(DataError, match="there is no store at 's3://cells/nothing'; check the uri"):
        open_store("s3://cells/nothing", tiledb=options)
    with pytest.raises(DataError, match="NoSuchBucket.*There is no such bucket; check the uri"):
        open_store("s3://nosuchbucket/store", tiledb=options)
    with pytest.raises(DataError, match="no store at 's3://cells/nothing'"):
        copy_store("s3://cells/nothing", str(tmp_path / "x"), tiledb=options)
    with pytest.raises(DataError, match="'gs://b/s' is neither a local folder nor s3://bucket/"):
        copy_store("gs://b/s", str(tmp_path / "x"))


@pytest.mark.parametrize(
    "faults",
    [
        {"every": 7, "kind": "500"},
        {"every": 9, "kind": "503"},
        {"every": 4, "kind": "drop"},
        {"every": 12, "kind": "hang", "limit": 2},
        {"delay_s": 0.03},
    ],
    ids=lambda f: f.get("kind", "slow"),
)
def test_reads_succeed_through_faults(remote, s3, options, local, faults):
    options["vfs.s3.request_timeout_ms"] = "1000"
    store = open_store(remote, tiledb=options)
    s3.faults(**faults)
    assert same_cells(store, local)
    obs = store.obs(["donor"], value_filter="donor == 'd1'")
    seen = s3.seen()
    assert len(obs) == 60
    assert seen["faults"] > 0 or "delay_s" in faults
    assert seen["requests"] > 10


def test_a_block_that_tiledb_gives_up_is_read_again_and_counted_once(
    remote, s3, options, local, caplog
):
    options["vfs.s3.connect_max_tries"] = "2"
    source, plan = source_and_plan(DataSection(uri=remote, tiledb=options))
    s3.faults(every=1, kind="500", match="X/raw/__fragments", limit=6)
    seen = []
    for first in range(0, plan.batches_per_epoch, 5):
        rows = plan.rows(0, first, first + 5, rank=0, world=1).reshape(-1)
        seen.append(source.tokens(rows, epoch=0).joinids)
    assert_same_cells(seen, local.obs([])["soma_joinid"].to_numpy())
    assert s3.seen()["faults"] == 6
    assert 1 <= sum("try 1 of 4 failed" in r.message for r in caplog.records) <= 3


def test_a_block_that_fails_for_good_names_store_cells_and_what_to_do(remote, s3, options):
    options["vfs.s3.connect_max_tries"] = "1"
    store = open_store(remote, tiledb=options)
    s3.faults(every=1, kind="500", match="X/raw")
    text = (
        r"X/raw of 's3://cells/atlas/small', 3 cells from joinid 7 to 90, could not be read, "
        r"4 tries in .* 500\D.*The server fails or is too slow; run again later, or raise tiledb"
    )
    with pytest.raises(DataError, match=f"(?s){text}"):
        store.read_block(np.array([90, 7, 8]), EVERY_GENE)


def test_of_a_census_in_a_bucket_only_what_is_asked_for_is_read(s3, options, tmp_path):
    counts = census_counts(300, 80)
    root = write_census(tmp_path / "soma", {"homo_sapiens": counts})
    uri, human = "s3://cells/census/soma", "census_data/homo_sapiens"
    copy_store(f"{root}/{human}", f"{uri}/{human}", tiledb=options)
    store = open_store(f"census:{uri}/homo_sapiens", tiledb=options)
    s3.faults()
    frame = store.obs(["cell_type"], value_filter=BLOOD)
    assert frame["soma_joinid"].tolist() == [i for i in range(100) if i % 4 != 3]
    columns = list(store.obs_columns())[1:]  # attributes in the schema's order, a0, a1 ...
    read = {p.rsplit("/", 1)[1] for p in s3.seen()["paths"] if "/obs/__fragments/" in p}
    numbers = {int(n[1:].split("_")[0].split(".")[0]) for n in read if n.startswith("a")}
    assert {columns[n] for n in numbers} == {"cell_type", "is_primary_data", "tissue_general"}
    s3.faults()
    block = store.read_block(np.arange(5), np.arange(80, dtype=np.int32))
    assert block.counts.sum() == counts[:5].sum()
    assert not any("normalized" in p for p in s3.seen()["paths"])
    s3.faults()
    assert store.fingerprint(np.arange(300)) != store.fingerprint(np.arange(299))
    cells = [p for p in s3.seen()["paths"] if "/X/raw/__fragments/" in p]
    assert {p.rsplit("/", 1)[1] for p in cells} <= {"__fragment_metadata.tdb"}  # no counts
