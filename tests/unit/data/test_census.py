import http.server
import json
import shutil
import threading

import numpy as np
import pytest
import tiledbsoma
from cells_by_hand import dense

from cellray.core.errors import ConfigError, DataError
from cellray.data.census import locate_census
from cellray.data.config import DataSection
from cellray.data.copying import copy_store
from cellray.data.locate import address
from cellray.data.soma import open_store
from helpers_census import census_counts, write_census, write_organism
from helpers_source import source_and_plan

HUMAN, MOUSE = census_counts(300, 80), census_counts(40, 50, seed=1)
BLOOD = "is_primary_data == True and tissue_general == 'blood'"
PUBLIC = {"vfs.s3.no_sign_request": "true", "vfs.s3.region": "us-west-2"}


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    root = tmp_path_factory.mktemp("census") / "soma"
    return write_census(root, {"homo_sapiens": HUMAN, "mus_musculus": MOUSE})


def test_a_dated_release_needs_no_look_up():
    uri, options = locate_census("census:2025-01-30/homo_sapiens", releases="http://127.0.0.1:9/")
    assert uri == (
        "s3://cellxgene-census-public-us-west-2/cell-census/2025-01-30/soma/census_data/"
        "homo_sapiens"
    )
    assert options == PUBLIC


def test_settings_of_the_user_have_the_last_word():
    own = {"vfs.s3.region": "eu-west-1"}
    assert dict(address("census:2025-01-30/mus_musculus", own)[1]) == {**PUBLIC, **own}


@pytest.fixture
def directory():
    """A directory of releases as the Census publishes it, on a server of this machine."""
    soma = {"uri": "s3://bucket/cell-census/2025-01-30/soma/", "s3_region": "us-east-2"}
    known = {"stable": "2025-01-30", "2025-01-30": {"soma": soma}, "2024-07-01": {"soma": soma}}

    class Releases(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(known).encode() if "broken" not in self.path else b"<html>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Releases) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/release.json"
        server.shutdown()


def test_a_named_release_is_looked_up(directory):
    found = locate_census("census:stable/homo_sapiens", releases=directory)
    assert found == (
        "s3://bucket/cell-census/2025-01-30/soma/census_data/homo_sapiens",
        {**PUBLIC, "vfs.s3.region": "us-east-2"},
    )
    with pytest.raises(DataError, match=r"no release 'stabel'. Did you mean 'stable'\? It has: st"):
        locate_census("census:stabel/homo_sapiens", releases=directory)
    with pytest.raises(DataError, match="'stable' is could not be looked up at .*by its date, e.g"):
        locate_census("census:stable/homo_sapiens", releases=directory + "?broken")
    with pytest.raises(DataError, match=r"could not be looked up .*refused.*by its date, e.g"):
        locate_census("census:latest/homo_sapiens", releases="http://127.0.0.1:9/release.json")


@pytest.mark.parametrize("uri", ["census:homo_sapiens", "census:stable/Human", "census:"])
def test_other_forms_are_refused(uri):
    with pytest.raises(ConfigError, match="is not of the form census:VERSION/ORGANISM, e.g. cen"):
        open_store(uri)


def test_a_release_is_read_from_its_root(census):
    store = open_store(f"census:{census}/mus_musculus")
    assert store.uri == f"{census}/census_data/mus_musculus"
    assert (store.num_cells, store.shape) == (40, MOUSE.shape)
    every = np.arange(50, dtype=np.int32)
    assert (dense(store.read_block(np.arange(40), every), 50) == MOUSE).all()


def test_the_root_itself_names_its_organisms(census):
    for uri in (census, f"{census}/"):
        with pytest.raises(DataError, match="is a release of the Census; .*: census:.*/homo_sap"):
            open_store(uri)
    with pytest.raises(DataError, match=r"no layer 'rwa'. Did you mean 'raw'\? It has: normalized"):
        open_store(f"census:{census}/homo_sapiens", layer="rwa")


def test_blood_goes_from_the_census_to_tokens(census):
    data = DataSection(uri=f"census:{census}/homo_sapiens", obs_filter=BLOOD)
    source, plan = source_and_plan(data)
    expected = [i for i in range(100) if i % 4 != 3]  # the first data set of three is of blood
    assert source.joinids.tolist() == expected
    assert (plan.batches_per_epoch, plan.remainder_cells) == (6, 3)
    order = plan.rows(0, 0, 6, rank=0, world=1).reshape(-1)
    block = source.tokens(order, epoch=0)
    wanted = [np.flatnonzero(HUMAN[i]) + len(source.vocab.specials) for i in order]
    for row, genes in enumerate(wanted):
        tokens = block.tokens[block.indptr[row] : block.indptr[row + 1]]
        kept = set(tokens.tolist()) - set(range(len(source.vocab.specials)))
        assert kept <= set(genes.tolist())
        assert len(kept) >= min(len(genes), 29)


def test_obs_has_the_columns_of_the_census(census):
    store = open_store(f"census:{census}/homo_sapiens")
    frame = store.obs(["cell_type", "nnz", "raw_sum"], value_filter=BLOOD)
    rows = frame["soma_joinid"].to_numpy()
    assert (frame["nnz"] == (HUMAN[rows] > 0).sum(axis=1)).all()
    assert frame["cell_type"].tolist()[:3] == ["B cell", "T cell", "monocyte"]
    assert store.describe()["obs_columns"]["tissue_general"] == {"type": "string", "distinct": 3}


def test_joinids_may_have_gaps(tmp_path):
    joinids = np.sort(np.random.default_rng(4).choice(5000, 300, replace=False))
    uri = str(tmp_path / "gaps")
    with tiledbsoma.Experiment.create(uri) as experiment:
        write_organism(experiment, HUMAN, joinids=joinids)
    store = open_store(uri)
    assert (store.num_cells, store.shape) == (300, (int(joinids[-1]) + 1, 80))
    source, plan = source_and_plan(DataSection(uri=uri))
    assert source.joinids.tolist() == joinids.tolist()
    order = plan.rows(0, 0, plan.batches_per_epoch, rank=0, world=1).reshape(-1)
    assert sorted(order.tolist()) == joinids.tolist()
    every = np.arange(80, dtype=np.int32)
    block = store.read_block(order, every, obs=["observation_joinid"])
    assert (dense(block, 80) == HUMAN[np.searchsorted(joinids, order)]).all()
    assert block.obs["observation_joinid"].tolist() == [f"obs{j:08d}" for j in order]
    absent = int(np.setdiff1d(np.arange(joinids[-1]), joinids)[0])
    with pytest.raises(DataError, match=f"joinid {absent} is not in obs of"):
        store.read_block(np.array([joinids[0], absent]), every, obs=["nnz"])


def test_an_x_that_is_larger_than_var_is_read(tmp_path, census):
    uri = str(tmp_path / "wide")
    shutil.copytree(f"{census}/census_data/mus_musculus", uri)
    with tiledbsoma.open(f"{uri}/ms/RNA/X/raw", "w") as x:
        x.resize((1000, 60_000))
    store = open_store(uri)
    assert (store.num_cells, store.num_genes) == (40, 50)
    every = np.arange(50, dtype=np.int32)
    assert (dense(store.read_block(np.arange(40), every), 50) == MOUSE).all()


def test_an_organism_can_be_copied(census, tmp_path):
    report = copy_store(f"census:{census}/mus_musculus", str(tmp_path / "mouse"))
    assert report.files == report.files_copied > 0
    every = np.arange(50, dtype=np.int32)
    block = open_store(str(tmp_path / "mouse")).read_block(np.arange(40), every)
    assert np.array_equal(dense(block, 50), MOUSE)
    with pytest.raises(DataError, match="no store at .*census_data/homo_sapien'"):
        copy_store(f"census:{census}/homo_sapien", str(tmp_path / "other"))
