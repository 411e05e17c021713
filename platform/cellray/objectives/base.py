"""What an objective is: it hides part of a batch, and counts how well the model fills it in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.core.section import Section
from cellray.data.vocab import Vocab

__all__ = ["Load", "Loss", "Objective", "ObjectiveConfig", "ObjectiveUnit", "Tallies"]


class ObjectiveConfig(Section):
    """Keys every objective has; each adds its own in its own file."""

    name: str


@dataclass(frozen=True)
class Loss:
    """A loss as (sum, count): divided once, after the reduction over ranks and micro-batches.

    Attributes:
        total: scalar float32 sum over the targets, differentiable.
        num_targets: how many targets were summed; the same for ``total`` and every part.
        parts: named sums that make up ``total`` or accompany it (accuracy counts ...), detached.
    """

    total: torch.Tensor
    num_targets: int
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """``corrupt`` runs on the CPU beside the model, ``loss`` on the model's output."""

    def corrupt(self, batch: CellBatch, draw: Draw) -> CellBatch:
        """Return the batch with something hidden, and ``targets`` / ``target_mask`` set."""
        ...

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        """The summed loss over ``batch.target_mask``."""
        ...


@runtime_checkable
class Tallies(Protocol):
    """An objective with validation metrics that are no sum over targets, e.g. a macro average.

    What they are made of is counted batch by batch, summed over batches and ranks, and judged once.
    """

    def tally(self, output: ModelOutput, batch: CellBatch) -> torch.Tensor:
        """Counts over the batch's targets, of one shape for every batch of a run."""
        ...

    def judged(self, tally: torch.Tensor) -> dict[str, float]:
        """Metric name -> value, of the summed counts (float64, on the host)."""
        ...


@dataclass(frozen=True)
class Load:
    """What an objective makes of a cell on average, for estimates of memory and work.

    Attributes:
        targets: positions predicted at.
        hidden: tokens whose value the model does not see.
        added: tokens that join the cell.
        prompt_after: step from which a second pass prompted by the cell embedding runs, None never.
    """

    targets: float
    hidden: float = 0.0
    added: float = 0.0
    prompt_after: int | None = None


def _one_target(config: Any, tokens: float, num_genes: int) -> Load:
    return Load(targets=1.0)


def _anything(config: Any, tokenizer: Mapping[str, Any]) -> None:
    """Every tokenizer serves."""


@dataclass(frozen=True)
class ObjectiveUnit:
    """What an objective's module exports as ``OBJECTIVE``.

    Attributes:
        name: equals the module's name.
        config: its configuration class.
        build: (config, vocab) -> objective.
        check: (config, tokenizer's configuration) refuses tokens that it cannot work with.
        load: (config, tokens of a cell, genes of the vocabulary) -> what becomes of the cell.
        supervised: whether it needs labels.
        metrics: what its validation may report beside the loss: the names of its parts and of what
            it judges; () if it does not say.
    """

    name: str
    config: type[ObjectiveConfig]
    build: Callable[[Any, Vocab], Objective]
    check: Callable[[Any, Mapping[str, Any]], None] = _anything
    load: Callable[[Any, float, int], Load] = _one_target
    supervised: bool = False
    metrics: tuple[str, ...] = ()
