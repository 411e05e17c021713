"""What a task is: what it needs of a model, how cells are split, what is learnt, how it is scored.

A task asks for capabilities, never for a family, and knows nothing of how training is run. A method
answers with a label and a confidence for every test cell, or with a vector for every cell.

Legend: N cells of the selection, C classes, D width of an embedding, P principal components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core import registry
from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.core.section import Section

__all__ = [
    "OWN",
    "Split",
    "Targets",
    "Task",
    "TaskConfig",
    "asked_cells",
    "check_columns",
    "ids_sha256",
    "score_labels",
    "task",
]

# Targets.objective: the one that the family is pretrained with.
OWN = "own"

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
Labels = Sequence[str] | npt.NDArray[np.generic]


class TaskConfig(Section):
    """Keys every task has; each adds its own in its own file.

    Attributes:
        name: the task's module name.
        label: obs column with the truth.
        batch: obs column with the batch (donor, sample, technology) that methods may correct for
            and that guards look at; "" if there is none.
        duplicates: what becomes of training and validation cells with exactly the counts of a test
            cell: ``error`` refuses the run, ``drop_train`` leaves them out, ``allow`` keeps them.
    """

    name: str
    label: str = "cell_type"
    batch: str = ""
    duplicates: Literal["error", "drop_train", "allow"] = "error"


@dataclass(frozen=True)
class Split:
    """Which cells are trained on, chosen by, and scored: disjoint ascending joinids.

    Attributes:
        train: (N_train,) int64.
        validation: (N_validation,) int64; may be empty.
        test: (N_test,) int64.
        split_sha256: SHA-256 of the sorted test joinids.
        unit: what is held out whole: the obs column of the test values, or ``cell``.
        validation_unit: the same for validation.
        left_out: why -> how many cells are in none of the three (no label, no group).
        warnings: what a reader of the table must know.
    """

    train: I64
    validation: I64
    test: I64
    split_sha256: str
    unit: str
    validation_unit: str = "cell"
    left_out: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Targets:
    """What a model is fitted to.

    Attributes:
        objective: key in ``cellray.objectives``, :data:`OWN` for the family's own, or "" where
            nothing is learnt.
        classes: C names in code order, from training cells only; empty if no label is learnt.
        codes: (N,) int64 aligned with obs; -1 for a cell without label or of another class.
        settings: further keys of the objective.
        covariates: obs columns that the model is conditioned on besides those of its checkpoint.
        recipe: key of ``Family.recipes`` that is laid over the checkpoint, "" for none; the first
            covariate is its technical batch.
        model: further keys laid over the model's configuration.
        num_genes: variable genes that the model keeps of its vocabulary, chosen batch by batch on
            training cells; 0 keeps all.
    """

    objective: str
    classes: tuple[str, ...]
    codes: I64
    settings: Mapping[str, Any] = field(default_factory=dict)
    covariates: tuple[str, ...] = ()
    recipe: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    num_genes: int = 0


def _no_labels(truth: Labels, predicted: Labels, classes: Sequence[str]) -> dict[str, float]:
    raise ConfigError("this task is answered with an embedding: it has no labels to score")


@dataclass(frozen=True)
class Task:
    """What a task's module exports as ``TASK``.

    Attributes:
        name: equals the module's name.
        config: its configuration class.
        needs: capability protocols a model must offer.
        columns: (config, obs columns there are) -> those it reads; refuses a config that names
            others.
        split: (obs, config, seed=...) -> split; pure.
        fit: (obs, config, split) -> what is learnt, from training cells only.
        headline: the metric id that tables are sorted by.
        compulsory: baselines without which no table of this task is shown.
        score: (truth, predicted, classes) -> versioned metric id -> value; of a task that is
            answered with labels.
        score_cells: (obs of the test cells, config, truth, predicted, classes) -> further metrics
            of such a task, which need more of the cells than their labels.
        answers: what a method gives: ``labels`` (of the test cells) or ``embedding`` (of all).
        score_embedding: (obs (N rows), config, embedding (N, D), before (N, P), seed) -> versioned
            metric id -> value; of a task that is answered with an embedding. ``before`` are the
            principal components of the same cells without integration.
        neighbours: whether a model that embeds cells answers by its nearest training cells instead
            of a classifier of its own.
    """

    name: str
    config: type[TaskConfig]
    needs: tuple[type, ...]
    columns: Callable[[Any, Sequence[str]], list[str]]
    split: Callable[..., Split]
    fit: Callable[[pd.DataFrame, Any, Split], Targets]
    headline: str
    compulsory: tuple[str, ...]
    score: Callable[[Labels, Labels, Sequence[str]], dict[str, float]] = _no_labels
    score_cells: (
        Callable[[pd.DataFrame, Any, Labels, Labels, Sequence[str]], dict[str, float]] | None
    ) = None
    answers: Literal["labels", "embedding"] = "labels"
    score_embedding: Callable[[pd.DataFrame, Any, F32, F32, int], dict[str, float]] | None = None
    neighbours: bool = False


def asked_cells(unit: Task, split: Split) -> I64:
    """Ascending joinids that a method answers for: the test cells, or all for an embedding."""
    if unit.answers == "labels":
        return split.test
    return np.sort(np.concatenate([split.train, split.validation, split.test]))


def score_labels(
    unit: Task,
    obs: pd.DataFrame,
    config: TaskConfig,
    truth: Labels,
    predicted: Labels,
    classes: Sequence[str],
) -> dict[str, float]:
    """Every metric of a task that is answered with labels.

    Args:
        unit: the task.
        obs: its N test cells, in the order of their joinids.
        config: its section.
        truth: N true labels.
        predicted: N predicted labels.
        classes: those of the training cells.

    Raises:
        ConfigError: the task is answered with an embedding.
        DataError: what cannot be scored.
    """
    scores = unit.score(truth, predicted, classes)
    if unit.score_cells is not None:
        scores |= unit.score_cells(obs, config, truth, predicted, classes)
    return scores


def task(name: str) -> Task:
    """Find a task by its key or by ``module.path:TASK``.

    Raises:
        ConfigError: there is none.
    """
    found = registry.find("cellray.tasks", name, "TASK")
    assert isinstance(found, Task), f"{name} exports a {type(found).__name__} as TASK"
    return found


def check_columns(available: Sequence[str], wanted: Mapping[str, str]) -> None:
    """Refuse a configuration that names an obs column the data lack.

    Args:
        available: the obs columns there are.
        wanted: configuration key -> the column it names.

    Raises:
        DataError: a column is missing; says the nearest and lists all.
    """
    names = [str(name) for name in available]
    for key, column in wanted.items():
        if column not in names:
            raise DataError(
                f"{key} = '{column}': obs has no such column.{did_you_mean(column, names)} "
                f"It has: {', '.join(sorted(names))}"
            )


def ids_sha256(joinids: I64) -> str:
    """SHA-256 over ascending joinids as little-endian int64: the same cells, the same digest."""
    return hashlib.sha256(np.sort(joinids).astype("<i8").tobytes()).hexdigest()
