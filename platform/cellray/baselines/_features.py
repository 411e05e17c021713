"""The features that baselines share: log-normalised variable genes, and principal components.

As scanpy does them unless told otherwise: genes of the ``seurat`` flavor, within batches where an
embedding knows them, components of centred, unscaled genes (scaling to unit variance would make the
many barely detected genes as loud as the markers). Everything is fitted on training cells and
applied unchanged to others: the choice of genes, their scale, the components. All of it is exact
linear algebra without random numbers, so the same training cells give the same features whatever
the seed.

Legend: N cells, G genes of the data, K chosen genes, P components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import linalg, sparse
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from cellray.baselines.base import BaselineConfig, CellCounts, check_genes
from cellray.data.variable import Flavor, GeneMoments, choose_variable_by_batch

__all__ = [
    "ComponentConfig",
    "Components",
    "FeatureConfig",
    "GeneFeatures",
    "Projection",
    "components_of",
    "fit_components",
    "fit_genes",
    "fit_projection",
    "for_both",
    "log_normalise",
    "one_thread",
]

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_CLIP = 10.0  # in standard deviations: one outlier count may not own a decision


class FeatureConfig(BaselineConfig):
    """Keys of every baseline that works on variable genes.

    Attributes:
        num_genes: variable genes kept at most.
        target_sum: counts each cell is scaled to before log1p.
        min_cells: a gene counts as a candidate if at least this many training cells detect it.
        flavor: how genes of like mean are compared (:mod:`cellray.data.variable`).
    """

    num_genes: int = Field(default=2000, ge=1)
    target_sum: float = Field(default=1e4, gt=0)
    min_cells: int = Field(default=3, ge=1)
    flavor: Flavor = "seurat"


class ComponentConfig(FeatureConfig):
    """Keys of every baseline that works on principal components.

    Attributes:
        num_components: principal components, fewer if there are fewer cells or genes.
    """

    num_components: int = Field(default=50, ge=1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Linear algebra on one thread: more would add in another order, and crowd shared cores."""
    with threadpool_limits(limits=1):
        yield


def log_normalise(counts: sparse.csr_matrix, *, target_sum: float = 1e4) -> sparse.csr_matrix:
    """``log1p(counts / library size * target_sum)``; a cell without counts stays zero.

    Args:
        counts: (N, G) raw counts.
        target_sum: counts each cell is scaled to.

    Returns:
        (N, G) float64 csr.
    """
    sizes = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    factors = np.divide(target_sum, sizes, out=np.zeros_like(sizes), where=sizes > 0)
    result = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    result.data *= np.repeat(factors, np.diff(result.indptr))
    np.log1p(result.data, out=result.data)
    return result


def _deviations(matrix: sparse.csr_matrix) -> F64:
    """Standard deviation (n - 1) of each column, (K,)."""
    num = matrix.shape[0]
    mean = np.asarray(matrix.mean(axis=0), dtype=np.float64).ravel()
    square = np.asarray(matrix.multiply(matrix).mean(axis=0), dtype=np.float64).ravel()
    variance = np.maximum(square - mean**2, 0.0) * (num / max(num - 1, 1))
    return np.asarray(np.sqrt(variance), dtype=np.float64)


@dataclass(frozen=True)
class GeneFeatures:
    """Fitted: which genes, and how much each varies.

    Shapes:
        genes: (K,) int64 positions among the G genes.
        scale: (K,) float64 standard deviations of the log-normalised training cells.
    """

    num_input_genes: int
    target_sum: float
    genes: I64
    scale: F64

    def apply(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """(N, G) raw counts -> (N, K) float32, log-normalised.

        The library size is over all G genes. Not centred, so that zeros stay zeros.

        Raises:
            DataError: another number of genes, or counts that are not raw.
        """
        return self._chosen(counts).astype(np.float32)

    def scaled(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """As :meth:`apply`, divided by ``scale``, at most 10: for penalised linear models."""
        chosen = self._chosen(counts)
        chosen.data = np.minimum(chosen.data / self.scale[chosen.indices], _CLIP)
        return chosen.astype(np.float32)

    def _chosen(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        check_genes(counts, self.num_input_genes)
        chosen = log_normalise(counts, target_sum=self.target_sum)[:, self.genes].tocsr()
        chosen.sort_indices()
        return chosen


def fit_genes(
    counts: sparse.csr_matrix, config: FeatureConfig, batches: I64 | None = None
) -> GeneFeatures:
    """Choose variable genes and measure their scale on training cells ``counts`` (N, G).

    Args:
        counts: raw counts.
        config: how many genes, and which.
        batches: (N,) code of each cell's batch: genes are chosen that vary within batches, as scIB
            has them for every method (doi:10.1038/s41592-021-01336-8); None, or batches of one cell
            each, takes all cells as one.

    Raises:
        DataError: no gene varies.
    """
    codes = np.zeros(counts.shape[0]) if batches is None else batches
    values, sizes = np.unique(codes, return_counts=True)
    parts = [counts[codes == b] for b in values] if (sizes > 1).any() else [counts]
    genes = choose_variable_by_batch(
        [GeneMoments.of_counts(part, target_sum=config.target_sum) for part in parts],
        num_genes=config.num_genes,
        min_cells=config.min_cells,
        flavor=config.flavor,
    )
    scale = _deviations(log_normalise(counts, target_sum=config.target_sum)[:, genes].tocsr())
    keep = scale > 0  # equal after log1p up to rounding: nothing to learn from
    return GeneFeatures(counts.shape[1], config.target_sum, genes[keep], scale[keep])


@dataclass(frozen=True)
class Components:
    """Fitted principal components of variable genes.

    Shapes:
        mean: (K,) training mean.
        axes: (K, P) unit columns, largest variance first; the largest entry of each is positive.
        variance: (P,) variance of the training cells along each.
    """

    mean: F64
    axes: F64
    variance: F64

    def apply(self, cells: sparse.csr_matrix) -> F32:
        """(N, K) variable genes -> (N, P) coordinates."""
        return np.asarray(cells @ self.axes - self.mean @ self.axes, dtype=np.float32)


def fit_components(cells: sparse.csr_matrix, num_components: int) -> Components:
    """Principal components by an exact eigendecomposition of the (K, K) covariance.

    Args:
        cells: (N, K) training cells from :meth:`GeneFeatures.apply`.
        num_components: components wanted; P is at most N - 1 and K.
    """
    num = cells.shape[0]
    exact = cells.astype(np.float64)
    mean = np.asarray(exact.mean(axis=0), dtype=np.float64).ravel()
    return components_of((exact.T @ exact).toarray(), mean, num, num_components)


def components_of(products: F64, mean: F64, num_cells: int, num_components: int) -> Components:
    """Principal components from the sums over cells that they depend on.

    Args:
        products: (K, K) X^T X, not centred.
        mean: (K,) of X.
        num_cells: N, rows of X.
        num_components: components wanted; P is at most N - 1 and K.
    """
    width = len(mean)
    wanted = max(1, min(num_components, num_cells - 1, width))
    covariance = products - num_cells * np.outer(mean, mean)
    with one_thread():
        values, vectors = linalg.eigh(
            covariance / max(num_cells - 1, 1), subset_by_index=[width - wanted, width - 1]
        )
    axes = vectors[:, ::-1]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    signs = np.where(largest < 0, -1.0, 1.0)
    return Components(mean, axes * signs, np.maximum(values[::-1], 0.0))


@dataclass(frozen=True)
class Projection:
    """Fitted: raw counts to principal components."""

    genes: GeneFeatures
    components: Components

    def apply(self, counts: sparse.csr_matrix) -> F32:
        """(N, G) raw counts -> (N, P) coordinates."""
        return self.components.apply(self.genes.apply(counts))


def fit_projection(
    counts: sparse.csr_matrix, config: ComponentConfig, batches: I64 | None = None
) -> Projection:
    """Variable genes and their principal components; arguments as those of :func:`fit_genes`.

    Raises:
        DataError: no gene varies.
    """
    genes = fit_genes(counts, config, batches)
    return Projection(genes, fit_components(genes.apply(counts), config.num_components))


def for_both(
    apply: Callable[[sparse.csr_matrix], F32], cells: CellCounts, query: CellCounts | None
) -> tuple[F32, F32 | None]:
    """What an inductive unit's ``embed`` returns: one function of each cell, applied to both."""
    return apply(cells.counts), None if query is None else apply(query.counts)
