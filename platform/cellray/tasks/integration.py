"""Batch integration: fine-tune a model on all cells without their labels, then score its embedding.

With ``recipe = "family"`` the family's own recipe is laid over its checkpoint (norms and labels per
batch, an adversary, terms of the loss); with ``"objective"`` the family's self-supervised objective
is simply continued on these cells. Labels are read when the embedding is scored, never before; the
checkpoint is chosen by the validation loss of the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator

from cellray.core.errors import DataError
from cellray.data.split import hash_unit
from cellray.models.base import EmbedsCells
from cellray.tasks._labels import check_several, column_texts, given, labels_of
from cellray.tasks.base import OWN, Split, Targets, Task, check_columns, ids_sha256
from cellray.tasks.embedding import EmbeddingConfig, score_embedding

__all__ = ["TASK", "IntegrationConfig", "integration_split", "integration_targets"]

JOINID, CELL_KEY = "soma_joinid", "cellray_cell_key"
_LISTED = 12


class IntegrationConfig(EmbeddingConfig):
    """Keys of the integration task; ``batch`` must be given.

    Attributes:
        recipe: ``family``: the family's recipe for integration; ``objective``: its own
            self-supervised objective on these cells and nothing about batches.
        num_genes: variable genes that the family's recipe keeps of the model's vocabulary, chosen
            within batches; 1,200 in scGPT's. 0 keeps all. Not looked at by ``objective``.
        validation_fraction: share of the cells set apart for the choice of the checkpoint; which
            ones, the seed decides.
        model: keys laid over the recipe's of ``[model]``, e.g. ``domain_norm = "none"``.
        objective: the same of ``[objective]``, e.g. ``dar_weight = 0.0``.
        umap: draw the embedding by batch and label.
    """

    name: str = "integration"
    recipe: Literal["family", "objective"] = "family"
    num_genes: int = Field(default=1200, ge=0)
    validation_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    model: dict[str, Any] = {}
    objective: dict[str, Any] = {}
    umap: bool = True

    @field_validator("batch")
    @classmethod
    def _has_batches(cls, batch: str) -> str:
        if not batch:
            raise ValueError(
                "task.batch is missing: integration needs the obs column with the technical batch "
                "(donor, sample, protocol); without batches use the task 'embedding'"
            )
        return batch


def _columns(config: IntegrationConfig, available: Sequence[str]) -> list[str]:
    check_columns(available, {"task.label": config.label, "task.batch": config.batch})
    return list(dict.fromkeys([config.label, config.batch]))


def integration_split(obs: pd.DataFrame, config: IntegrationConfig, *, seed: int) -> Split:
    """All cells with a batch, labelled or not, to train and validate on; none is held out.

    Every cell is embedded, and those with a label are scored. The digest is of all cells.

    Args:
        obs: N cells with ``soma_joinid``, label and batch, and ``cellray_cell_key`` where cells
            have ids of their own.
        config: the task's section.
        seed: chooses the validation cells.

    Raises:
        DataError: fewer than two batches or labels, or an empty part.
    """
    batches = column_texts(obs[config.batch])
    placed = given(batches)
    there = sorted(set(batches[placed]))
    if len(there) < 2:
        raise DataError(
            f"task.batch = '{config.batch}': the cells are of {len(there)} batch "
            f"({', '.join(there) or 'none'}); there is nothing to integrate with fewer than two"
        )
    labels = labels_of(obs[config.label], config.ignore_labels)
    check_several(labels[given(labels) & placed], config.label)
    kept = obs[placed]
    names = kept[CELL_KEY if CELL_KEY in kept else JOINID].astype(str).to_numpy(dtype=object)
    inside = hash_unit(names, salt=seed) < config.validation_fraction
    joinids = kept[JOINID].to_numpy(dtype=np.int64)
    train, validation = np.sort(joinids[~inside]), np.sort(joinids[inside])
    if not len(train) or (config.validation_fraction and not len(validation)):
        raise DataError(
            f"task.validation_fraction = {config.validation_fraction} of {len(joinids)} cells "
            f"leaves {len(train)} to train and {len(validation)} to validate on; change it"
        )
    alone = sorted(set(there) - set(batches[placed][~inside]))
    warnings = []
    if alone:
        warnings.append(f"{len(alone)} batches have no training cell: {', '.join(alone[:_LISTED])}")
    return Split(
        train=train,
        validation=validation,
        test=np.zeros(0, dtype=np.int64),
        split_sha256=ids_sha256(joinids),
        unit="cell",
        left_out={"no batch": int((~placed).sum())} if (~placed).any() else {},
        warnings=tuple(warnings),
    )


def integration_targets(obs: pd.DataFrame, config: IntegrationConfig, split: Split) -> Targets:
    """No class and no code: the model sees batches, never labels.

    Args:
        obs: the N cells that were split.
        config: the task's section.
        split: from :func:`integration_split`.
    """
    by_recipe = config.recipe == "family"
    return Targets(
        objective=OWN,
        classes=(),
        codes=np.full(len(obs), -1, dtype=np.int64),
        settings=config.objective,
        covariates=(config.batch,) if by_recipe else (),
        recipe="integration" if by_recipe else "",
        model=config.model,
        num_genes=config.num_genes if by_recipe else 0,
    )


TASK = Task(
    name="integration",
    config=IntegrationConfig,
    needs=(EmbedsCells,),
    columns=_columns,
    split=integration_split,
    fit=integration_targets,
    headline="total_60_40.bio5_batch5.v1",
    compulsory=(
        "majority",
        "logistic",
        "pca",
        "hvg",
        "harmony",
        "combat",
        "noise",
        "celltype_jitter",
    ),
    answers="embedding",
    score_embedding=score_embedding,
)
