"""A fine-tuned model in MLflow's registry: what is kept with it, and what it takes back."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata as ad
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from scipy import sparse

import cellray
from cellray.cli import main
from cellray.core.errors import ConfigError, DataError
from cellray.data.tokens import tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.infer import annotate
from cellray.infer.annotate import annotate_file
from cellray.infer.load import UNASSIGNED, load
from cellray.infer.predict import as_anndata, register, requirements
from cellray.train.checkpoint import Manifest, model_of, write_checkpoint, write_manifest
from cellray.train.tracking import Tracker
from helpers_cells import known_cells

SIZES = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16, "dropout": 0.0}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """An scGPT classifier of drawn weights over the genes of the known cells."""
    folder = tmp_path_factory.mktemp("model") / "model"
    ids = known_cells().var_names.tolist()
    vocab = Vocab.from_genes(ids, [""] * 60, specials=tokenizer_unit("bins").specials)
    manifest = Manifest(
        family="scgpt",
        model={"family": "scgpt", **SIZES},
        tokenizer={"name": "bins", "max_tokens": 64},
        objective={"name": "classification"},
        vocab_fingerprint=vocab.fingerprint,
        data_fingerprint="d" * 64,
        classes=["type0", "type1", "type2"],
        step=7,
        metrics={"validation/loss": 0.5, "validation/macro_f1": 0.75, "train/loss": 1.0},
        run={"data": {"uri": "some/store"}, "task": {"name": "annotation"}},
        refuse_below=0.3,
    )
    torch.manual_seed(0)
    weights = model_of(manifest, vocab).state_dict()
    write_checkpoint(folder, manifest, vocab=vocab, weights=weights)
    return folder


def test_cells_without_counts_and_cutoffs_that_are_no_probability(model_dir, tmp_path):
    """A cell of which nothing is known gets no label; a cutoff of 1.5 would refuse every cell."""
    model, cells = load(str(model_dir)), known_cells()
    whole = model.annotate(cells, refuse_below=0.0)
    counts = cells.X.toarray()
    counts[3] = 0
    cells.X = sparse.csr_matrix(counts)
    with pytest.warns(UserWarning, match="1 of 240 cells have no counts") as told:
        found = model.annotate(cells, refuse_below=0.0)
    assert {one.filename for one in told} == {__file__}
    assert found.iloc[3].tolist() == ["Unassigned", 0.0]
    pd.testing.assert_frame_equal(found.drop(found.index[3]), whole.drop(whole.index[3]))
    source = tmp_path / "cells.h5ad"
    cells.write_h5ad(source)
    for wrong in (1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=rf"refuse_below = {wrong}: .* give 0 .* to 1"):
            model.annotate(cells, refuse_below=wrong)
        with pytest.raises(ConfigError, match="refuse_below"):
            annotate_file(str(model_dir), source, tmp_path / "out.h5ad", refuse_below=wrong)
    assert not (tmp_path / "out.h5ad").exists()


@pytest.fixture(scope="module")
def registered(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracker = Tracker.start(uri, experiment="finetune", name="fine")
    (folder / "config.toml").write_text('name = "fine"\n')
    found = register(
        tracker,
        model_dir,
        name="types",
        config=folder / "config.toml",
        metrics={"test/accuracy.v1": 0.875},
    )
    return found, uri, tracker


def new_cells() -> ad.AnnData:
    """Genes in another order, five missing, with versions, among genes the model never saw."""
    cells = known_cells()[60:80].copy()
    cells = cells[:, np.random.default_rng(0).permutation(60)[5:]].copy()
    cells.var_names = [f"{name}.7" for name in cells.var_names]
    strange = ad.AnnData(
        np.ones((20, 3), dtype=np.float32),
        obs=cells.obs,
        var=pd.DataFrame(index=[f"ENSG9{i:010d}" for i in range(3)]),
    )
    joined = ad.concat([strange, cells], axis=1, merge="first")
    joined.layers["counts"] = joined.X.copy()
    return joined


def test_what_is_kept_with_a_registered_model(registered, model_dir):
    uri_of_model, uri, tracker = registered
    assert uri_of_model == "models:/types/1"
    client = MlflowClient(tracking_uri=uri)
    version = client.get_model_version("types", "1")
    assert version.run_id == tracker.run_id
    assert version.tags["cellray.family"] == "scgpt"
    assert version.tags["cellray.corpus"] == "some/store"
    assert version.tags["cellray.data_fingerprint"] == "d" * 64
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    values = {m.key: m.value for m in logged.metrics}
    assert values == {
        "validation/loss": 0.5,
        "validation/macro_f1": 0.75,
        "test/accuracy.v1": 0.875,
    }
    assert client.get_run(tracker.run_id).data.metrics["test/accuracy.v1"] == 0.875
    mlflow.set_tracking_uri(uri)
    info = mlflow.models.get_model_info("models:/types/1")
    assert [c.name for c in info.signature.outputs.inputs] == ["label", "probability"]
    asked = {p.name: p.default for p in info.signature.params.params}
    assert asked == {"refuse_below": 0.3, "layer": ""}
    local = Path(mlflow.artifacts.download_artifacts("models:/types/1"))
    names = {p.name for p in local.rglob("*") if p.is_file()}
    assert {"vocab.json.gz", "config.toml", "manifest.json", "weights.safetensors"} <= names
    needs = (local / "requirements.txt").read_text().split()
    assert needs == requirements()
    assert f"cellray=={cellray.__version__}" in needs
    assert f"torch=={torch.__version__.partition('+')[0]}" in needs
    assert yaml.safe_load((local / "MLmodel").read_text())["signature"]["inputs"] is None


def test_it_annotates_in_a_fresh_process_whatever_cells_come_as(registered, model_dir, tmp_path):
    _, uri, _ = registered
    new_cells().write_h5ad(tmp_path / "new.h5ad")
    code = (
        "import sys, mlflow, anndata\n"
        "mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model('models:/types/1')\n"
        "cells = anndata.read_h5ad(sys.argv[2])\n"
        "ways = {'file': sys.argv[2], 'anndata': cells, 'table': cells.to_df()}\n"
        "for name, given in ways.items():\n"
        "    model.predict(given).to_csv(f'{sys.argv[3]}/{name}.csv')\n"
        "asked = {'refuse_below': 0.99, 'layer': 'counts'}\n"
        "model.predict(cells, params=asked).to_csv(f'{sys.argv[3]}/asked.csv')\n"
        "try: model.predict([1, 2])\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    words = [sys.executable, "-W", "ignore", "-c", code, uri, tmp_path / "new.h5ad", tmp_path]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "DataError cells are given as list; give AnnData, the path of an h5ad" in done.stdout
    here = load(str(model_dir)).annotate(new_cells())
    for name in ("file", "anndata", "table"):
        found = pd.read_csv(tmp_path / f"{name}.csv", index_col=0)
        assert found.columns.tolist() == ["label", "probability"]
        assert found.index.tolist() == new_cells().obs_names.tolist()
        assert found["label"].tolist() == here["label"].tolist()
        np.testing.assert_allclose(found["probability"], here["probability"], rtol=1e-5)
    asked = pd.read_csv(tmp_path / "asked.csv", index_col=0)
    assert set(asked["label"]) == {UNASSIGNED}
    np.testing.assert_allclose(asked["probability"], here["probability"], rtol=1e-5)


def test_gene_order_missing_versions_and_strange_genes_change_nothing(model_dir):
    model = load(str(model_dir))
    cells = new_cells()
    known = cells[:, [n.startswith("ENSG0") for n in cells.var_names]].copy()
    known.var_names = [n.partition(".")[0] for n in known.var_names]
    want = model.annotate(known[:, sorted(known.var_names)].copy())
    found = model.annotate(cells)
    assert found["label"].tolist() == want["label"].tolist()
    np.testing.assert_allclose(found["probability"], want["probability"], rtol=1e-4)


def test_the_registry_uri_loads_as_a_model_of_its_own(registered, model_dir):
    mlflow.set_tracking_uri(registered[1])
    model = cellray.load("models:/types/1")
    here = cellray.load(str(model_dir))
    assert model.manifest == here.manifest
    assert model.cutoff == 0.3
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, here.model.state_dict()[name]), name


def test_the_same_model_is_registered_once_and_another_anew(registered, model_dir):
    _, uri, tracker = registered
    assert register(tracker, model_dir, name="types") == "models:/types/1"
    client = MlflowClient(tracking_uri=uri)
    assert len(client.search_model_versions("name='types'")) == 1
    manifest = load(str(model_dir)).manifest
    try:
        write_manifest(model_dir, replace(manifest, refuse_below=0.5))
        assert register(tracker, model_dir, name="types") == "models:/types/2"
    finally:
        write_manifest(model_dir, manifest)
    assert register(tracker, model_dir, name="types") == "models:/types/1"
    assert register(tracker, model_dir, name="").startswith("models:/m-")


def test_what_is_no_cells_is_refused(tmp_path):
    with pytest.raises(DataError, match="no h5ad file at 'nowhere.h5ad'"):
        as_anndata("nowhere.h5ad")
    (tmp_path / "text.h5ad").write_text("no hdf5")
    with pytest.raises(DataError, match=r"text.h5ad' cannot be read as h5ad"):
        as_anndata(tmp_path / "text.h5ad")
    table = pd.DataFrame({"ENSG1": [1.0], "cell_type": ["beta"]})
    with pytest.raises(DataError, match="1 columns of the DataFrame hold no numbers: cell_type"):
        as_anndata(table)
    with pytest.raises(DataError, match="cells are given as ndarray; give AnnData"):
        as_anndata(np.ones((2, 2)))


def test_a_file_is_annotated_by_the_command(registered, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(annotate, "_BLOCK_CELLS", 8)  # three blocks
    cells = new_cells()
    cells.obsm["X_before"] = np.arange(20.0)[:, None]
    cells.write_h5ad(tmp_path / "in.h5ad")
    mlflow.set_tracking_uri(registered[1])
    words = ["annotate", "models:/types/1", str(tmp_path / "in.h5ad"), str(tmp_path / "out.h5ad")]
    assert main([*words, "--layer", "counts", "--refuse-below", "0.34"]) == 0
    told = capsys.readouterr().out
    assert "20/20 cells" in told
    assert "cells/s (obs 'cellray_label')" in told
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    want = load(str(model_dir)).annotate(cells, refuse_below=0.34)
    assert found.obs[annotate.LABEL].astype(str).tolist() == want["label"].tolist()
    np.testing.assert_allclose(found.obs[annotate.CONFIDENCE], want["probability"], rtol=1e-5)
    assert found.uns["cellray_annotation"]["refuse_below"] == 0.34
    before = ad.read_h5ad(tmp_path / "in.h5ad")
    assert found.var_names.tolist() == before.var_names.tolist()
    assert found.obs["cell_type"].tolist() == before.obs["cell_type"].tolist()
    np.testing.assert_array_equal(found.obsm["X_before"], before.obsm["X_before"])
    assert (found.layers["counts"] != before.layers["counts"]).sum() == 0
    assert main(words) == 1
    assert "out.h5ad' exists; give a file that does not" in capsys.readouterr().err


def test_a_file_that_cannot_be_annotated_leaves_nothing(model_dir, tmp_path):
    def run(source, target="out.h5ad"):
        return annotate.annotate_file(str(model_dir), tmp_path / source, tmp_path / target)

    with pytest.raises(DataError, match="no h5ad file at '.*none.h5ad'"):
        run("none.h5ad")
    (tmp_path / "text.h5ad").write_text("no hdf5")
    with pytest.raises(DataError, match="text.h5ad' cannot be read as h5ad"):
        run("text.h5ad")
    known_cells()[:0].copy().write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(DataError, match="empty.h5ad' holds no cells"):
        run("empty.h5ad")
    cells = known_cells()[:4].copy()
    cells.X = cells.X * 0.5
    cells.write_h5ad(tmp_path / "logged.h5ad")
    with pytest.raises(DataError, match="the model needs raw counts, but the matrix holds"):
        run("logged.h5ad")
    with pytest.raises(ConfigError, match=r"no folder '.*there' for 'out.h5ad'; make it first"):
        run("logged.h5ad", "there/out.h5ad")
    assert not list(tmp_path.glob("out*"))
