"""ComBat on log-normalised variable genes, then principal components.

Johnson, Li, Rabinovic 2007 (doi:10.1093/biostatistics/kxj037), without covariates. A corrected gene
is an affine function of the gene within each batch, so nothing of size cells x genes is ever made
dense: means, variances and covariances of the batches are all that is needed.

The choice of genes comes from the cells fitted on, and so do the principal axes. The shift and
spread of a batch can only come from its own cells, so query cells take part in these: with their
counts and batches, never with labels.

Legend: N cells, K genes, B batches, P components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.baselines._features import ComponentConfig, Components, components_of, fit_genes
from cellray.baselines.base import BaselineUnit, CellCounts
from cellray.core.errors import DataError

__all__ = ["BASELINE", "BatchAdjustment", "CombatConfig", "fit_adjustment"]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_TOLERANCE = 1e-10  # relative, of the last round
_MAX_ROUNDS = 1000


class CombatConfig(ComponentConfig):
    """The keys of the genes and of the components."""

    name: str = "combat"


@dataclass(frozen=True)
class BatchAdjustment:
    """Fitted: corrected gene = factor x gene + offset, by batch.

    Shapes:
        factor, offset: (B, K).
    """

    factor: F64
    offset: F64

    def components(self, genes: sparse.csr_matrix, batches: I64, wanted: int) -> Components:
        """Principal components of corrected cells.

        Args:
            genes: (N, K) of the cells before correction.
            batches: (N,) rows of ``factor``.
            wanted: components wanted.
        """
        num, width = genes.shape
        products, total = np.zeros((width, width)), np.zeros(width)
        for batch in np.unique(batches):
            part = genes[batches == batch].astype(np.float64)
            factor, offset = self.factor[batch], self.offset[batch]
            sums = np.asarray(part.sum(axis=0), dtype=np.float64).ravel() * factor
            cross = np.outer(sums, offset)
            products += (part.T @ part).toarray() * np.outer(factor, factor) + cross + cross.T
            products += part.shape[0] * np.outer(offset, offset)
            total += sums + part.shape[0] * offset
        return components_of(products, total / num, num, wanted)

    def project(self, genes: sparse.csr_matrix, batches: I64, components: Components) -> F32:
        """(N, K) cells before correction -> (N, P) coordinates of corrected cells."""
        found = np.empty((genes.shape[0], components.axes.shape[1]), dtype=np.float32)
        for batch in np.unique(batches):
            rows = np.flatnonzero(batches == batch)
            axes = components.axes * self.factor[batch][:, None]
            shift = (self.offset[batch] - components.mean) @ components.axes
            found[rows] = genes[rows] @ axes + shift
        return found


def _shrunk(means: F64, variances: F64, num: int) -> tuple[F64, F64]:
    """Empirical Bayes estimates of the shift and variance of one batch, gene by gene.

    Equations 3.1 and 3.2 of the paper, to convergence; priors by moments over genes.

    Args:
        means: (K,) of the standardised genes in the batch.
        variances: (K,) likewise, n - 1.
        num: n, cells of the batch, 2 at least.

    Returns:
        (K,) shifts and (K,) variances.
    """
    centre, spread = float(means.mean()), float(means.var(ddof=1))
    middle = float(variances.mean())
    about = max(float(variances.var(ddof=1)), 1e-12 * middle**2, 1e-300)  # 0: a batch of zeros
    shape = 2.0 + middle**2 / about
    scale = middle * (shape - 1.0)
    shift, variance = means, variances
    for _ in range(_MAX_ROUNDS):
        weight = num * spread
        moved = (weight * means + variance * centre) / np.maximum(weight + variance, 1e-300)
        squares = (num - 1) * variances + num * (means - moved) ** 2
        changed = (scale + squares / 2.0) / (num / 2.0 + shape - 1.0)
        step = max(np.abs(moved - shift).max(), np.abs(changed - variance).max())
        shift, variance = moved, changed
        if step <= _TOLERANCE * max(1.0, float(np.abs(shift).max()), float(variance.max())):
            break
    return shift, variance


def fit_adjustment(cells: sparse.csr_matrix, batches: I64, num_batches: int) -> BatchAdjustment:
    """Shift and spread of every batch.

    A gene that varies in no batch is set to its mean; a batch of one cell is shifted only.

    Args:
        cells: (N, K) genes, log-normalised.
        batches: (N,) codes below ``num_batches``.
        num_batches: B; a code without cells gets factor 1, offset 0.

    Raises:
        DataError: fewer than two genes vary within batches.
    """
    num, width = cells.shape
    exact = cells.astype(np.float64)
    shape = (num_batches, num)
    members = sparse.csr_matrix((np.ones(num), (batches, np.arange(num))), shape=shape)
    sizes = np.bincount(batches, minlength=num_batches).astype(np.float64)[:, None]
    means = (members @ exact).toarray() / np.maximum(sizes, 1.0)
    squares = (members @ exact.multiply(exact)).toarray() / np.maximum(sizes, 1.0)
    within = np.maximum(squares - means**2, 0.0)  # (B, K) variances, n
    grand = (sizes * means).sum(axis=0) / num
    pooled = (sizes * within).sum(axis=0) / num
    varies = pooled > 1e-12 * np.maximum((sizes * squares).sum(axis=0) / num, 1e-300)
    if varies.sum() < 2:
        raise DataError(
            f"baseline 'combat' needs genes that vary within batches, and {int(varies.sum())} of "
            f"{width} do; check the batch column, or leave the baseline out"
        )
    deviation = np.sqrt(pooled[varies])
    factor, offset = np.ones((num_batches, width)), np.zeros((num_batches, width))
    for batch in np.flatnonzero(sizes[:, 0]):
        count = int(sizes[batch, 0])
        standard = (means[batch, varies] - grand[varies]) / deviation
        shift, variance = standard, np.ones(int(varies.sum()))
        if count > 1:
            spread = within[batch, varies] / pooled[varies] * count / (count - 1)
            shift, variance = _shrunk(standard, spread, count)
        slope = 1.0 / np.sqrt(np.where(variance > 0, variance, 1.0))
        factor[batch, varies] = slope
        offset[batch, varies] = grand[varies] - (grand[varies] + shift * deviation) * slope
        factor[batch, ~varies], offset[batch, ~varies] = 0.0, grand[~varies]
    return BatchAdjustment(factor, offset)


def _embed(
    config: CombatConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    assert cells.batches is not None
    every = cells.batches
    if query is not None:
        assert query.batches is not None
        every = np.concatenate([every, query.batches])
    names, codes = np.unique(every, return_inverse=True)
    genes = fit_genes(cells.counts, config, cells.batches)
    first = genes.apply(cells.counts)
    second = None if query is None else genes.apply(query.counts)
    together = first if second is None else sparse.csr_matrix(sparse.vstack([first, second]))
    adjustment = fit_adjustment(together, codes, len(names))
    num = cells.num_cells
    components = adjustment.components(first, codes[:num], config.num_components)
    reference = adjustment.project(first, codes[:num], components)
    if second is None:
        return reference, None
    return reference, adjustment.project(second, codes[num:], components)


BASELINE = BaselineUnit(
    name="combat",
    config=CombatConfig,
    embed=_embed,
    answers=("labels", "embedding"),
    transductive=True,
    needs_batches=True,
    seed_scope="",
    title="ComBat on 2,000 variable genes, then 50 principal components",
    revision=2,  # genes that vary within batches
)
