"""Training runs over the whole data path: caches, mixtures, appends in between, kept medians."""

import json

import pytest

from cellray.core.errors import DataError
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.soma import open_store
from cellray.runs import run_job
from cellray.train.pretrain import prepare_pretrain
from helpers_cells import known_cells
from helpers_runs import pretrain_run

pytestmark = pytest.mark.ray

SHORT = {
    "engine": {"name": "torch", "zero_stage": 0},
    "scale": {"workers": 1},
    "train": {"steps": 30, "log_every_steps": 10, "eval_every_steps": 0},
    "checkpoint": {"every_steps": 10},
}


def short(uri, folder, *, steps=30, data=None, **over):
    raw = {**SHORT, "train": {**SHORT["train"], "steps": steps}, **over}
    return pretrain_run(
        uri, folder, data={"split": {"validation_fraction": 0.1}, **(data or {})}, **raw
    )


def make_store(folder, name, **keys):
    cells = known_cells(**keys)
    cells.obs_names = [f"{name}-{i}" for i in range(cells.n_obs)]
    cells.write_h5ad(folder / f"{name}.h5ad")
    ingest(IngestConfig(files=[str(folder / f"{name}.h5ad")], uri=str(folder / name)))
    return str(folder / name)


def losses(folder, name="pre"):
    rows = [json.loads(x) for x in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.slow
def test_a_cached_run_pays_for_tokens_once_and_a_stale_cache_is_refused(
    small_store, ray_cluster, tmp_path
):
    said = []
    cache = {"cache": str(tmp_path / "tokens")}
    run_job(short(small_store, tmp_path / "one", data=cache), said.append)
    assert any("token cache: 240 of 240 cells" in line for line in said)
    again = []
    run_job(short(small_store, tmp_path / "two", data=cache), again.append)
    assert any("token cache: 240 cells are there" in line for line in again)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    other = short(small_store, tmp_path / "three", data=cache, tokenizer={"max_tokens": 20})
    with pytest.raises(DataError, match="is stale: it was written for another tokenizer"):
        run_job(other, said.append)


@pytest.mark.slow
def test_a_weighted_mixture_with_balance_trains(small_store, ray_cluster, tmp_path):
    uri = make_store(tmp_path, "other", num_cells=90, num_genes=50, seed=4)
    data = {"weights": [2.0, 1.0], "balance_by": "cell_type"}
    result = run_job(short([small_store, uri], tmp_path / "run", data=data), print)
    assert result.step == 30
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]


@pytest.mark.slow
def test_a_run_that_goes_on_sees_the_store_as_it_was_when_it_began(ray_cluster, tmp_path):
    uri = make_store(tmp_path, "cells", num_cells=120)
    run = short(uri, tmp_path / "run")
    run_job(run, print)
    before = losses(tmp_path / "run")
    (tmp_path / "run" / "pre" / "result.json").unlink()  # as if it had been killed at its end
    more = known_cells(num_cells=60, seed=8)
    more.obs_names = [f"more-{i}" for i in range(60)]
    more.write_h5ad(tmp_path / "more.h5ad")
    ingest(IngestConfig(files=[str(tmp_path / "more.h5ad")], uri=uri))
    said = []
    assert run_job(run, said.append).resumed_from_step == 30
    assert losses(tmp_path / "run") == before
    anew = prepare_pretrain(short(uri, tmp_path / "anew"))
    assert len(anew.data.source.joinids) == 180  # a new run sees what was added


def test_a_rank_model_takes_the_medians_ingest_has_kept(small_store, tmp_path):
    family = {"family": "geneformer", "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16}
    run = short(small_store, tmp_path, data={"statistics": "store"}, model=family)
    vocab = prepare_pretrain(run).data.source.vocab
    assert vocab.medians.tolist() == open_store(small_store).nonzero_medians().tolist()
