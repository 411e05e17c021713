"""Label transfer: learn labels on reference batches, predict those of query batches.

Annotation whose held-out units are technical batches, scored as annotation and, besides, batch by
batch. One split a run: which batches are the reference and which the query is said by their names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from pydantic import model_validator

from cellray.core.errors import DataError, did_you_mean
from cellray.metrics.base import Labels
from cellray.metrics.by_batch import score_by_batch
from cellray.metrics.classification import score_annotation
from cellray.models.base import EmbedsCells
from cellray.tasks._labels import column_texts
from cellray.tasks.annotation import (
    AnnotationConfig,
    AnnotationSplit,
    annotation_split,
    annotation_targets,
)
from cellray.tasks.base import Split, Task, check_columns

__all__ = ["TASK", "LabelTransferConfig", "TransferSplit", "score_batches", "transfer_split"]

_LISTED = 12


class TransferSplit(AnnotationSplit):
    """How reference cells are divided for the choice of the checkpoint.

    Attributes:
        validation_fraction: share of the reference set apart; which cells, the seed decides.
        validation_by: ``cell``, ``group`` (whole reference batches), or ``auto``: group if there
            are at least 10 of them.
    """

    @model_validator(mode="after")
    def _one_test(self) -> TransferSplit:
        if self.column or self.test_values or self.test_fraction:
            raise ValueError(
                "label transfer holds out batches: give task.batch with task.query (and "
                "task.reference) instead of column, test_values or test_fraction"
            )
        return self


class LabelTransferConfig(AnnotationConfig):
    """Keys of the label transfer task; ``batch`` must be given.

    Attributes:
        reference: values of ``batch`` to learn from; [] takes all that are not queries.
        query: values of ``batch`` to predict; [] takes all that are not references.
        split: which reference cells validate.
    """

    name: str = "label_transfer"
    reference: list[str] = []
    query: list[str] = []
    split: TransferSplit = TransferSplit()

    @model_validator(mode="after")
    def _two_sides(self) -> LabelTransferConfig:
        if not self.batch:
            raise ValueError(
                "task.batch is missing: label transfer needs the obs column with the batches"
            )
        if not self.reference and not self.query:
            raise ValueError(
                "give task.reference or task.query, values of the batch column (or both); the "
                "other side is then all other batches"
            )
        both = sorted(set(self.reference) & set(self.query))
        if both:
            raise ValueError(f"batches are both reference and query: {', '.join(both)}")
        return self


def _donors(config: LabelTransferConfig, available: Sequence[str]) -> list[str]:
    named = {config.batch, config.label}
    return [c for c in config.donor_columns if c in available and c not in named]


def _columns(config: LabelTransferConfig, available: Sequence[str]) -> list[str]:
    check_columns(available, {"task.label": config.label, "task.batch": config.batch})
    return list(dict.fromkeys([config.label, config.batch, *_donors(config, available)]))


def _sides(config: LabelTransferConfig, there: Sequence[str]) -> tuple[list[str], list[str]]:
    """Reference and query batches.

    Raises:
        DataError: a batch that no cell has, or an empty side.
    """
    for key in ("reference", "query"):
        absent = [name for name in getattr(config, key) if name not in there]
        if absent:
            more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
            raise DataError(
                f"task.{key}: no cell has {config.batch} = '{absent[0]}'."
                f"{did_you_mean(absent[0], there)} There are: {', '.join(there[:_LISTED])}{more}"
            )
    query = config.query or [name for name in there if name not in config.reference]
    reference = config.reference or [name for name in there if name not in query]
    for key, side in (("reference", reference), ("query", query)):
        if not side:
            raise DataError(
                f"no batch is left as {key}: '{config.batch}' has "
                f"{', '.join(there[:_LISTED])}, all of them on the other side"
            )
    return reference, query


def _on_both_sides(obs: pd.DataFrame, split: Split, config: LabelTransferConfig) -> list[str]:
    joinids = obs["soma_joinid"].to_numpy(dtype=np.int64)
    queries = np.isin(joinids, split.test)
    reference = np.isin(joinids, np.concatenate([split.train, split.validation]))
    found = []
    for column in _donors(config, [str(c) for c in obs.columns]):
        values = obs[column].astype("string")
        both = sorted(set(values[queries].dropna()) & set(values[reference].dropna()))
        if both:
            found.append(
                f"{len(both)} values of '{column}' have cells in reference and query: "
                f"{', '.join(both[:_LISTED])}; the score is of new batches, not of new donors"
            )
    return found


def transfer_split(obs: pd.DataFrame, config: LabelTransferConfig, *, seed: int) -> Split:
    """Reference cells to train and validate on, query cells to test on; pure.

    Args:
        obs: N cells with ``soma_joinid``, label, batch and the donor columns that there are.
        config: the task's section.
        seed: chooses the validation cells.

    Raises:
        DataError: unknown batches, an empty side, or as in
            :func:`cellray.tasks.annotation.annotation_split`.
    """
    batches = column_texts(obs[config.batch])
    there = sorted({str(name) for name in batches if name is not None})
    reference, query = _sides(config, there)
    chosen = np.isin(batches.astype(str), [*reference, *query])
    chosen &= np.array([name is not None for name in batches], dtype=bool)
    inner = AnnotationSplit(
        column=config.batch,
        test_values=query,
        validation_fraction=config.split.validation_fraction,
        validation_by=config.split.validation_by,
    )
    kept = obs[chosen].reset_index(drop=True)
    split = annotation_split(kept, config.model_copy(update={"split": inner}), seed=seed)
    left_out = {"neither reference nor query": int((~chosen).sum()), **split.left_out}
    warnings = (*split.warnings, *_on_both_sides(kept, split, config))
    return Split(
        train=split.train,
        validation=split.validation,
        test=split.test,
        split_sha256=split.split_sha256,
        unit=config.batch,
        validation_unit=split.validation_unit,
        left_out={why: num for why, num in left_out.items() if num},
        warnings=warnings,
    )


def _score(truth: Labels, predicted: Labels, classes: Sequence[str]) -> dict[str, float]:
    return score_annotation(truth, predicted, train_classes=classes)


def score_batches(
    obs: pd.DataFrame,
    config: LabelTransferConfig,
    truth: Labels,
    predicted: Labels,
    classes: Sequence[str],
) -> dict[str, float]:
    """Macro-F1 of each query batch, their mean and the least.

    Args:
        obs: the N test cells, with the batch column.
        config: the task's section.
        truth: N true labels.
        predicted: N predicted labels.
        classes: of the reference cells.

    Raises:
        DataError: as in :func:`cellray.metrics.by_batch.score_by_batch`.
    """
    return score_by_batch(truth, predicted, column_texts(obs[config.batch]), train_classes=classes)


TASK = Task(
    name="label_transfer",
    config=LabelTransferConfig,
    needs=(EmbedsCells,),
    columns=_columns,
    split=transfer_split,
    fit=annotation_targets,
    score=_score,
    score_cells=score_batches,
    headline="macro_f1.union.v1",
    compulsory=("majority", "logistic", "knn", "hvg", "harmony", "batch_only"),
)
