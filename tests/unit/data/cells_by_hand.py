"""Tiny AnnData objects with known counts."""

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse


def make_counts(num_cells, num_genes, seed=0):
    """Random small counts, a third of them non-zero; every cell has at least one."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (num_cells, num_genes)) * (rng.random((num_cells, num_genes)) < 0.35)
    counts[np.arange(num_cells), rng.integers(0, num_genes, num_cells)] += 1
    return counts.astype(np.float32)


def make_adata(counts, genes=None, *, obs=None, names=None, var=None, prefix="cell"):
    counts = np.asarray(counts, dtype=np.float32)
    num_cells, num_genes = counts.shape
    genes = genes if genes is not None else [f"ENSG{i:011d}" for i in range(num_genes)]
    names = names if names is not None else [f"{prefix}{i}" for i in range(num_cells)]
    return ad.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame(obs or {}, index=pd.Index(names, dtype=object)),
        var=pd.DataFrame(var or {}, index=pd.Index(list(genes), dtype=object)),
    )


def dense(block, num_genes):
    """A CellBlock as a matrix."""
    result = np.zeros((len(block), num_genes), dtype=np.float32)
    for i in range(len(block)):
        part = slice(block.indptr[i], block.indptr[i + 1])
        assert (np.diff(block.genes[part]) > 0).all()
        result[i, block.genes[part]] = block.counts[part]
    return result
