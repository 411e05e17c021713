"""Cross-field rules of a training run, with their messages."""

import pytest

from cellray.core.errors import ConfigError
from cellray.data.config import DataSection
from cellray.train.config import BatchSection, EngineSection, ScaleSection, TrainSection
from cellray.train.rules import check_batch


def check(cells_global, cells_micro, workers, lanes=0):
    check_batch(
        BatchSection(cells_global=cells_global, cells_micro=cells_micro),
        ScaleSection(workers=workers),
        DataSection(uri="x", lanes=lanes),
    )


def test_cells_global_must_be_a_multiple():
    with pytest.raises(
        ConfigError,
        match=r"cells_global = 50 is not a multiple of batch.cells_micro x scale.workers = "
        r"8 x 3 = 24; the nearest that fit: 48 or 72",
    ):
        check(50, 8, 3)


def test_lanes_must_fit_the_workers():
    with pytest.raises(ConfigError, match=r"data.lanes = 8 must divide .* allowed: 3, 6, 12, 24"):
        check(24, 8, 3, lanes=8)
    check(24, 8, 3, lanes=6)


def test_default_lanes_fit_many_workers():
    for workers in (1, 2, 4, 8, 16, 32, 64):
        check(2048, 32, workers)


def test_a_run_has_one_length():
    with pytest.raises(ValueError, match=r"either train.steps or train.epochs \(given: steps = 5"):
        TrainSection(steps=5, epochs=1.0)
    with pytest.raises(ValueError, match="either train.steps or train.epochs"):
        TrainSection()


def test_the_torch_engine_is_not_sharded():
    with pytest.raises(ValueError, match=r"zero_stage = 2 needs engine.name = 'deepspeed'"):
        EngineSection(name="torch", zero_stage=2)
    assert EngineSection(name="torch").name == "torch"
