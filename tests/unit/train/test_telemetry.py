"""Telemetry: which rank exports what, what is counted, and what really arrives on Ray's page."""

from __future__ import annotations

import math
import os
import re
import time
import urllib.request
from typing import Any

import pytest
import ray

from cellray.train import telemetry as t
from cellray.train.telemetry import METRICS, Telemetry, exported_name

REPORT = {
    "step": 10.0,
    "cells": 320.0,
    "tokens": 5000.0,
    "train/loss": 2.5,
    "validation/loss": 2.75,
    "learning_rate": 1e-4,
    "cells_per_s": 64.0,
    "tokens_per_s": 1000.0,
    "step_s": 0.5,
    "padding_fraction": 0.25,
    "data_wait_fraction": 0.125,
    "mfu": 0.4,
    "memory_bytes": 2e9,
    "gradient_norm": 1.5,
    "bad_steps": 1.0,
    "eta_s": 30.0,
    "epoch": 0.0,
    "train/some_part": 1.0,
}
SHARED_BY_ALL_RANKS = {m.name for m in METRICS if m.scope == "run"}


class _Instrument:
    """Stands in for Ray's counters and gauges."""

    made: dict[str, _Instrument] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.total = 0.0
        self.last: float | None = None
        self.tags: dict[str, str] = {}
        self.made[name] = self
        assert description.endswith(".")
        assert tag_keys == ("run", "rank")

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.tags = tags

    def inc(self, value: float) -> None:
        assert value > 0
        self.total += value

    def set(self, value: float) -> None:
        self.last = value


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, _Instrument]:
    monkeypatch.setattr(t, "Counter", _Instrument)
    monkeypatch.setattr(t, "Gauge", _Instrument)
    monkeypatch.setattr(t.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(_Instrument, "made", {})
    return _Instrument.made


def test_names_on_the_page() -> None:
    exported = [exported_name(m) for m in METRICS]
    assert len(set(exported)) == len(METRICS)
    for name in ("ray_cellray_cells_total", "ray_cellray_tokens_total", "ray_cellray_steps_total"):
        assert name in exported
    assert exported_name(METRICS[0]) == "ray_cellray_cells_total"
    assert "ray_cellray_loss" in exported
    assert not any(m.name.endswith("_total") for m in METRICS)


def test_rank_0_exports_everything(made: dict[str, _Instrument]) -> None:
    telemetry = Telemetry("blood", 0)
    telemetry.observe(REPORT)
    assert telemetry.active
    assert set(made) == {m.name for m in METRICS}
    assert made["cellray_loss"].last == 2.5
    assert made["cellray_validation_loss"].last == 2.75
    assert made["cellray_data_wait_fraction"].last == 0.125
    assert made["cellray_cells"].total == 320
    assert made["cellray_steps"].total == 10
    assert all(i.tags == {"run": "blood", "rank": "0"} for i in made.values())


def test_other_ranks_export_only_their_own(made: dict[str, _Instrument]) -> None:
    Telemetry("blood", 3).observe(REPORT)
    assert set(made) == {"cellray_step_seconds", "cellray_data_wait_fraction"}
    assert not SHARED_BY_ALL_RANKS & set(made)
    assert made["cellray_step_seconds"].tags == {"run": "blood", "rank": "3"}


def test_counters_add_up_and_steps_are_differences(made: dict[str, _Instrument]) -> None:
    telemetry = Telemetry("blood", 0, first_step=100)
    for step in (110, 120, 125):
        telemetry.observe({"step": step, "cells": 32, "tokens": 0})
    assert made["cellray_steps"].total == 25
    assert made["cellray_cells"].total == 96
    assert made["cellray_tokens"].total == 0
    assert made["cellray_step"].last == 125
    assert made["cellray_loss"].last is None


def test_a_nan_is_counted_and_leaves_the_last_finite_value(made: dict[str, _Instrument]) -> None:
    telemetry = Telemetry("blood", 0)
    telemetry.observe({**REPORT, "train/loss": 2.5})
    assert made["cellray_nonfinite_reports"].total == 0
    telemetry.observe({**REPORT, "train/loss": math.nan})
    telemetry.observe({**REPORT, "train/loss": math.inf})
    assert made["cellray_loss"].last == 2.5
    assert made["cellray_nonfinite_reports"].total == 2


def test_without_ray_nothing_is_registered(
    made: dict[str, _Instrument], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(t.ray, "is_initialized", lambda: False)
    telemetry = Telemetry("blood", 0)
    telemetry.observe(REPORT)
    assert not telemetry.active
    assert made == {}


def _page(nodes: list[dict[str, Any]]) -> str:
    pages = [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in nodes]
    texts = []
    for page in pages:
        with urllib.request.urlopen(page, timeout=10) as answer:
            texts.append(answer.read().decode())
    return "\n".join(texts)


@pytest.mark.ray
def test_the_names_arrive_on_rays_metrics_page(monkeypatch: pytest.MonkeyPatch) -> None:
    started = not ray.is_initialized()
    if started:
        for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
            monkeypatch.setitem(os.environ, name, value)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    @ray.remote(num_cpus=0.1)
    class Rank:
        def __init__(self, rank: int) -> None:
            self.telemetry = Telemetry("page-test", rank)

        def observe(self, report: dict[str, float]) -> bool:
            self.telemetry.observe(report)
            return self.telemetry.active

    try:
        ranks = [Rank.remote(rank) for rank in range(2)]
        reports = (REPORT, {**REPORT, "step": 20.0, "train/loss": math.nan})
        for report in reports:
            assert ray.get([r.observe.remote(report) for r in ranks]) == [True, True]
        wanted = {exported_name(m) for m in METRICS}
        deadline = time.monotonic() + 60
        found: dict[tuple[str, str], float] = {}
        last = ("ray_cellray_step_seconds", "1")  # the other rank may arrive a page later
        while time.monotonic() < deadline and (
            {name for name, _ in found} != wanted or last not in found
        ):
            time.sleep(1)
            found = {
                (m.group(1), m.group(2)): float(m.group(3))
                for m in re.finditer(
                    r'^(\w+)\{[^}]*rank="(\d)",run="page-test"\} (\S+)$',
                    _page(ray.nodes()),
                    re.MULTILINE,
                )
            }
    finally:
        if started:
            ray.shutdown()
    assert {name for name, _ in found} == wanted
    assert found["ray_cellray_cells_total", "0"] == 640
    assert found["ray_cellray_steps_total", "0"] == 20
    assert found["ray_cellray_nonfinite_reports_total", "0"] == 1
    assert found["ray_cellray_loss", "0"] == 2.5
    assert found["ray_cellray_step_seconds", "1"] == 0.5
    assert ("ray_cellray_cells_total", "1") not in found
