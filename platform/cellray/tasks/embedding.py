"""Zero-shot cell embedding: a frozen model's vectors, scored by labels that it never saw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import DataError
from cellray.models.base import EmbedsCells
from cellray.tasks._embedded import score_cells
from cellray.tasks._labels import NO_LABEL, check_several, column_texts, given, labels_of
from cellray.tasks.base import Split, Targets, Task, TaskConfig, check_columns, ids_sha256

__all__ = ["TASK", "EmbeddingConfig", "embedding_split", "score_embedding"]

F32 = npt.NDArray[np.float32]

JOINID = "soma_joinid"


class EmbeddingConfig(TaskConfig):
    """Keys of the embedding task; with ``batch``, mixing of batches is scored as well.

    Attributes:
        ignore_labels: values of the label that mean "no label": such cells are left out.
    """

    name: str = "embedding"
    ignore_labels: list[str] = list(NO_LABEL)


def _columns(config: EmbeddingConfig, available: Sequence[str]) -> list[str]:
    wanted = {"task.label": config.label}
    if config.batch:
        wanted["task.batch"] = config.batch
    check_columns(available, wanted)
    return list(dict.fromkeys(wanted.values()))


def embedding_split(obs: pd.DataFrame, config: EmbeddingConfig, *, seed: int) -> Split:
    """All cells with a label (and a batch, if batches are scored); nothing is held out.

    No label is learnt, so every cell is scored. The digest is of all of them.

    Args:
        obs: N cells with ``soma_joinid``, the label and the batch column.
        config: the task's section.
        seed: changes nothing.

    Raises:
        DataError: no cell is left, or all have one label.
    """
    labels = labels_of(obs[config.label], config.ignore_labels)
    labelled = given(labels)
    placed = np.ones(len(obs), dtype=bool)
    if config.batch:
        placed = given(column_texts(obs[config.batch]))
    joinids = np.sort(obs[JOINID].to_numpy(dtype=np.int64)[labelled & placed])
    if not len(joinids):
        raise DataError(
            f"no cell can be scored: of {len(obs)} cells {int(labelled.sum())} have a "
            f"'{config.label}' that is not in task.ignore_labels"
            + (f" and {int(placed.sum())} a '{config.batch}'" if config.batch else "")
        )
    check_several(labels[labelled & placed], config.label)
    none = np.zeros(0, dtype=np.int64)
    left_out = {"no label": int((~labelled).sum()), "no batch": int((labelled & ~placed).sum())}
    return Split(
        train=joinids,
        validation=none,
        test=none,
        split_sha256=ids_sha256(joinids),
        unit="cell",
        left_out={why: num for why, num in left_out.items() if num},
    )


def _nothing_to_learn(obs: pd.DataFrame, config: EmbeddingConfig, split: Split) -> Targets:
    """Zero-shot: no objective, no class, no code."""
    return Targets(objective="", classes=(), codes=np.full(len(obs), -1, dtype=np.int64))


def score_embedding(
    obs: pd.DataFrame, config: EmbeddingConfig, embedding: F32, before: F32, seed: int
) -> dict[str, float]:
    """The metrics of scIB (bio part alone without two batches), scGPT's means, and the probes.

    Args:
        obs: N cells in ascending order of their ids, with the label and the batch column.
        config: the task's section.
        embedding: (N, D).
        before: (N, P) principal components of the same cells.
        seed: of KMeans and Leiden.

    Raises:
        DataError: as in :func:`cellray.tasks._embedded.score_cells`.
    """
    batches = column_texts(obs[config.batch]) if config.batch else None
    labels = labels_of(obs[config.label], config.ignore_labels)
    return score_cells(embedding, labels, batches, before, seed=seed)


TASK = Task(
    name="embedding",
    config=EmbeddingConfig,
    needs=(EmbedsCells,),
    columns=_columns,
    split=embedding_split,
    fit=_nothing_to_learn,
    headline="avg_bio.scgpt_leiden.v1",
    compulsory=(
        "majority",
        "logistic",
        "pca",
        "hvg",
        "harmony",
        "random_projection",
        "noise",
        "celltype_jitter",
    ),
    answers="embedding",
    score_embedding=score_embedding,
)
