"""scVI, a variational autoencoder of counts (Lopez et al. 2018, doi:10.1038/s41592-018-0229-2).

The package scvi-tools does the work, if the extra is installed. Genes come from the cells fitted
on. The network is trained on all cells, query cells included: a batch that it has not seen has no
place in it. It sees their counts and batches, never labels.

Legend: N cells fitted on, Q query cells, K genes, D latent dimensions.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import sparse

from cellray.baselines._features import FeatureConfig, fit_genes
from cellray.baselines.base import BaselineUnit, CellCounts

__all__ = ["BASELINE", "ScviConfig"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

_LOGGERS = ("scvi", "lightning", "lightning.pytorch", "lightning.fabric")


class ScviConfig(FeatureConfig):
    """Keys of the autoencoder; the defaults are those of the package's recipe for integration.

    Attributes:
        num_latent: D.
        num_layers: hidden layers of encoder and decoder.
        num_hidden: their width.
        max_epochs: passes over the cells; None takes the package's own rule, 400 up to 20,000 cells
            and fewer above.
        batch_cells: cells of a training step.
        accelerator: ``cpu``, or ``auto`` to take what there is; bit for bit the same on ``cpu``.
    """

    name: str = "scvi"
    num_latent: int = Field(default=30, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_hidden: int = Field(default=128, ge=1)
    max_epochs: int | None = Field(default=None, ge=1)
    batch_cells: int = Field(default=128, ge=2)
    accelerator: Literal["cpu", "auto"] = "auto"


@contextmanager
def _apart() -> Iterator[None]:
    """Quiet; global random states, environment variables and log levels are put back."""
    import torch

    variables, state = dict(os.environ), np.random.get_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers, epochs and devices
        importlib.import_module("scvi")  # first: it sets levels and variables when it is imported
        levels = {name: logging.getLogger(name).level for name in _LOGGERS}
        try:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            np.random.set_state(state)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for name in set(os.environ) - set(variables):
                del os.environ[name]
            os.environ.update(variables)


def _latent(config: ScviConfig, counts: sparse.csr_matrix, batches: I64, seed: int) -> F32:
    """(N + Q, K) raw counts -> (N + Q, D) means of the latent cells."""
    import anndata
    import pandas as pd
    import scvi

    names = [str(row) for row in range(counts.shape[0])]
    obs = pd.DataFrame({"batch": pd.Categorical(batches.astype(str))}, index=names)
    cells = anndata.AnnData(counts.astype(np.float32), obs=obs)
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = scvi.model.SCVI(
        cells,
        n_latent=config.num_latent,
        n_layers=config.num_layers,
        n_hidden=config.num_hidden,
        gene_likelihood="nb",
    )
    model.train(
        max_epochs=config.max_epochs,
        accelerator=config.accelerator,
        batch_size=config.batch_cells,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return np.asarray(model.get_latent_representation(), dtype=np.float32)


def _embed(
    config: ScviConfig, cells: CellCounts, query: CellCounts | None, seed: int
) -> tuple[F32, F32 | None]:
    genes = fit_genes(cells.counts, config, cells.batches).genes
    assert cells.batches is not None
    counts, batches = cells.counts[:, genes], cells.batches
    if query is not None:
        assert query.batches is not None
        counts = sparse.vstack([counts, query.counts[:, genes]])
        batches = np.concatenate([batches, query.batches])
    with _apart():
        latent = _latent(config, sparse.csr_matrix(counts), batches, seed)
    num = cells.num_cells
    return latent[:num], None if query is None else latent[num:]


BASELINE = BaselineUnit(
    name="scvi",
    config=ScviConfig,
    embed=_embed,
    answers=("labels", "embedding"),
    transductive=True,
    needs_batches=True,
    requires=("scvi",),
    extra="scvi",
    seed_scope="init, batch order",
    title="scVI with 30 latent dimensions on 2,000 variable genes",
    revision=2,  # genes that vary within batches
)
