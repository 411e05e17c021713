"""scVI (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2) on the raw counts of variable genes."""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from pydantic import Field

from cellray.baselines._features import FeatureConfig, fit_genes
from cellray.baselines._joint import batch_names, joined, parted
from cellray.baselines.base import F32, BaselineUnit, CellCounts

__all__ = ["BASELINE", "ScviConfig"]


class ScviConfig(FeatureConfig):
    """Keys of the model.

    Attributes:
        num_latent: dimensions of the latent space.
        num_layers: hidden layers of encoder and decoder.
        max_epochs: passes over the cells; 0 takes the package's own heuristic (400 for up to
            20,000 cells).
    """

    name: str = "scvi"
    num_latent: int = Field(default=30, ge=1)
    num_layers: int = Field(default=2, ge=1)
    max_epochs: int = Field(default=0, ge=0)


def _fitted(config: ScviConfig, cells: ad.AnnData, seed: int) -> Any:
    import scvi

    scvi.settings.seed = seed
    scvi.settings.verbosity = logging.ERROR
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = scvi.model.SCVI(
        cells, n_latent=config.num_latent, n_layers=config.num_layers, gene_likelihood="nb"
    )
    with tempfile.TemporaryDirectory() as folder:
        model.train(
            max_epochs=config.max_epochs or None,
            enable_progress_bar=False,
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
        )
    return model


def _embed(
    config: ScviConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    """Genes chosen on ``cells``; the model is fitted on both, and sees no label."""
    both = joined(cells, query)
    genes = fit_genes(cells.counts, config).genes
    obs = pd.DataFrame({"batch": pd.Categorical(batch_names(both, config.name))})
    obs.index = obs.index.astype(str)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _fitted(config, ad.AnnData(both.only(genes).counts, obs=obs), seed)
        latent = np.asarray(model.get_latent_representation(), dtype=np.float32)
    return parted(latent, len(cells), query)


BASELINE = BaselineUnit(
    name="scvi",
    config=ScviConfig,
    seed_scope="initial weights, batch order",
    title="scVI on 2,000 variable genes, 30 latent dimensions",
    embed=_embed,
    transductive=True,
    needs_batches=True,
    requires=("scvi",),
    extra="scvi",
)
