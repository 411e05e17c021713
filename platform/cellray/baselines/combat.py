"""ComBat (Johnson et al. 2007, doi:10.1093/biostatistics/kxj037) on variable genes, then components.

scanpy's implementation is called; it comes with the reader of TileDB-SOMA.
"""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from cellray.baselines._features import fit_components, fit_genes, one_thread
from cellray.baselines._joint import batch_names, joined, parted
from cellray.baselines.base import F32, BaselineUnit, CellCounts
from cellray.baselines.pca import PcaConfig

__all__ = ["BASELINE", "CombatConfig"]


class CombatConfig(PcaConfig):
    """Keys of the correction: those of the components."""

    name: str = "combat"


def _embed(
    config: CombatConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    """Genes chosen on ``cells``; the correction sees both, and no label."""
    import scanpy

    both = joined(cells, query)
    genes = fit_genes(cells.counts, config)
    values = genes.apply(both.counts).toarray().astype(np.float64)
    obs = pd.DataFrame({"batch": pd.Categorical(batch_names(both, config.name))})
    obs.index = obs.index.astype(str)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of genes that do not vary within a batch
        corrected = scanpy.pp.combat(ad.AnnData(values, obs=obs), key="batch", inplace=False)
    corrected = sparse.csr_matrix(np.nan_to_num(np.asarray(corrected, dtype=np.float32)))
    components = fit_components(corrected[: len(cells)], config.num_components)
    return parted(components.apply(corrected), len(cells), query)


BASELINE = BaselineUnit(
    name="combat",
    config=CombatConfig,
    seed_scope="",
    title="ComBat on 2,000 variable genes, then 50 principal components",
    embed=_embed,
    transductive=True,
    needs_batches=True,
    requires=("scanpy",),
)
