"""Masked bins: hide the bins of part of a cell's expressed genes and name them from the others.

scBERT's pretraining (doi:10.1038/s42256-022-00534-z and its published code): of a cell's genes with
a bin above 0, ``ceil(fraction * n)`` are chosen; of those 90 % are hidden and 10 % stay as they
are; the loss is the cross-entropy over bins at the chosen genes. Bin 0 is never chosen.

Every draw is keyed by (seed, epoch, cell, token).

Legend: B cells, T tokens, M chosen tokens of a batch, C classes of bins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch.nn import functional

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.data.vocab import Vocab
from cellray.objectives._keyed import (
    gene_positions,
    is_gene_table,
    missing_prediction,
    smallest_of_each_cell,
)
from cellray.objectives.base import Load, Loss, ObjectiveConfig, ObjectiveUnit

__all__ = ["OBJECTIVE", "MaskedBins", "MaskedBinsConfig"]


class MaskedBinsConfig(ObjectiveConfig):
    """What is chosen and what becomes of it.

    Attributes:
        name: ``masked_bins``.
        fraction: share of a cell's expressed genes that is chosen, rounded up.
        keep_fraction: share of the chosen that stays visible.
    """

    name: str = "masked_bins"
    fraction: float = Field(default=0.15, gt=0.0, le=1.0)
    keep_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)


@dataclass(frozen=True)
class MaskedBins:
    """See the module; built by ``OBJECTIVE.build``.

    Attributes:
        config: rates.
        is_gene: (tokens,) True at gene tokens.
    """

    config: MaskedBinsConfig
    is_gene: npt.NDArray[np.bool_]

    def corrupt(self, batch: CellBatch, draw: Draw) -> CellBatch:
        """Hide bins: ``unknown_mask`` at hidden genes, whose values become 0.

        ``targets`` are the true bins, (B, T) float32, or (P,) of a packed batch.
        """
        expressed = gene_positions(batch, self.is_gene) & (batch.values.numpy() > 0)
        chosen, rows, tokens = smallest_of_each_cell(
            batch,
            expressed,
            draw,
            stream="masked_bins.select",
            wanted=lambda lengths: np.ceil(self.config.fraction * lengths).astype(np.int64),
        )
        cells = batch.cell_ids.numpy()[rows]
        stays = draw.uniform("masked_bins.action", cells, tokens) < self.config.keep_fraction
        selected = np.zeros(expressed.shape, dtype=bool)
        selected.reshape(-1)[chosen] = True
        hidden = np.zeros(expressed.shape, dtype=bool)
        hidden.reshape(-1)[chosen[~stays]] = True
        unknown = torch.from_numpy(hidden)
        return replace(
            batch,
            values=batch.values.masked_fill(unknown, 0.0),
            targets=batch.values,
            target_mask=torch.from_numpy(selected),
            unknown_mask=unknown,
        )

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        """Summed cross-entropy over the chosen genes; part ``accuracy`` counts the right ones.

        Raises:
            DataError: the model gives no ``bin_logits``.
        """
        if "bin_logits" not in output.predictions:
            raise missing_prediction("masked_bins", "bin_logits", sorted(output.predictions))
        assert batch.targets is not None, "corrupt() sets the targets"
        assert batch.target_mask is not None, "corrupt() sets the targets"
        logits_MC = output.predictions["bin_logits"].float()
        targets_M = batch.targets[batch.target_mask].long()
        total = functional.cross_entropy(logits_MC, targets_M, reduction="sum")
        right = (logits_MC.detach().argmax(-1) == targets_M).sum()
        return Loss(total, len(targets_M), {"accuracy": right.float()})


def _build(config: MaskedBinsConfig, vocab: Vocab) -> MaskedBins:
    return MaskedBins(config=config, is_gene=is_gene_table(vocab))


def _load(config: MaskedBinsConfig, tokens: float, num_genes: int) -> Load:
    chosen = config.fraction * tokens
    return Load(targets=chosen, hidden=chosen * (1 - config.keep_fraction))


OBJECTIVE = ObjectiveUnit(
    name="masked_bins", config=MaskedBinsConfig, build=_build, load=_load, metrics=("accuracy",)
)
