"""Traces of the steps that were asked for."""

import gzip
import json

import pytest
import torch

from cellray.train.profiling import StepProfiler


def record(folder, steps, first):
    profiler = StepProfiler(steps, folder)
    profiler.step(first)
    for done in range(first + 1, 6):
        torch.ones(4 * done).sigmoid()  # a step
        profiler.step(done)
    profiler.close()
    return sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []


@pytest.mark.parametrize(
    ("steps", "first", "name", "count"),
    [([1, 1], 0, "steps-1-1", 1), ([1, 3], 0, "steps-1-3", 3), ([1, 3], 1, "steps-2-3", 2)],
)
def test_the_steps_asked_for_are_recorded(tmp_path, steps, first, name, count):
    assert record(tmp_path / "p", steps, first) == [f"{name}.trace.json.gz", f"{name}.txt"]
    trace = json.loads(gzip.decompress((tmp_path / "p" / f"{name}.trace.json.gz").read_bytes()))
    steps_done = [e for e in trace["traceEvents"] if e.get("name") == "aten::sigmoid"]
    assert len(steps_done) == count


def test_nothing_is_recorded_unasked_or_after_the_steps(tmp_path):
    assert record(tmp_path / "a", [], 0) == []
    assert record(tmp_path / "b", [1, 2], 3) == []
