"""Made cells whose types are known: markers, donors, raw counts."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp


def known_cells(num_cells: int = 240, num_genes: int = 60, seed: int = 0) -> ad.AnnData:
    """Three cell types with ten marker genes each, four donors, raw counts."""
    rng = np.random.default_rng(seed)
    kind = np.arange(num_cells) % 3
    rate = rng.gamma(1.0, 0.6, num_genes)[None, :] * np.ones((num_cells, 1))
    for t in range(3):
        rate[np.ix_(kind == t, range(10 * t, 10 * t + 10))] += 4.0
    counts = rng.poisson(rate).astype(np.float32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type{t}" for t in kind]),
            "donor": pd.Categorical([f"d{i % 4}" for i in range(num_cells)]),
        },
        index=[f"cell{i}" for i in range(num_cells)],
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(num_genes)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)
