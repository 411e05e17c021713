"""The stream when things go wrong or grow: killed actors, other worlds, mixtures, caches."""

import os
import signal
from dataclasses import replace

import numpy as np
import psutil
import pytest
import ray

from cellray.core.ids import stores_of, without_repeats
from cellray.data.config import DataSection
from cellray.data.pipeline import token_stream, write_cache
from cellray.data.tokens import TokenSource
from cellray.data.vocab import Vocab
from cellray.testing import assert_same_cells
from cellray.train.config import BatchSection
from cellray.train.prepare import gene_map, make_plan, select_cells

pytestmark = pytest.mark.ray

SPECIALS = ("<pad>", "<cls>", "<eoc>", "<eos>", "<mask>")


def stream_of(uri, *, seed=3, window_cells=48, run_cells=4, **data):
    section = DataSection(uri=uri, window_cells=window_cells, run_cells=run_cells, **data)
    cells = select_cells(section)
    var = cells.store.var()
    vocab = Vocab.from_genes(list(var["feature_id"]), list(var["feature_name"]), specials=SPECIALS)
    source = TokenSource(
        store=cells.store,
        gene_map=gene_map(cells.store, vocab),
        vocab=vocab,
        tokenizer={"name": "bins", "max_tokens": 30},
        joinids=cells.joinids,
        seed=seed,
    )
    plan = make_plan(
        cells,
        section,
        train=cells.joinids,
        lengths=cells.lengths(30),
        batch=BatchSection(cells_global=12, cells_micro=3),
        seed=seed,
    )
    return source, plan


def ids_of(steps):
    return [s.block.joinids.tolist() for s in steps]


def test_a_killed_actor_loses_no_cell_and_repeats_none(small_store, ray_cluster):
    source, plan = stream_of(small_store)
    last = 4 * plan.batches_per_epoch
    whole = [plan.rows(s // 20, s % 20, s % 20 + 1)[0].tolist() for s in range(last)]
    delivered, killed = [], 0
    for step in token_stream(source, plan, first_step=0, last_step=last, actors=2):
        delivered.append(step.block.joinids.tolist())
        if step.step in (3, 30):
            for process in psutil.process_iter(["cmdline"]):
                if "MapWorker" in " ".join(process.info["cmdline"] or []):
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
                    break
    assert killed == 2
    assert delivered == whole


@pytest.mark.parametrize("stop", [7, pytest.param(20, marks=pytest.mark.slow)])
def test_another_world_goes_on_where_the_first_stopped(small_store, ray_cluster, stop):
    source, plan = stream_of(small_store)
    ends = [(2, 0, stop), (3, stop, 2 * plan.batches_per_epoch)]
    parts = [
        [
            ids_of(token_stream(source, plan, first_step=a, last_step=b, rank=r, world=world))
            for r in range(world)
        ]
        for world, a, b in ends
    ]
    steps = [
        [i for rank in step for i in rank] for ranks in parts for step in zip(*ranks, strict=True)
    ]
    for epoch in range(2):
        rows = plan.rows(epoch, 0, 20)
        assert steps[20 * epoch : 20 * epoch + 20] == rows.tolist()
        assert_same_cells([np.array(steps[20 * epoch : 20 * epoch + 20])], source.joinids)


def test_a_mixture_of_stores_reaches_the_stream(small_store, tmp_path, ray_cluster):
    from cellray.data.ingest import IngestConfig, ingest
    from helpers_cells import known_cells

    other = known_cells(num_cells=60, num_genes=45, seed=5)
    other.obs_names = [f"other{i}" for i in range(60)]
    other.write_h5ad(tmp_path / "other.h5ad")
    uri = str(tmp_path / "other")
    ingest(IngestConfig(files=[str(tmp_path / "other.h5ad")], uri=uri))
    source, plan = stream_of([small_store, uri], weights=[2, 1])
    steps = list(token_stream(source, plan, first_step=0, last_step=plan.batches_per_epoch))
    for step in steps:
        assert np.bincount(stores_of(step.block.joinids)).tolist() == [8, 4]
    seen = np.unique(without_repeats(np.concatenate([s.block.joinids for s in steps])))
    assert len(seen) == 300
    alone, _ = stream_of(uri)
    mine = stores_of(steps[0].block.joinids) == 1
    joinids = steps[0].block.joinids[mine]
    expected = alone.cells(joinids & 0xFFFF)
    found = source.cells(joinids)
    assert np.array_equal(found.counts, expected.counts)
    assert found.genes.tolist() == expected.genes.tolist()  # the 45 genes are the first of both


def test_balanced_copies_have_draws_of_their_own(small_store, ray_cluster):
    source, plan = stream_of(
        small_store,
        obs_filter="cell_type != 'type0' or donor == 'd0'",
        balance_by="cell_type",
    )
    steps = list(token_stream(source, plan, first_step=0, last_step=plan.batches_per_epoch))
    ids = np.concatenate([s.block.joinids for s in steps])
    kinds = without_repeats(ids) % 3
    counts = np.bincount(kinds)
    assert counts.max() - counts.min() <= plan.remainder_cells + 1
    assert len(np.unique(ids)) == len(ids) > len(np.unique(without_repeats(ids)))


def test_the_cache_is_written_by_tasks_and_gives_the_same_stream(
    small_store, tmp_path, ray_cluster
):
    source, plan = stream_of(small_store)
    said = []
    folder = str(tmp_path / "cache")
    keys = {"cells": source.joinids, "fingerprint": "f", "folder": folder}
    cached = write_cache(source, **keys, say=said.append)
    assert "240 of 240 cells" in said[-1]
    one = list(token_stream(replace(source, seed=0), plan, first_step=5, last_step=25))
    two = list(token_stream(cached, plan, first_step=5, last_step=25))
    for a, b in zip(one, two, strict=True):
        assert (a.step, a.epoch) == (b.step, b.epoch)
        assert np.array_equal(a.block.joinids, b.block.joinids)
    first = [(a, b) for a, b in zip(one, two, strict=True) if a.epoch == 0]
    assert len(first) == 15
    for a, b in first:  # epoch 0 draws what the cache has drawn
        assert np.array_equal(a.block.tokens, b.block.tokens)
        assert np.array_equal(a.block.values, b.block.values)
    again = []
    write_cache(source, **keys, say=again.append)
    assert again == [f"token cache: 240 cells are there in '{folder}'"]


@pytest.mark.slow
def test_the_stream_waits_for_a_slow_consumer(small_store, ray_cluster):
    """Actors hold two windows each and no more, whatever the object store would take."""
    source, plan = stream_of(small_store)
    stream = token_stream(source, plan, first_step=0, last_step=40 * plan.batches_per_epoch)
    for _ in range(3):
        next(stream)
    from cellray.data import pipeline

    limit = pipeline._ahead_bytes(source, plan, 1, 1)
    assert limit == pipeline._LEAST_AHEAD_BYTES
    stream.close()
    big = replace(source, tokenizer={"name": "bins", "max_tokens": 30})
    window = plan.window_batches * 12 * plan.mean_length * 3
    assert pipeline._ahead_bytes(big, plan, 1, 10**6) == pytest.approx(2e6 * window, rel=1e-5)
    assert ray.is_initialized()
