"""A small model and cells of known types that its genes tell apart."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellray.infer.import_weights import import_weights
from helpers_upstream import SG, scgpt_folder, scgpt_weights


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A checkpoint of untrained weights that embeds cells over GENE0 .. GENE29."""
    folder = tmp_path_factory.mktemp("model")
    scgpt_folder(folder / "published", scgpt_weights())
    import_weights("scgpt", folder / "published", folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def make_cells():
    """Three types with ten marker genes each, in donors of their own."""

    def make(num: int, *, donors: tuple[str, ...] = ("d1", "d2"), seed: int = 0) -> ad.AnnData:
        rng = np.random.default_rng(seed)
        kind = np.arange(num) % 3
        rate = np.full((num, SG["genes"]), 0.3)
        for t in range(3):
            rate[np.ix_(kind == t, range(10 * t, 10 * t + 10))] = 6.0
        counts = rng.poisson(rate).astype(np.float32)
        obs = pd.DataFrame(
            {
                "cell_type": [f"type{t}" for t in kind],
                "donor": [donors[i % len(donors)] for i in range(num)],
            },
            index=[f"{donors[0]}-{seed}-{i}" for i in range(num)],
        )
        var = pd.DataFrame(index=[f"GENE{i}" for i in range(SG["genes"])])
        return ad.AnnData(counts, obs=obs, var=var)

    return make
