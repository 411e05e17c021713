"""Read-depth-aware value prediction (RDA): lower a cell's depth, hide values, predict the original.

scFoundation's pretraining (doi:10.1038/s41592-024-02305-7). A hierarchical draw decides per cell
whether its counts are thinned: a gate, then a share p, then a binomial draw a gene. ``<T>`` holds
the log10 of the raw total, ``<S>`` of the thinned one; both vectors are log-normalised. Of the
values that are left 30 % are chosen, of the zeros 3 %; of the chosen 80 % are hidden, 10 % become
the value of another gene of the cell, 10 % stay. The loss is the squared error to the raw cell's
values at the chosen genes.

The article does not print the distribution of the draw (its Supplementary Note 9 does): gate 1/2,
Beta(2, 2) and cells above 1,000 counts are this project's defaults, not facts, and all of them are
keys. That 80/10/10 is done to chosen values is read from the names in the published configuration.

Every draw is keyed by (seed, epoch, cell, gene token).

Legend: B cells, T tokens, G genes, Z gene tokens of a batch, M chosen genes of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from cellray.core.batch import CellBatch, ModelOutput, unpack
from cellray.core.draw import Draw
from cellray.core.errors import ConfigError
from cellray.core.packing import Packing
from cellray.data.vocab import Vocab
from cellray.objectives._keyed import is_gene_table, missing_prediction
from cellray.objectives.base import Load, Loss, ObjectiveConfig, ObjectiveUnit

__all__ = ["OBJECTIVE", "Depth", "DepthObjectiveConfig"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
_TARGET_SUM = 10_000.0


class DepthObjectiveConfig(ObjectiveConfig):
    """The draw of the read depth, and what is hidden.

    Attributes:
        name: ``depth``.
        thin_probability: share of cells (of enough counts) whose depth is lowered.
        beta_a: first parameter of the Beta distribution of the kept share of counts.
        beta_b: its second parameter.
        min_counts: cells with no more counts than this are never thinned.
        value_fraction: share of a cell's values above 0 that is chosen.
        zero_fraction: share of its zeros that is chosen; 0.03 in the published configuration.
        mask_fraction: share of the chosen that is hidden.
        random_fraction: share of the chosen that takes the value of another gene of the cell.
    """

    name: str = "depth"
    thin_probability: float = Field(default=0.5, ge=0.0, le=1.0)
    beta_a: float = Field(default=2.0, gt=0.0)
    beta_b: float = Field(default=2.0, gt=0.0)
    min_counts: float = Field(default=1_000.0, ge=0.0)
    value_fraction: float = Field(default=0.3, gt=0.0, le=1.0)
    zero_fraction: float = Field(default=0.03, ge=0.0, le=1.0)
    mask_fraction: float = Field(default=0.8, ge=0.0, le=1.0)
    random_fraction: float = Field(default=0.1, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _fractions_fit(self) -> DepthObjectiveConfig:
        if self.mask_fraction + self.random_fraction > 1.0 + 1e-9:
            raise ValueError(
                f"mask_fraction = {self.mask_fraction} and random_fraction = "
                f"{self.random_fraction} add up to more than 1"
            )
        return self


@dataclass
class _Cells:
    """The real tokens of a batch laid end to end, as arrays."""

    cells: I64  # (B,) cell ids
    rows: I64  # of each token
    tokens: I64
    values: npt.NDArray[np.float32]
    genes: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, batch: CellBatch, is_gene: npt.NDArray[np.bool_]) -> _Cells:
        real = batch.attention_mask.numpy().reshape(-1)
        tokens = batch.token_ids.numpy().reshape(-1)[real]
        return cls(
            cells=batch.cell_ids.numpy(),
            rows=batch.token_rows().numpy().reshape(-1)[real],
            tokens=tokens,
            values=batch.values.numpy().reshape(-1)[real],
            genes=is_gene[tokens],
        )


@dataclass(frozen=True)
class Depth:
    """See the module; built by ``OBJECTIVE.build``.

    Attributes:
        config: draw and rates.
        vocab: a panel with ``<T>`` and ``<S>``.
        is_gene: (tokens,) True at gene tokens.
    """

    config: DepthObjectiveConfig
    vocab: Vocab
    is_gene: npt.NDArray[np.bool_]

    def corrupt(self, batch: CellBatch, draw: Draw) -> CellBatch:
        """Thin, choose and hide; chosen zeros join the batch as tokens, behind the cell's others.

        ``targets`` are the raw cell's log-normalised values, float32 of ``token_ids``' new shape.
        """
        cells = _Cells.of(batch, self.is_gene)
        inputs, totals, thinned = self.lower_depth(cells, draw)
        whole = self.is_whole(cells, totals)
        depths = {"<T>": totals, "<S>": thinned}
        values = inputs.copy()
        for name, sums in depths.items():
            here = cells.tokens == self.vocab.special(name)
            values[here] = np.log10(np.maximum(sums, 1.0))[cells.rows[here]]
        extra_rows, extra_tokens, chosen = self._choose(cells, inputs, draw, whole)
        rows = np.concatenate([cells.rows, extra_rows])
        tokens = np.concatenate([cells.tokens, extra_tokens])
        selected = np.concatenate([chosen, np.ones(len(extra_rows), dtype=bool)])
        targets = np.concatenate([cells.values, np.zeros(len(extra_rows), dtype=np.float32)])
        values = np.concatenate([values, np.zeros(len(extra_rows), dtype=np.float32)])
        hidden, values = self._hide(cells, inputs, rows, tokens, values, selected, draw)
        order = np.argsort(rows, kind="stable")
        arrays = {
            "token_ids": tokens,
            "values": values,
            "targets": targets,
            "target_mask": selected,
            "unknown_mask": hidden,
            "attention_mask": np.ones(len(rows), dtype=bool),
        }
        flat: dict[str, Any] = {
            name: torch.from_numpy(array[order]) for name, array in arrays.items()
        }
        packing = Packing.of(np.bincount(rows, minlength=len(batch)))
        packed = replace(batch, packing=packing, **flat)
        return packed if batch.packing is not None else unpack(packed, pad=self.vocab.pad)

    def lower_depth(self, cells: _Cells, draw: Draw) -> tuple[npt.NDArray[np.float32], F64, F64]:
        """Values of all tokens at the drawn depth, and the totals (B,) before and after."""
        from cellray.core._thinning import thin

        ids = cells.cells
        source = np.zeros(len(ids))
        here = cells.tokens == self.vocab.special("<S>")
        source[cells.rows[here]] = cells.values[here]
        rows = cells.rows[cells.genes]
        # The tokens are log-normalised counts: with the total they give the counts back.
        scaled = np.expm1(cells.values[cells.genes].astype(np.float64))
        counts = np.rint(scaled * 10.0 ** source[rows] / _TARGET_SUM).astype(np.int64)
        seen = np.bincount(rows, weights=counts, minlength=len(ids))
        # Exact totals where all counts are seen; a cell cut to max_tokens has more than it shows.
        near = np.abs(10.0**source - seen) <= 1e-4 * seen + 0.5
        totals = np.where(near, seen, 10.0**source)
        share = self._shares(ids, totals, draw)
        bits = draw.bits("depth.thin", ids[rows], cells.tokens[cells.genes])
        kept = thin(counts, share[rows], bits)
        after = np.bincount(rows, weights=kept, minlength=len(ids)) + share * (totals - seen)
        inputs = np.zeros(len(cells.tokens), dtype=np.float32)
        lowered = share < 1
        divisors = np.where(after > 0, after, 1.0) / _TARGET_SUM
        changed = np.log1p(kept / divisors[rows])
        inputs[cells.genes] = np.where(lowered[rows], changed, cells.values[cells.genes])
        return inputs, totals, np.where(lowered, after, totals)

    def is_whole(self, cells: _Cells, totals: F64) -> npt.NDArray[np.bool_]:
        """(B,) True where all of a cell's counts are among its tokens.

        A cell that was cut to ``tokenizer.max_tokens`` expresses genes that are no tokens; they are
        not its zeros.
        """
        genes = cells.genes
        scaled = np.expm1(cells.values[genes].astype(np.float64))
        seen = np.bincount(cells.rows[genes], weights=scaled, minlength=len(totals))
        return np.asarray(seen > _TARGET_SUM * (1 - 1e-4))

    def _shares(self, ids: I64, totals: F64, draw: Draw) -> F64:
        """(B,) share of the counts each cell keeps; 1 for cells that stay as they are."""
        from scipy.special import betaincinv

        config = self.config
        gate = draw.uniform("depth.gate", ids) < config.thin_probability
        share = betaincinv(config.beta_a, config.beta_b, draw.uniform("depth.share", ids))
        return np.where(gate & (totals > config.min_counts), share, 1.0)

    def _choose(
        self,
        cells: _Cells,
        inputs: npt.NDArray[np.float32],
        draw: Draw,
        whole: npt.NDArray[np.bool_],
    ) -> tuple[I64, I64, npt.NDArray[np.bool_]]:
        """Rows and tokens of chosen zeros that have no token yet, and which tokens are chosen."""
        config, genes = self.config, self.vocab.gene_tokens.astype(np.int64)
        draws_BG = draw.uniform("depth.select", cells.cells[:, None], genes[None, :])
        column = np.zeros(self.vocab.num_tokens, dtype=np.int64)
        column[genes] = np.arange(len(genes))
        rows, columns = cells.rows[cells.genes], column[cells.tokens[cells.genes]]
        expressed = inputs[cells.genes] > 0
        rate = np.where(expressed, config.value_fraction, config.zero_fraction)
        chosen = np.zeros(len(cells.tokens), dtype=bool)
        chosen[cells.genes] = draws_BG[rows, columns] < rate
        free = draws_BG < config.zero_fraction
        free[rows, columns] = False
        empty = np.bincount(rows, minlength=len(cells.cells)) == 0  # nothing to learn from
        free[empty | ~whole] = False
        extra_rows, extra_columns = np.nonzero(free)
        return extra_rows, genes[extra_columns], chosen

    def _hide(
        self,
        cells: _Cells,
        inputs: npt.NDArray[np.float32],
        rows: I64,
        tokens: I64,
        values: npt.NDArray[np.float32],
        selected: npt.NDArray[np.bool_],
        draw: Draw,
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Which tokens are hidden, and all values with hidden ones 0 and random ones replaced."""
        config = self.config
        where = np.flatnonzero(selected)
        ids = cells.cells[rows[where]]
        action = draw.uniform("depth.action", ids, tokens[where])
        to_mask = action < config.mask_fraction
        to_random = ~to_mask & (action < config.mask_fraction + config.random_fraction)
        hidden = np.zeros(len(rows), dtype=bool)
        hidden[where[to_mask]] = True
        values[hidden] = 0.0
        pool = np.flatnonzero(cells.genes & (inputs > 0))  # cell by cell
        lengths = np.bincount(cells.rows[pool], minlength=len(cells.cells))
        starts = np.cumsum(lengths) - lengths
        some = where[to_random][lengths[rows[where[to_random]]] > 0]
        pick = draw.uniform("depth.value", cells.cells[rows[some]], tokens[some])
        source = starts[rows[some]] + (pick * lengths[rows[some]]).astype(np.int64)
        values[some] = inputs[pool[source]]
        return hidden, values

    def loss(self, output: ModelOutput, batch: CellBatch) -> Loss:
        """Summed squared errors over the chosen genes; part ``expressed``: those above 0.

        Raises:
            DataError: the model gives no ``expression``.
        """
        if "expression" not in output.predictions:
            raise missing_prediction("depth", "expression", sorted(output.predictions))
        assert batch.targets is not None, "corrupt() sets the targets"
        assert batch.target_mask is not None, "corrupt() sets the targets"
        targets_M = batch.targets[batch.target_mask].float()
        errors_M = (output.predictions["expression"].float() - targets_M).square()
        part = (errors_M.detach() * (targets_M > 0)).sum()
        return Loss(errors_M.sum(), len(targets_M), {"expressed": part})


def _build(config: DepthObjectiveConfig, vocab: Vocab) -> Depth:
    """Raises DataError if the vocabulary lacks ``<T>`` or ``<S>``."""
    vocab.special("<T>")
    vocab.special("<S>")
    return Depth(config=config, vocab=vocab, is_gene=is_gene_table(vocab))


def _check(config: DepthObjectiveConfig, tokenizer: Mapping[str, Any]) -> None:
    """Raises ConfigError for tokens of bulk samples, which do not tell their counts."""
    if tokenizer.get("bulk"):
        raise ConfigError(
            "tokenizer.bulk = true is for embedding bulk samples: their S is no total count, which "
            "objective 'depth' needs to lower the read depth; set it to false to train"
        )


def _load(config: DepthObjectiveConfig, tokens: float, num_genes: int) -> Load:
    """As if no cell were lowered in depth, which leaves it fewer genes to read."""
    zeros = config.zero_fraction * max(num_genes - tokens, 0.0)
    chosen = config.value_fraction * tokens + zeros
    return Load(targets=chosen, hidden=config.mask_fraction * chosen, added=zeros)


OBJECTIVE = ObjectiveUnit(
    name="depth",
    config=DepthObjectiveConfig,
    build=_build,
    check=_check,
    load=_load,
    metrics=("expressed",),
)
