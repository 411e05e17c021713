"""The training loop of one rank, without Ray: tokens in, steps, validations, reports out."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cellray.core.batch import CellBatch
from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.data.collate import collate_packed, collate_tokens
from cellray.objectives.base import Objective
from cellray.train.config import OptimSection, TrainSection
from cellray.train.engine import Engine, StepStats, global_sum
from cellray.train.optim import learning_rate

__all__ = ["Collator", "Loop", "StepInput", "prefetch"]

T = TypeVar("T")


class StepInput(Protocol):
    """What a token stream yields: one rank's cells of one step."""

    @property
    def step(self) -> int:
        """Global step."""
        ...

    @property
    def epoch(self) -> int:
        """Pass over the data."""
        ...

    @property
    def block(self) -> TokenBlock:
        """The rank's cells."""
        ...

    @property
    def covariates(self) -> Mapping[str, npt.NDArray[np.int64]]:
        """Codes of the cells."""
        ...


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """Run ``items`` in a thread, at most ``depth`` ahead; errors surface in the caller."""
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:  # noqa: BLE001  handed to the consuming thread
            put((None, error, True))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error, done = ready.get()
            if error is not None:
                raise error
            if done:
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join(timeout=5)


@dataclass(frozen=True)
class Collator:
    """Cuts a rank's cells of a step into corrupted micro-batches of cells of like length.

    Losses are sums over the step's cells, so which micro-batch a cell is in changes no loss and no
    gradient, but sorted by length the cells need less padding.

    Attributes:
        objective: hides what is to be predicted.
        pad: token id of ``<pad>``.
        cells_micro: cells of a micro-batch.
        seed: the run's seed.
        packed: lay cells end to end instead of padding them.
    """

    objective: Objective
    pad: int
    cells_micro: int
    seed: int
    packed: bool = False

    def __call__(
        self,
        block: TokenBlock,
        covariates: Mapping[str, npt.NDArray[np.int64]],
        *,
        epoch: int,
        step: int = 0,
    ) -> list[CellBatch]:
        """Micro-batches, the shortest cells first; cells of equal length in the block's order."""
        collate = collate_packed if self.packed else collate_tokens
        order = np.arange(len(block))
        if len(block) > self.cells_micro:
            order = np.argsort(np.diff(block.indptr), kind="stable")
        draw = Draw(self.seed, epoch)
        batches = []
        for start in range(0, len(block), self.cells_micro):
            rows = order[start : start + self.cells_micro]
            codes = {name: c[rows] for name, c in covariates.items()}
            part = block.take(rows)
            batch = collate(part, pad=self.pad, covariates=codes, step=step)
            batches.append(self.objective.corrupt(batch, draw))
        return batches


@dataclass
class _Window:
    """What happened since the last report, on this rank."""

    started: float = field(default_factory=time.perf_counter)
    cells: int = 0
    tokens: int = 0
    padded: int = 0
    waited_s: float = 0.0
    steps: int = 0
    losses: list[StepStats] = field(default_factory=list)

    def add(self, batches: list[CellBatch], stats: StepStats, waited_s: float) -> None:
        self.steps += 1
        self.cells += sum(len(b) for b in batches)
        self.tokens += sum(b.num_real_tokens for b in batches)
        self.padded += sum(b.attention_mask.numel() for b in batches)
        self.waited_s += waited_s
        self.losses.append(stats)

    def metrics(self) -> dict[str, float]:
        """Rates over all ranks since the last report; collective."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        cells, tokens, padded = global_sum([self.cells, self.tokens, self.padded])
        targets = max(sum(s.num_targets for s in self.losses), 1)
        mean = {
            name: sum(s.parts[name] * s.num_targets for s in self.losses) / targets
            for name in (self.losses[0].parts if self.losses else {})
        }
        return {
            "train/loss": sum(s.loss * s.num_targets for s in self.losses) / targets,
            **{f"train/{name}": value for name, value in mean.items()},
            "cells": cells,
            "tokens": tokens,
            "cells_per_s": cells / elapsed,
            "tokens_per_s": tokens / elapsed,
            "step_s": elapsed / max(self.steps, 1),
            "padding_fraction": 1 - tokens / max(padded, 1),
            "data_wait_fraction": min(self.waited_s / elapsed, 1.0),
        }


# Called with the metrics of a report and whether to save a checkpoint with it.
Report = Callable[[dict[str, float], bool], None]


@dataclass
class Loop:
    """Walks a token stream with an engine.

    Attributes:
        engine: takes the steps.
        collator: makes micro-batches.
        optim: learning-rate schedule.
        train: when to report and validate.
        total_steps: last step of the run, for the schedule and the ETA.
        save_every_steps: steps between checkpoints; 0 saves at the end only.
        report: receives metrics; called equally often on every rank.
        validation: this rank's validation micro-batches, already corrupted; the same number on
            every rank.
        validation_counted: how many of them count, the first ones; None: all.
    """

    engine: Engine
    collator: Collator
    optim: OptimSection
    train: TrainSection
    total_steps: int
    save_every_steps: int
    report: Report
    validation: list[CellBatch] = field(default_factory=list)
    validation_counted: int | None = None

    def run(self, stream: Iterable[StepInput]) -> None:
        """Train to the end of the stream."""
        window = _Window()
        waiting = time.perf_counter()
        for tokens, batches in prefetch(self._collated(stream)):
            waited_s = time.perf_counter() - waiting
            lr = learning_rate(tokens.step, total_steps=self.total_steps, optim=self.optim)
            stats = self.engine.step(batches, lr=lr)
            window.add(batches, stats, waited_s)
            done = tokens.step + 1
            if self._due(done, self.train.log_every_steps) or self._saves(done):
                self._report(window, done, tokens.epoch, lr)
                window = _Window()
            waiting = time.perf_counter()

    def _collated(self, stream: Iterable[StepInput]) -> Iterator[tuple[StepInput, list[CellBatch]]]:
        for tokens in stream:
            yield (
                tokens,
                self.collator(
                    tokens.block, tokens.covariates, epoch=tokens.epoch, step=tokens.step
                ),
            )

    def _due(self, done: int, every: int) -> bool:
        return done == self.total_steps or (every > 0 and done % every == 0)

    def _saves(self, done: int) -> bool:
        return self._due(done, self.save_every_steps) or self._due(
            done, self.train.eval_every_steps
        )

    def _report(self, window: _Window, done: int, epoch: int, lr: float) -> None:
        metrics = window.metrics()
        metrics |= {"step": float(done), "epoch": float(epoch), "learning_rate": lr}
        metrics["eta_s"] = metrics["step_s"] * (self.total_steps - done)
        if self._saves(done) and self.validation:
            stats = self.engine.evaluate(self.validation, counted=self.validation_counted)
            metrics["validation/loss"] = stats.loss
            metrics |= {f"validation/{name}": value for name, value in stats.parts.items()}
        self.report(metrics, self._due(done, self.save_every_steps))
