"""Keyed draws: order-free, uniform, independent between streams."""

import numpy as np
from scipy import stats

from cellray.core.draw import Draw, splitmix64


def test_splitmix64_gives_the_published_sequence():
    # First outputs of SplitMix64 seeded with 1234567 (the generator's reference test vector).
    state, out = np.uint64(1234567), []
    for _ in range(3):
        out.append(int(splitmix64(np.array([state], dtype=np.uint64))[0]))
        with np.errstate(over="ignore"):
            state = state + np.uint64(0x9E3779B97F4A7C15)
    assert out == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_draw_depends_on_its_key_and_not_on_its_company():
    draw = Draw(seed=3, epoch=1)
    cells, positions = np.arange(50)[:, None], np.arange(20)[None, :]
    whole = draw.uniform("mask", cells, positions)
    assert whole.shape == (50, 20)
    order = np.random.default_rng(0).permutation(50)
    assert np.array_equal(draw.uniform("mask", cells[order], positions), whole[order])
    assert draw.uniform("mask", 7, 11) == whole[7, 11]


def test_seed_epoch_and_stream_each_change_the_draw():
    cells = np.arange(1000)
    draws = [
        Draw(0, 0).uniform("a", cells),
        Draw(1, 0).uniform("a", cells),
        Draw(0, 1).uniform("a", cells),
        Draw(0, 0).uniform("b", cells),
    ]
    correlations = np.corrcoef(draws) - np.eye(4)
    assert np.abs(correlations).max() < 0.12  # 3.8 standard errors at n = 1000


def test_draws_are_uniform_over_cells_and_positions():
    draw = Draw(5)
    for values in (draw.uniform("x", np.arange(20_000)), draw.uniform("x", 3, np.arange(20_000))):
        assert values.min() >= 0
        assert values.max() < 1
        assert stats.kstest(values, "uniform").pvalue > 1e-3
