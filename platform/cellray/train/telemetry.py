"""What a training rank tells Prometheus: counters and gauges through Ray's metrics agent.

Ray exports a metric ``cellray_loss`` as ``ray_cellray_loss`` and a counter ``cellray_cells`` as
``ray_cellray_cells_total``, on every node's metrics port. :data:`METRICS` is the single list of
what is exported; the Grafana dashboard is tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge

__all__ = ["METRICS", "TAG_KEYS", "Metric", "Telemetry", "exported_name"]

TAG_KEYS = ("run", "rank")


@dataclass(frozen=True)
class Metric:
    """One exported metric.

    Attributes:
        name: as given to Ray, without its ``ray_`` prefix and, for a counter, ``_total``.
        kind: ``counter`` adds up; ``gauge`` is the last value.
        description: help text on the metrics page, with the unit.
        source: the key of a training report that it is read from; "" is counted here.
        scope: ``run``: all ranks report the same number and rank 0 exports it, so that a sum
            over ranks does not count it again; ``rank``: every rank exports its own.
    """

    name: str
    kind: Literal["counter", "gauge"]
    description: str
    source: str
    scope: Literal["run", "rank"] = "run"


METRICS: tuple[Metric, ...] = (
    Metric("cellray_cells", "counter", "Cells trained on, over all ranks.", "cells"),
    Metric("cellray_tokens", "counter", "Tokens trained on, without padding.", "tokens"),
    Metric("cellray_steps", "counter", "Optimizer steps taken.", "step"),
    Metric("cellray_nonfinite_reports", "counter", "Reports that held a NaN or an infinity.", ""),
    Metric("cellray_step", "gauge", "Last optimizer step of the run.", "step"),
    Metric("cellray_loss", "gauge", "Training loss since the last report.", "train/loss"),
    Metric("cellray_validation_loss", "gauge", "Last validation loss.", "validation/loss"),
    Metric("cellray_learning_rate", "gauge", "Learning rate of the last step.", "learning_rate"),
    Metric("cellray_cells_per_second", "gauge", "Cells a second, all ranks.", "cells_per_s"),
    Metric("cellray_tokens_per_second", "gauge", "Tokens a second, all ranks.", "tokens_per_s"),
    Metric(
        "cellray_padding_fraction", "gauge", "Padding in the batches, 0..1.", "padding_fraction"
    ),
    Metric("cellray_mfu", "gauge", "Model FLOP utilisation of the GPUs, 0..1.", "mfu"),
    Metric(
        "cellray_memory_bytes", "gauge", "Peak memory of the largest worker, bytes.", "memory_bytes"
    ),
    Metric("cellray_gradient_norm", "gauge", "Gradient norm before clipping.", "gradient_norm"),
    Metric("cellray_bad_steps", "gauge", "Steps left out so far.", "bad_steps"),
    Metric("cellray_eta_seconds", "gauge", "Expected seconds to the last step.", "eta_s"),
    Metric("cellray_step_seconds", "gauge", "Mean seconds of a step.", "step_s", "rank"),
    Metric(
        "cellray_data_wait_fraction",
        "gauge",
        "Share of the time that a rank waited for its next batch, 0..1.",
        "data_wait_fraction",
        "rank",
    ),
)


def exported_name(metric: Metric) -> str:
    """The name on the metrics page, e.g. ``ray_cellray_cells_total``."""
    return f"ray_{metric.name}" + ("_total" if metric.kind == "counter" else "")


class Telemetry:
    """Exports the reports of one rank.

    Ray is asked once, at construction: outside an initialised Ray (the loop profiled alone, a unit
    test) nothing is registered, :attr:`active` is False and :meth:`observe` does nothing.

    Args:
        run: name of the run, the ``run`` label.
        rank: world rank, the ``rank`` label; rank 0 exports what all ranks share.
        first_step: step that this process starts from (a resumed run's), so that
            ``cellray_steps`` counts only steps really taken here.
    """

    def __init__(self, run: str, rank: int, *, first_step: int = 0) -> None:
        self.active: bool = ray.is_initialized()
        self._last_step = float(first_step)
        self._instruments: list[tuple[Metric, Any]] = []
        if not self.active:
            return
        labels = dict(zip(TAG_KEYS, (run, str(rank)), strict=True))
        for metric in METRICS:
            if rank == 0 or metric.scope == "rank":
                make = Counter if metric.kind == "counter" else Gauge
                instrument = make(metric.name, metric.description, TAG_KEYS)
                instrument.set_default_tags(labels)
                self._instruments.append((metric, instrument))

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Export one report of the training loop.

        Args:
            metrics: keys as the loop reports them (:attr:`Metric.source`); ``cells`` and ``tokens``
                are those since the last report, ``step`` the absolute step. Keys that no metric
                reads are left alone, and a metric whose key is absent keeps its last value. So
                does one whose value is not finite (Ray would drop the series from the page);
                ``cellray_nonfinite_reports`` counts such reports.
        """
        step = float(metrics.get("step", self._last_step))
        values = {key: float(value) for key, value in metrics.items()}
        counted = {**values, "step": step - self._last_step}
        counted[""] = float(not all(math.isfinite(value) for value in values.values()))
        for metric, instrument in self._instruments:
            value = (values if metric.kind == "gauge" else counted).get(metric.source, math.nan)
            if not math.isfinite(value):
                continue
            if metric.kind == "gauge":
                instrument.set(value)
            elif value > 0:  # Ray's counters refuse 0
                instrument.inc(value)
        self._last_step = max(self._last_step, step)
