"""Cell classification: one known label a cell, nothing hidden.

Legend: B cells, C classes, L labelled cells of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.core.errors import DataError
from cellray.data.vocab import Vocab
from cellray.objectives._keyed import missing_prediction
from cellray.objectives.base import Loss, ObjectiveConfig, ObjectiveUnit

__all__ = ["LABEL", "OBJECTIVE", "Classification", "ClassificationConfig"]

LABEL = "label"


class ClassificationConfig(ObjectiveConfig):
    """Cross-entropy over the cells' classes.

    Attributes:
        name: ``classification``.
    """

    name: str = "classification"


@dataclass(frozen=True)
class Classification:
    """Reads class codes from the covariate ``label``; -1 is a cell without a label."""

    config: ClassificationConfig

    def corrupt(self, batch: CellBatch, draw: Draw) -> CellBatch:
        """Targets are the class codes, (B,) int64; unlabelled cells are not counted.

        Raises:
            DataError: the batch carries no labels.
        """
        if LABEL not in batch.covariates:
            raise DataError(
                f"objective 'classification' needs the covariate '{LABEL}'; the batch carries "
                f"{sorted(batch.covariates) or 'none'}: name the label column of the task"
            )
        labels = batch.covariates[LABEL].long()
        return replace(batch, targets=labels, target_mask=labels >= 0)

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        """Summed cross-entropy over labelled cells; part ``accuracy`` counts the right ones.

        Raises:
            DataError: the model gives no ``class_logits``.
        """
        if "class_logits" not in output.predictions:
            raise missing_prediction("classification", "class_logits", sorted(output.predictions))
        assert batch.targets is not None, "corrupt() sets the targets"
        assert batch.target_mask is not None, "corrupt() sets the targets"
        logits_LC = output.predictions["class_logits"].float()[batch.target_mask]
        targets_L = batch.targets[batch.target_mask]
        total = functional.cross_entropy(logits_LC, targets_L, reduction="sum")
        right = (logits_LC.detach().argmax(-1) == targets_L).sum()
        return Loss(total, len(targets_L), {"accuracy": right.float()})

    def tally(self, output: ModelOutput, batch: CellBatch) -> torch.Tensor:
        """Labelled cells by (true class, predicted class), (C, C) int64."""
        assert batch.targets is not None, "corrupt() sets the targets"
        assert batch.target_mask is not None, "corrupt() sets the targets"
        logits_LC = output.predictions["class_logits"][batch.target_mask]
        targets_L, classes = batch.targets[batch.target_mask], logits_LC.shape[-1]
        pairs_L = targets_L * classes + logits_LC.argmax(-1)
        return torch.bincount(pairs_L, minlength=classes**2).view(classes, classes)

    def judged(self, tally: torch.Tensor) -> dict[str, float]:
        """``macro_f1``: the mean F1 over classes in truth or prediction, as macro_f1.union.v1."""
        right_C = tally.diagonal()
        either_C = tally.sum(0) + tally.sum(1)
        there_C = either_C > 0
        if not bool(there_C.any()):
            return {"macro_f1": 0.0}
        return {"macro_f1": float((2 * right_C[there_C] / either_C[there_C]).mean())}


def _build(config: ClassificationConfig, vocab: Vocab) -> Classification:
    return Classification(config)


OBJECTIVE = ObjectiveUnit(
    name="classification",
    config=ClassificationConfig,
    build=_build,
    supervised=True,
    metrics=("accuracy", "macro_f1"),
)
