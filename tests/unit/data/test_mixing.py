"""Shuffle quality as numbers: what a batch holds beside a uniform draw."""

import numpy as np
import pytest

from cellray.data.mixing import measure_mixing
from cellray.data.plan import EpochPlan, window_batches

CELLS = 40_000


def mix(run_cells, window_cells, *, cells_global=64, lanes=64, cells=CELLS):
    size = window_batches(cells_global, lanes=lanes, run_cells=run_cells, window_cells=window_cells)
    plan = EpochPlan(
        np.arange(cells), None, 0, cells_global, lanes, run_cells=run_cells, window_batches=size
    )
    files = np.arange(cells) * 24 // cells  # 24 files, one after another
    return measure_mixing(plan, {"dataset_id": files})


def test_the_default_is_as_good_as_a_uniform_draw():
    found = mix(64, 16_384)
    assert found.uniform["dataset_id"] == pytest.approx(24 * (1 - (23 / 24) ** 64), rel=2e-3)
    assert found.distinct["dataset_id"] == pytest.approx(found.uniform["dataset_id"], rel=0.03)
    assert 0.7 < found.dispersion < 1.3
    assert found.neighbours < 0.02  # below 0: lanes spread a batch more evenly than chance


def test_reading_the_store_in_order_is_seen_as_what_it_is():
    found = mix(4096, 4096, lanes=1)
    assert found.distinct["dataset_id"] < 4
    assert found.dispersion > 20


def test_the_one_key_trades_quality():
    """A larger window mixes the runs of one batch better."""
    near = [
        mix(64, window, cells_global=2048, cells=600_000).neighbours
        for window in (4096, 16_384, 65_536)
    ]
    assert near[0] > near[1] > near[2]


def test_it_is_told_in_words():
    lines = mix(64, 16_384).lines()
    assert lines[0].startswith("a batch holds 22.")
    assert "distinct dataset_id (uniform draw: 22." in lines[0]
    assert "dispersion" in lines[1]
