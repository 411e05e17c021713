"""Reference mapping: label query cells by the nearest cells of a reference embedded once.

Nothing is trained: any model that embeds cells is taken frozen. The reference are the training
cells, the queries the test cells, held out by whole studies or donors; a donor with cells on both
sides is an error, because its cells find each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator

from cellray.core.errors import DataError
from cellray.metrics.classification import score_annotation
from cellray.models.base import EmbedsCells
from cellray.tasks.annotation import (
    AnnotationConfig,
    AnnotationSplit,
    annotation_split,
    annotation_targets,
)
from cellray.tasks.base import Split, Task, check_columns

__all__ = ["TASK", "ReferenceMappingConfig", "ReferenceSplit", "reference_split"]

Labels = Sequence[str] | npt.NDArray[np.generic]
_LISTED = 5


class ReferenceSplit(AnnotationSplit):
    """How cells are divided, as for annotation, but no cell validates: nothing is chosen by it.

    Attributes:
        validation_fraction: share of the reference set apart all the same.
    """

    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)


class ReferenceMappingConfig(AnnotationConfig):
    """Keys of the reference mapping task.

    Attributes:
        split: which whole values of ``split.column`` (studies, donors) are the queries.
        donor_columns: obs columns that name donors: none may have cells on both sides. Where
            donors of two studies merely share a name ("donor 1"), leave the column out.
        num_neighbors: reference cells that vote, each with one vote.
    """

    name: str = "reference_mapping"
    split: ReferenceSplit
    num_neighbors: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _whole_groups(self) -> ReferenceMappingConfig:
        if not self.split.column:
            raise ValueError(
                "task.split.column is missing: reference mapping holds out whole studies or "
                "donors; name the obs column that holds them"
            )
        return self


def _donors(config: ReferenceMappingConfig, available: Sequence[str]) -> list[str]:
    others = {config.split.column, config.label}
    return [c for c in config.donor_columns if c in available and c not in others]


def _columns(config: ReferenceMappingConfig, available: Sequence[str]) -> list[str]:
    """The columns to read: label, held-out groups, batch, and the donors that must not leak."""
    wanted = {"task.label": config.label, "task.split.column": config.split.column}
    if config.batch:
        wanted["task.batch"] = config.batch
    check_columns(available, wanted)
    return list(dict.fromkeys([*wanted.values(), *_donors(config, available)]))


def reference_split(obs: pd.DataFrame, config: ReferenceMappingConfig, *, seed: int) -> Split:
    """Divide labelled cells into reference and queries; a pure function of its arguments.

    Args:
        obs: N cells with ``soma_joinid``, the label, the split column and those of the donor
            columns that there are.
        config: the task's section.
        seed: chooses validation cells, if any are asked for.

    Raises:
        DataError: as in :func:`cellray.tasks.annotation.annotation_split`, or a donor has cells
            both in the reference and among the queries.
    """
    split = annotation_split(obs, config, seed=seed)
    joinids = obs["soma_joinid"].to_numpy(dtype=np.int64)
    queries = np.isin(joinids, split.test)
    reference = np.isin(joinids, np.concatenate([split.train, split.validation]))
    for column in _donors(config, list(obs.columns)):
        donors = obs[column].astype("string")
        both = set(donors[queries].dropna()) & set(donors[reference].dropna())
        if both:
            shown = ", ".join(sorted(both)[:_LISTED])
            raise DataError(
                f"{len(both)} values of '{column}' have cells both in the reference and among the "
                f"queries: {shown}; hold them out whole (task.split.column = '{column}'), or, if "
                "they are different donors of one name, leave the column out of task.donor_columns"
            )
    return split


def _score(truth: Labels, predicted: Labels, classes: Sequence[str]) -> dict[str, float]:
    return score_annotation(truth, predicted, train_classes=classes)


TASK = Task(
    name="reference_mapping",
    config=ReferenceMappingConfig,
    needs=(EmbedsCells,),
    columns=_columns,
    split=reference_split,
    fit=annotation_targets,
    score=_score,
    headline="macro_f1.union.v1",
    compulsory=("majority", "logistic", "knn", "hvg", "harmony"),
    neighbours=True,
)
