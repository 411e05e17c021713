"""Principal components of variable genes: the embedding that every other one has to beat."""

from __future__ import annotations

from pydantic import Field

from cellray.baselines._features import FeatureConfig, fit_components, fit_genes
from cellray.baselines.base import F32, BaselineUnit, CellCounts

__all__ = ["BASELINE", "PcaConfig", "principal_components"]


class PcaConfig(FeatureConfig):
    """Keys of the components.

    Attributes:
        num_components: components kept at most.
    """

    name: str = "pca"
    num_components: int = Field(default=50, ge=1)


def principal_components(
    config: PcaConfig, cells: CellCounts, query: CellCounts | None
) -> tuple[F32, F32 | None]:
    """Coordinates of both; genes, their scale and the axes are fitted on ``cells`` alone."""
    genes = fit_genes(cells.counts, config)
    scaled = genes.apply(cells.counts)
    components = fit_components(scaled, config.num_components)
    further = None if query is None else components.apply(genes.apply(query.counts))
    return components.apply(scaled), further


def _embed(
    config: PcaConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    return principal_components(config, cells, query)


BASELINE = BaselineUnit(
    name="pca",
    config=PcaConfig,
    seed_scope="",
    title="50 principal components of 2,000 log-normalised variable genes",
    embed=_embed,
)
