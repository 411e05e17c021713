"""The training loop of one rank, without Ray: tokens in, steps, validations, reports out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from cellray.core.batch import CellBatch
from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.train.config import OptimSection, TrainSection
from cellray.train.engine import Engine, StepStats, global_max, global_sum
from cellray.train.feed import DeviceCopy, prefetch
from cellray.train.guard import LossGuard
from cellray.train.meter import StepWork, WorkCounter, memory_bytes
from cellray.train.microbatch import Collator
from cellray.train.optim import learning_rate

__all__ = ["Host", "Loop", "StepInput", "seed_step"]


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


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step of one rank.

    What dropout and its like draw is so a function of (seed, step, rank): a run that goes on from a
    checkpoint draws what the unbroken one would have drawn, and no state need be kept.
    """
    key = Draw(seed).bits("train.torch", np.array([step]), np.array([rank]))[0]
    torch.manual_seed(int(key) & 0x7FFF_FFFF_FFFF_FFFF)


@dataclass
class _Window:
    """What happened since the last report, on this rank."""

    started: float = field(default_factory=time.perf_counter)
    work: StepWork = field(default_factory=StepWork)
    waited_s: float = 0.0
    steps: int = 0
    gradient_norm: float = 0.0
    losses: list[StepStats] = field(default_factory=list)

    def add(self, work: StepWork, stats: StepStats, waited_s: float) -> None:
        self.steps += 1
        self.work = self.work + work
        self.waited_s += waited_s
        if stats.taken:
            self.losses.append(stats)
            self.gradient_norm = max(self.gradient_norm, stats.gradient_norm)

    def metrics(self, counter: WorkCounter) -> dict[str, float]:
        """Rates over all ranks since the last report; collective."""
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        work = StepWork(*global_sum(self.work.columns()))
        targets = max(sum(s.num_targets for s in self.losses), 1)
        mean = {
            name: sum(s.parts[name] * s.num_targets for s in self.losses) / targets
            for name in (self.losses[0].parts if self.losses else {})
        }
        loss = sum(s.loss * s.num_targets for s in self.losses) / targets
        return {
            "train/loss": loss if self.losses else math.nan,
            **{f"train/{name}": value for name, value in mean.items()},
            "gradient_norm": self.gradient_norm,
            "cells": work.cells,
            "tokens": work.tokens,
            "cells_per_s": work.cells / elapsed,
            "tokens_per_s": work.tokens / elapsed,
            "step_s": elapsed / max(self.steps, 1),
            "padding_fraction": 1 - work.tokens / max(work.slots, 1),
            "data_wait_fraction": min(self.waited_s / elapsed, 1.0),
            "memory_bytes": global_max(memory_bytes(counter.device)),
            **counter.rates(work, elapsed),
        }


class Host:
    """Whom a loop reports to; this one listens to nothing.

    Attributes:
        rank: world rank.
        seed: of the run.
    """

    rank: int = 0
    seed: int = 0

    def report(self, metrics: dict[str, float], save: bool) -> None:
        """Take metrics, and save a checkpoint with them; called equally often on every rank."""

    def vote(self) -> float:
        """What this rank adds to the votes of a step."""
        return 0.0

    def settle(self, votes: float) -> None:
        """Act on the votes of all ranks."""

    def trained(
        self,
        tokens: StepInput,
        batches: Sequence[CellBatch],
        stats: StepStats,
        lr: float,
    ) -> None:
        """A step is over, taken or not."""


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
        host: receives reports; decides with the other ranks.
        guard: says what a loss may be.
        counter: counts the work of steps.
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
    host: Host
    guard: LossGuard
    counter: WorkCounter
    validation: list[CellBatch] = field(default_factory=list)
    validation_counted: int | None = None

    def run(self, stream: Iterable[StepInput]) -> None:
        """Train to the end of the stream.

        Raises:
            StoppedError: a bad step under the policy ``stop``, or a rank that cannot go on.
        """
        window = _Window()
        copy = DeviceCopy(self.counter.device)
        waiting = time.perf_counter()
        for tokens, batches, event, work in prefetch(self._collated(stream, copy)):
            copy.wait(batches, event)
            waited_s = time.perf_counter() - waiting
            stats, lr = self._step(tokens, batches)
            window.add(work, stats, waited_s)
            done = tokens.step + 1
            if self._due(done, self.train.log_every_steps) or self._saves(done):
                self._report(window, done, tokens.epoch, lr)
                window = _Window()
            waiting = time.perf_counter()

    def _step(self, tokens: StepInput, batches: list[CellBatch]) -> tuple[StepStats, float]:
        lr = learning_rate(tokens.step, total_steps=self.total_steps, optim=self.optim)
        seed_step(self.host.seed, tokens.step, self.host.rank)
        stats = self.engine.step(batches, lr=lr, limit=self.guard.limit, vote=self.host.vote())
        self.guard.observe(stats)
        self.host.trained(tokens, batches, stats, lr)
        self.host.settle(stats.votes)
        return stats, lr

    def _collated(
        self, stream: Iterable[StepInput], copy: DeviceCopy
    ) -> Iterator[tuple[StepInput, list[CellBatch], Any, StepWork]]:
        for tokens in stream:
            batches = self.collator(
                tokens.block, tokens.covariates, epoch=tokens.epoch, step=tokens.step
            )
            work = self.counter.of(batches)
            yield tokens, *copy(batches), work

    def _due(self, done: int, every: int) -> bool:
        return done == self.total_steps or (every > 0 and done % every == 0)

    def _saves(self, done: int) -> bool:
        return self._due(done, self.save_every_steps) or self._due(
            done, self.train.eval_every_steps
        )

    def _report(self, window: _Window, done: int, epoch: int, lr: float) -> None:
        metrics = window.metrics(self.counter)
        metrics |= {"step": float(done), "epoch": float(epoch), "learning_rate": lr}
        metrics["eta_s"] = metrics["step_s"] * (self.total_steps - done)
        metrics["bad_steps"] = float(self.guard.bad_steps)
        if self._saves(done) and self.validation:
            stats = self.engine.evaluate(self.validation, counted=self.validation_counted)
            metrics["validation/loss"] = stats.loss
            metrics |= {f"validation/{name}": value for name, value in stats.parts.items()}
        self.host.report(metrics, self._due(done, self.save_every_steps))
