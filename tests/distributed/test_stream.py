"""The Ray Data stream over a real SOMA store: order, exactly-once delivery, filters, resume."""

import numpy as np
import pytest

from cellray.data.config import DataSection
from cellray.data.pipeline import settle_helpers, token_stream
from cellray.data.plan import EpochPlan, default_lanes
from cellray.data.tokens import TokenSource
from cellray.data.vocab import Vocab
from cellray.testing import assert_same_cells
from cellray.train.prepare import encode, gene_map, select_cells

pytestmark = pytest.mark.ray


def stream_of(uri, *, obs_filter="", cells_global=12, window_batches=3):
    cells = select_cells(DataSection(uri=uri, obs_filter=obs_filter), ["cell_type"])
    var = cells.store.var()
    vocab = Vocab.from_genes(
        var["feature_id"].tolist(),
        var["feature_name"].tolist(),
        specials=("<pad>", "<cls>", "<eoc>", "<mask>"),
    )
    codes, _ = encode(cells.obs, ["cell_type"])
    source = TokenSource(
        store=cells.store,
        gene_map=gene_map(cells.store, vocab),
        vocab=vocab,
        tokenizer={"name": "bins", "max_tokens": 30},
        joinids=cells.joinids,
        codes=codes,
        seed=3,
    )
    plan = EpochPlan(
        joinids=cells.joinids,
        lengths=cells.lengths(30),
        seed=3,
        cells_global=cells_global,
        lanes=default_lanes(cells_global),
        window_batches=window_batches,
    )
    return source, plan


@pytest.mark.parametrize("obs_filter", ["", "donor in ['d1', 'd2']"])
def test_two_ranks_deliver_every_selected_cell_exactly_once(small_store, ray_cluster, obs_filter):
    source, plan = stream_of(small_store, obs_filter=obs_filter)
    selected = source.joinids
    assert len(selected) == (240 if not obs_filter else 120)
    delivered = [
        np.concatenate(
            [
                step.block.joinids
                for step in token_stream(
                    source, plan, first_step=0, last_step=plan.batches_per_epoch, rank=r, world=2
                )
            ]
        )
        for r in range(2)
    ]
    assert plan.remainder_cells == 0
    assert_same_cells(delivered, selected)


def test_the_stream_carries_tokens_and_codes_of_the_very_cell(small_store, ray_cluster):
    source, plan = stream_of(small_store)
    for step in token_stream(source, plan, first_step=0, last_step=3, actors=2):
        alone = source.tokens(step.block.joinids[::-1].copy(), epoch=step.epoch)
        for i in range(len(step.block)):
            j = len(step.block) - 1 - i
            mine = slice(step.block.indptr[i], step.block.indptr[i + 1])
            other = slice(alone.indptr[j], alone.indptr[j + 1])
            assert np.array_equal(step.block.tokens[mine], alone.tokens[other])
            assert np.array_equal(step.block.values[mine], alone.values[other])
        # known_cells: the type of cell i is i % 3, joinids are file order
        assert step.covariates["cell_type"].tolist() == (step.block.joinids % 3).tolist()


def test_a_stream_resumed_in_mid_epoch_continues_the_same_order(small_store, ray_cluster):
    source, plan = stream_of(small_store)
    last = plan.batches_per_epoch + 5  # into the second epoch
    whole = [
        (s.step, s.epoch, s.block.joinids.tolist())
        for s in token_stream(source, plan, first_step=0, last_step=last, rank=1, world=2)
    ]
    resumed = [
        (s.step, s.epoch, s.block.joinids.tolist())
        for s in token_stream(source, plan, first_step=7, last_step=last, rank=1, world=2)
    ]
    assert resumed == whole[7:]
    assert [s[0] for s in whole] == list(range(last))
    assert {s[1] for s in whole} == {0, 1}


def test_ray_datas_cluster_wide_actors_are_made_beside_the_driver(ray_cluster):
    """Pinned where they are asked for first: on a worker's node they would be lost with it."""
    import ray

    assert len(settle_helpers()) == 4  # a function that Ray renames would be passed over
    known = {a["name"] for a in ray.util.list_named_actors(all_namespaces=True)}
    assert {"ActorLocationTracker", "AutoscalingCoordinator"} <= known
