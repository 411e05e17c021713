"""Masked gene modelling: hide 15 % of a cell's genes and name them from their neighbours.

BERT's recipe over gene ids, as Geneformer uses it (doi:10.1038/s41586-023-06139-9): of the selected
tokens 80 % become ``<mask>``, 10 % a random gene, 10 % stay. Specials are never selected and never
put in a gene's place (the original could do both in its second version).

Every draw is keyed by (seed, epoch, cell, token), so a cell is hidden alike in every batch. A cell
of few genes may have none selected.

Legend: B cells, T tokens, M selected tokens of a batch, V vocabulary tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch.nn import functional

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.data.vocab import Vocab
from cellray.objectives._keyed import gene_positions, is_gene_table, missing_prediction
from cellray.objectives.base import Load, Loss, ObjectiveConfig, ObjectiveUnit

__all__ = ["OBJECTIVE", "Masked", "MaskedConfig"]


class MaskedConfig(ObjectiveConfig):
    """What is selected and what becomes of it.

    Attributes:
        name: ``masked``.
        fraction: share of a cell's genes that is selected, each on its own.
        mask_fraction: share of the selected that becomes ``<mask>``.
        random_fraction: share of the selected that becomes a random gene; the rest stays.
    """

    name: str = "masked"
    fraction: float = Field(default=0.15, gt=0.0, le=1.0)
    mask_fraction: float = Field(default=0.8, ge=0.0, le=1.0)
    random_fraction: float = Field(default=0.1, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _fractions_fit(self) -> MaskedConfig:
        if self.mask_fraction + self.random_fraction > 1.0 + 1e-9:
            raise ValueError(
                f"mask_fraction = {self.mask_fraction} and random_fraction = "
                f"{self.random_fraction} add up to more than 1"
            )
        return self


@dataclass(frozen=True)
class Masked:
    """See the module; built by ``OBJECTIVE.build``.

    Attributes:
        config: rates.
        mask_token: token id of ``<mask>``.
        gene_tokens: (G,) int32 token ids that a random replacement is drawn from.
        is_gene: (V,) True at gene tokens.
    """

    config: MaskedConfig
    mask_token: int
    gene_tokens: npt.NDArray[np.int32]
    is_gene: npt.NDArray[np.bool_]

    def corrupt(self, batch: CellBatch, draw: Draw) -> CellBatch:
        """Select and hide genes; targets are the true token ids, (B, T) or packed (P,) int64."""
        places = np.flatnonzero(gene_positions(batch, self.is_gene))
        tokens = batch.token_ids.numpy().reshape(-1)[places]
        cells = batch.cell_ids.numpy()[batch.token_rows().numpy().reshape(-1)[places]]
        chosen = draw.uniform("masked.select", cells, tokens) < self.config.fraction
        places, tokens, cells = places[chosen], tokens[chosen], cells[chosen]
        action = draw.uniform("masked.action", cells, tokens)
        replaced = draw.uniform("masked.token", cells, tokens) * len(self.gene_tokens)
        random = self.gene_tokens[replaced.astype(np.int64)]
        to_mask = action < self.config.mask_fraction
        to_random = ~to_mask & (action < self.config.mask_fraction + self.config.random_fraction)
        hidden = batch.token_ids.numpy().copy()
        hidden.reshape(-1)[places] = np.where(
            to_mask, self.mask_token, np.where(to_random, random, tokens)
        )
        selected = np.zeros(hidden.shape, dtype=bool)
        selected.reshape(-1)[places] = True
        return replace(
            batch,
            token_ids=torch.from_numpy(hidden),
            targets=batch.token_ids,
            target_mask=torch.from_numpy(selected),
        )

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        """Summed cross-entropy over the selected genes; part ``accuracy`` counts the right ones.

        Raises:
            DataError: the model gives no ``token_logits``.
        """
        if "token_logits" not in output.predictions:
            raise missing_prediction("masked", "token_logits", sorted(output.predictions))
        assert batch.targets is not None, "corrupt() sets the targets"
        assert batch.target_mask is not None, "corrupt() sets the targets"
        logits_MV = output.predictions["token_logits"].float()
        targets_M = batch.targets[batch.target_mask]
        total = functional.cross_entropy(logits_MV, targets_M, reduction="sum")
        right = (logits_MV.detach().argmax(-1) == targets_M).sum()
        return Loss(total, len(targets_M), {"accuracy": right.float()})


def _build(config: MaskedConfig, vocab: Vocab) -> Masked:
    """Raises DataError if the vocabulary has no ``<mask>``."""
    return Masked(
        config=config,
        mask_token=vocab.special("<mask>"),
        gene_tokens=vocab.gene_tokens,
        is_gene=is_gene_table(vocab),
    )


def _load(config: MaskedConfig, tokens: float, num_genes: int) -> Load:
    return Load(targets=config.fraction * tokens)


OBJECTIVE = ObjectiveUnit(
    name="masked", config=MaskedConfig, build=_build, load=_load, metrics=("accuracy",)
)
