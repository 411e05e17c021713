"""Generative value prediction: hide the values of part of a cell's genes and predict them.

scGPT's pretraining (doi:10.1038/s41592-024-02201-0): a share r of the genes, drawn from a short
list, is unknown to the model, which attends from them to the known ones (and to themselves) only.
The loss sums squared errors of the value (the bin) at the unknown genes: predicted from the token
(GEP), from the cell embedding (GEPC), and, once training has settled, from a second pass prompted
by the cell embedding.

Here r is drawn per cell, not per batch, and every draw is keyed by (seed, epoch, cell, token): a
cell is hidden alike in every batch. Of n genes ``floor(r * n + 0.5)`` are unknown, at least one;
specials are always known.

Legend: B cells, T tokens, M unknown tokens of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.data.vocab import Vocab
from cellray.objectives._keyed import (
    gene_positions,
    is_gene_table,
    missing_prediction,
    smallest_of_each_cell,
)
from cellray.objectives.base import Loss, ObjectiveConfig, ObjectiveUnit

__all__ = ["OBJECTIVE", "Generative", "GenerativeConfig"]

# Part of the loss -> prediction it reads; the third is there only in batches with cell_prompt.
_TERMS = {
    "gep": "expression",
    "gepc": "expression_from_cell",
    "cell_prompt": "expression_cell_prompt",
}


class GenerativeConfig(ObjectiveConfig):
    """What is hidden.

    Attributes:
        name: ``generative``.
        mask_ratios: shares of a cell's genes to hide; each cell draws one, each epoch anew.
        cell_prompt_after_steps: optimizer step from which the second pass is trained, too; 0 from
            the start. Batches outside training have step 0: their loss has the first two terms
            unless this is 0.
    """

    name: str = "generative"
    mask_ratios: list[float] = Field(default=[0.25, 0.5, 0.75], min_length=1)
    cell_prompt_after_steps: int = Field(default=1000, ge=0)

    @field_validator("mask_ratios")
    @classmethod
    def _ratios_are_shares(cls, ratios: list[float]) -> list[float]:
        if any(not 0.0 < ratio < 1.0 for ratio in ratios):
            raise ValueError(f"mask_ratios = {ratios}: each must be above 0 and below 1")
        return ratios


@dataclass(frozen=True)
class Generative:
    """See the module; built by ``OBJECTIVE.build``.

    Attributes:
        config: what is hidden.
        is_gene: (tokens,) True at gene tokens.
    """

    config: GenerativeConfig
    is_gene: npt.NDArray[np.bool_]

    def corrupt(self, batch: CellBatch, draw: Draw) -> CellBatch:
        """Hide values; targets are the true values; hidden ones become 0.

        ``targets`` are (B, T) float32, or (P,) of a packed batch.
        """
        genes = gene_positions(batch, self.is_gene)
        unknown = torch.from_numpy(self._choose(batch, genes, draw))
        return replace(
            batch,
            values=batch.values.masked_fill(unknown, 0.0),
            targets=batch.values,
            target_mask=unknown,
            unknown_mask=unknown,
            cell_prompt=batch.step >= self.config.cell_prompt_after_steps,
        )

    def _choose(
        self, batch: CellBatch, genes: npt.NDArray[np.bool_], draw: Draw
    ) -> npt.NDArray[np.bool_]:
        """Of ``token_ids``' shape, True at the genes with the smallest draws of their cell."""
        ratios = np.array(self.config.mask_ratios)
        pick = draw.uniform("generative.ratio", batch.cell_ids.numpy()) * len(ratios)
        ratio_B = ratios[pick.astype(np.int64)]

        def wanted(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            rounded = np.floor(ratio_B * lengths + 0.5).astype(np.int64)
            return np.minimum(np.maximum(rounded, 1), lengths)

        chosen, _, _ = smallest_of_each_cell(
            batch, genes, draw, stream="generative.genes", wanted=wanted
        )
        unknown = np.zeros(genes.shape, dtype=bool)
        unknown.reshape(-1)[chosen] = True
        return unknown

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        """Summed squared errors over the unknown genes; parts ``gep``, ``gepc``, ``cell_prompt``.

        Raises:
            DataError: the model lacks one of the predictions.
        """
        assert batch.targets is not None, "corrupt() sets the targets"
        assert batch.target_mask is not None, "corrupt() sets the targets"
        targets_M = batch.targets[batch.target_mask].float()
        parts = {}
        for part, name in _TERMS.items():
            if part == "cell_prompt" and not batch.cell_prompt:
                parts[part] = targets_M.new_zeros(())
                continue
            if name not in output.predictions:
                raise missing_prediction("generative", name, sorted(output.predictions))
            parts[part] = (output.predictions[name].float() - targets_M).square().sum()
        total = torch.stack(list(parts.values())).sum()
        return Loss(total, len(targets_M), {name: part.detach() for name, part in parts.items()})


def _build(config: GenerativeConfig, vocab: Vocab) -> Generative:
    """Raises DataError if the vocabulary has no ``<cls>``, whose output stands for the cell."""
    vocab.special("<cls>")
    return Generative(config=config, is_gene=is_gene_table(vocab))


OBJECTIVE = ObjectiveUnit(name="generative", config=GenerativeConfig, build=_build)
