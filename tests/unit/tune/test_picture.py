"""The picture of a sweep: where its lines pass, what its axes say, and that it is drawn."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from cellray.core.errors import DataError
from cellray.tune.picture import _apart, _choice, _line, _scales, draw_sweep

LOSS = "validation/loss"


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"trial": range(8), "optim.lr": 10 ** rng.uniform(-5, -2, 8)})
    frame["model.activation"] = ["relu", "gelu"] * 4
    frame["train.compile"] = [True, False, False, False] * 2
    frame[LOSS] = rng.uniform(0.5, 1.0, 8)
    frame["state"] = ["finished", "stopped early", "failed", "not finished"] * 2
    frame.loc[[2, 6], LOSS] = np.nan
    return frame


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    scale = _line("lr", np.array([1e-5, 1e-4, 1e-3]), log=True)
    np.testing.assert_allclose(np.diff(scale.heights), 5 / 11)
    assert set(scale.ticks.values()) >= {"1e-5", "1e-4", "1e-3"}
    height = {label: place for place, label in scale.ticks.items()}
    assert height["1e-4"] == pytest.approx(scale.heights[1])


def test_a_linear_axis_has_round_ticks_in_their_places():
    scale = _line("d", np.array([0.1, 0.5, np.nan]), log=False)
    place = {float(label): height for height, label in scale.ticks.items()}
    assert place[0.2] == pytest.approx((0.2 - 0.1) / 0.4 / 1.1 + 0.5 / 11)
    assert np.isnan(scale.heights[2])
    one = _line("d", np.array([2.0, 2.0]), log=False)  # all alike: in the middle
    np.testing.assert_allclose(one.heights, 0.5)


def test_choices_are_named_and_lines_that_meet_drawn_apart():
    scale = _choice("b", [32, 16, 32, 128])
    assert [scale.ticks[h] for h in sorted(scale.ticks)] == ["16", "32", "128"]
    assert scale.heights[0] == scale.heights[2] == 0.5
    apart = _apart(scale)
    assert apart[0] < 0.5 < apart[2]
    assert apart[0] + apart[2] == pytest.approx(1.0)
    named = _choice("c", [True, False, "a" * 40])
    assert list(named.ticks.values())[:2] == ["true", "false"]
    assert len(list(named.ticks.values())[2]) == 18


def test_which_axes_there_are(table):
    keys = ["optim.lr", "model.activation", "train.compile"]
    scales = _scales(table, keys, ["optim.lr"], LOSS)
    assert [s.name for s in scales] == [*keys, LOSS]
    assert [s.log for s in scales] == [True, False, False, False]
    assert [s.choice for s in scales] == [False, True, True, False]
    wide = table.assign(**{LOSS: np.geomspace(0.01, 10, 8)})
    assert _scales(wide, keys, [], LOSS)[-1].log  # a metric over three decades


@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_is_drawn(table, tmp_path, mode):
    order = table[LOSS]
    best = int(table.loc[order.idxmin() if mode == "min" else order.idxmax(), "trial"])
    keys = ["optim.lr", "model.activation", "train.compile"]
    path = draw_sweep(
        table, keys=keys, log=["optim.lr"], metric=LOSS, mode=mode, best=best,
        path=tmp_path / "sweep.png", title="s",
    )  # fmt: skip
    image = imread(path)
    assert image.shape[1] > 1000
    orange = np.abs(image[..., :3] - np.array([0xD5, 0x5E, 0x00]) / 255).max(axis=2) < 0.02
    red = np.abs(image[..., :3] - np.array([0xB0, 0x00, 0x20]) / 255).max(axis=2) < 0.02
    assert orange.sum() > 2000  # the best trial
    assert red.sum() > 50  # the crosses of the failed


def test_nothing_to_draw(table, tmp_path):
    empty = table.assign(**{LOSS: np.nan})
    with pytest.raises(DataError, match="no trial has a value of validation/loss"):
        draw_sweep(
            empty, keys=["optim.lr"], log=[], metric=LOSS, mode="min", best=0,
            path=tmp_path / "x.png",
        )  # fmt: skip
