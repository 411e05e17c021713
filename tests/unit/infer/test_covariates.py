"""A model that was trained with covariates reads them from the cells it is given."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import cellray
from cellray.core.errors import DataError
from cellray.infer.import_weights import import_weights
from helpers_upstream import SG, scgpt_folder, scgpt_weights


def cells(batches: list[str] | None) -> ad.AnnData:
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (4, SG["genes"])).astype(np.float32)
    obs = pd.DataFrame(index=[str(i) for i in range(4)])
    if batches:
        obs["batch"] = batches
    names = [f"GENE{i}" for i in range(SG["genes"])]
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=names))


@pytest.fixture
def model(tmp_path):
    weights = scgpt_weights(flash=False, batches=2, classes=3, flag=False)
    scgpt_folder(tmp_path / "sg", weights)
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    return cellray.load(str(tmp_path / "out"))


def test_each_cell_is_normed_by_its_own_batch(model):
    mixed, first, second = (
        model.embed(cells(batches)) for batches in (["0", "1", "0", "1"], ["0"] * 4, ["1"] * 4)
    )
    np.testing.assert_allclose(mixed[[0, 2]], first[[0, 2]], atol=1e-5)
    np.testing.assert_allclose(mixed[[1, 3]], second[[1, 3]], atol=1e-5)
    assert np.abs(first - second).max() > 0.01
    told = [model.annotate(cells([code] * 4))["probability"] for code in "01"]
    assert np.abs(told[0] - told[1]).max() > 1e-5


def test_missing_and_unknown_batches_are_refused(model):
    with pytest.raises(DataError, match="covariates batch, and obs has no column batch; .* 0, 1"):
        model.embed(cells(None))
    with pytest.raises(DataError, match="values the model was not trained with: 7"):
        model.annotate(cells(["0", "0", "7", "1"]))
