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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator
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

__all__ = ["OBJECTIVE", "Generative", "GenerativeConfig", "elastic_similarity"]

# Hidden values in the form that hides by value: no gene has it, the value encoder sees it as it is.
_HIDDEN_VALUE = -1.0
# Part of the loss -> prediction it reads; the third is there only in batches with cell_prompt.
_TERMS = {
    "gep": "expression",
    "gepc": "expression_from_cell",
    "cell_prompt": "expression_cell_prompt",
}
# The same, for models that say how likely a gene is expressed at all.
_EXPRESSED = {
    "expressed": "expressed_logit",
    "expressed_from_cell": "expressed_logit_from_cell",
}


class GenerativeConfig(ObjectiveConfig):
    """What is hidden.

    Attributes:
        name: ``generative``.
        mask_ratios: shares of a cell's genes to hide; each cell draws one, each epoch anew.
        cell_prompt_after_steps: optimizer step from which the second pass is trained, too; 0 from
            the start. Batches outside training have step 0: their loss has the first two terms
            unless this is 0.
        hide: ``attention``: a hidden gene carries a flag and is attended to by none but itself
            (pretraining); ``value``: its value is -1 and attention is full (fine-tuning).
        gep_weight: of the value predicted from the token.
        gepc_weight: of the value predicted from the cell.
        expressed_weight: of the likelihood of being expressed at all, where the model predicts it.
        ecs_weight: of elastic cell similarity; 10 in the integration recipe.
        ecs_threshold: cosine that pairs of cells are driven away from: above it together, below it
            apart; 0.8 in the code of the source, 0.6 in its text.
        dar_weight: of the batch discriminator on reversed gradients (``model.adversary``); 1 in
            the integration recipe.
    """

    name: str = "generative"
    mask_ratios: list[float] = Field(default=[0.25, 0.5, 0.75], min_length=1)
    cell_prompt_after_steps: int = Field(default=1000, ge=0)
    hide: Literal["attention", "value"] = "attention"
    gep_weight: float = Field(default=1.0, ge=0.0)
    gepc_weight: float = Field(default=1.0, ge=0.0)
    expressed_weight: float = Field(default=1.0, ge=0.0)
    ecs_weight: float = Field(default=0.0, ge=0.0)
    ecs_threshold: float = Field(default=0.8, ge=0.0, le=1.0)
    dar_weight: float = Field(default=0.0, ge=0.0)

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
        by_value = self.config.hide == "value"
        return replace(
            batch,
            values=batch.values.masked_fill(unknown, _HIDDEN_VALUE if by_value else 0.0),
            targets=batch.values,
            target_mask=unknown,
            unknown_mask=None if by_value else unknown,
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
            return np.asarray(np.minimum(np.maximum(rounded, 1), lengths), dtype=np.int64)

        chosen, _, _ = smallest_of_each_cell(
            batch, genes, draw, stream="generative.genes", wanted=wanted
        )
        unknown = np.zeros(genes.shape, dtype=bool)
        unknown.reshape(-1)[chosen] = True
        return unknown

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        """Weighted sum over the unknown genes; its parts are unweighted.

        Parts: squared errors ``gep``, ``gepc``, ``cell_prompt``; negative log likelihoods
        ``expressed``, ``expressed_from_cell``; ``dar``, a cell's cross-entropy as often as it has
        targets; ``ecs``, the mean over pairs of cells of the micro-batch, times its targets.

        Raises:
            DataError: the model lacks one of the predictions.
        """
        assert batch.targets is not None, "corrupt() sets the targets"
        assert batch.target_mask is not None, "corrupt() sets the targets"
        config, given = self.config, output.predictions
        targets_M = batch.targets[batch.target_mask].float()
        weights = {"gep": config.gep_weight, "gepc": config.gepc_weight, "cell_prompt": 1.0}
        parts: dict[str, torch.Tensor] = {}
        for part, name in _TERMS.items():
            absent = part == "cell_prompt" and not batch.cell_prompt
            if absent or (weights[part] == 0 and name not in given):
                parts[part] = targets_M.new_zeros(())
                continue
            parts[part] = (self._of(given, name).float() - targets_M).square().sum()
        for part, name in _EXPRESSED.items():
            if name in given:
                logits_M, there_M = given[name].float(), (targets_M > 0).float()
                parts[part] = functional.binary_cross_entropy_with_logits(
                    logits_M, there_M, reduction="sum"
                )
                weights[part] = config.expressed_weight
        if config.ecs_weight:
            parts["ecs"] = elastic_similarity(output.cell, config.ecs_threshold) * len(targets_M)
            weights["ecs"] = config.ecs_weight
        if config.dar_weight:
            logits_BC, codes_B = self._of(given, "batch_logits"), self._of(given, "batch_codes")
            told_B = functional.cross_entropy(logits_BC.float(), codes_B, reduction="none")
            rows_M = batch.token_rows()[batch.target_mask]
            parts["dar"] = (told_B * torch.bincount(rows_M, minlength=len(batch))).sum()
            weights["dar"] = config.dar_weight
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return Loss(total, len(targets_M), {name: part.detach() for name, part in parts.items()})

    @staticmethod
    def _of(given: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        if name not in given:
            raise missing_prediction("generative", name, sorted(given))
        return given[name]


def elastic_similarity(cell_BD: torch.Tensor, threshold: float) -> torch.Tensor:
    """Mean over all pairs (a cell with itself counts as cosine 0) of ``1 - (cos - threshold)^2``.

    Negative cosines count as 0: scGPT's elastic cell similarity, a scalar.
    """
    normed_BD = functional.normalize(cell_BD.float(), dim=1)
    cosine_BB = normed_BD @ normed_BD.T
    cosine_BB = torch.relu(cosine_BB * (1 - torch.eye(len(cosine_BB), device=cosine_BB.device)))
    return (1 - (cosine_BB - threshold).square()).mean()


def _build(config: GenerativeConfig, vocab: Vocab) -> Generative:
    """Raises DataError if the vocabulary has no ``<cls>``, whose output stands for the cell."""
    vocab.special("<cls>")
    return Generative(config=config, is_gene=is_gene_table(vocab))


def _load(config: GenerativeConfig, tokens: float, num_genes: int) -> Load:
    chosen = float(np.mean(config.mask_ratios)) * tokens
    hidden = 0.0 if config.hide == "value" else chosen
    return Load(targets=chosen, hidden=hidden, prompt_after=config.cell_prompt_after_steps)


OBJECTIVE = ObjectiveUnit(
    name="generative",
    config=GenerativeConfig,
    build=_build,
    load=_load,
    metrics=(*_TERMS, *_EXPRESSED, "ecs", "dar"),
)
