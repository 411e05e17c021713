"""What tests share: one local Ray a session, a small known store, the real demo cells."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

REPOSITORY = Path(__file__).resolve().parent.parent
PANCREAS = REPOSITORY / "tests" / "data" / "pancreas"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def cellray_data() -> Path:
    """The folder of further real data; tests that need it are not run without it."""
    folder = os.environ.get("CELLRAY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("not run: CELLRAY_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need one."""
    import ray

    from cellray.ops.environment import local_ray_environment

    os.environ.update(local_ray_environment())
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


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


@pytest.fixture(scope="session")
def small_store(tmp_path_factory) -> str:
    """A SOMA store of :func:`known_cells`."""
    from cellray.data.ingest import IngestConfig, ingest

    folder = tmp_path_factory.mktemp("small")
    known_cells().write_h5ad(folder / "cells.h5ad")
    uri = str(folder / "store")
    ingest(IngestConfig(files=[str(folder / "cells.h5ad")], uri=uri))
    return uri
