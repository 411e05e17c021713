"""Cross-field rules of a training run, with their messages."""

import pytest

from cellray.core.errors import ConfigError
from cellray.data.config import DataSection
from cellray.train.config import BatchSection, EngineSection, ScaleSection, TrainSection
from cellray.train.rules import check_batch, uneven_shares


def check(cells_global, cells_micro, workers, lanes=0):
    check_batch(
        BatchSection(cells_global=cells_global, cells_micro=cells_micro),
        ScaleSection(workers=workers),
        DataSection(uri="x", lanes=lanes),
    )


def test_more_workers_than_lanes_are_refused():
    with pytest.raises(
        ConfigError,
        match=r"data.lanes = 2 must divide batch.cells_global = 24 and be at least scale.workers = "
        r"3; allowed: 3, 4, 6, 8, 12, 24",
    ):
        check(24, 8, 3, lanes=2)
    with pytest.raises(ConfigError, match=r"scale.workers = 9; raise batch.cells_global"):
        check(8, 8, 9)


def test_lanes_must_divide_a_global_batch():
    with pytest.raises(ConfigError, match=r"data.lanes = 7 must divide .* allowed: 3, 4, 6, 8"):
        check(24, 8, 3, lanes=7)
    check(24, 8, 3, lanes=6)


def test_uneven_shares_are_told():
    assert uneven_shares(8, workers=4, cells_global=32) == ""
    told = uneven_shares(11, workers=3, cells_global=32)
    assert "3 workers share 32 cells a step unevenly: 11 for some, fewer for others" in told


def test_an_elastic_run_has_a_range_of_workers():
    with pytest.raises(ValueError, match=r"min_workers = 3 is more than scale.workers = 2"):
        ScaleSection(workers=2, min_workers=3)


def test_offload_needs_a_stage_that_has_something_to_offload():
    with pytest.raises(ValueError, match=r"offload = 'parameters' needs .* >= 3 \(given: 'deep"):
        EngineSection(zero_stage=2, offload="parameters")
    with pytest.raises(ValueError, match=r"offload = 'optimizer' needs .* \(given: 'torch'"):
        EngineSection(name="torch", offload="optimizer")
    assert EngineSection(zero_stage=1, offload="optimizer").offload == "optimizer"


def test_a_trace_has_two_ends():
    with pytest.raises(ValueError, match=r"profile_steps = \[9, 4\]: give the first and the last"):
        TrainSection(steps=20, profile_steps=[9, 4])


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
