"""scVI, where its package is installed: shape, seeds, and that it leaves no trace."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from cells_for_baselines import made_cells

from cellray.baselines.base import CellCounts, annotate_with, baseline, check_available, embed_with
from cellray.baselines.scvi import BASELINE, ScviConfig
from cellray.core.errors import ConfigError

here = importlib.util.find_spec("scvi") is not None
needs_scvi = pytest.mark.skipif(not here, reason="not run: scvi-tools is not installed")


def tiny(**over: object) -> ScviConfig:
    small = {"num_genes": 40, "num_latent": 4, "max_epochs": 2, "accelerator": "cpu"}
    return ScviConfig.model_validate(small | over)


@pytest.mark.skipif(here, reason="scvi-tools is installed")
def test_without_the_package_the_extra_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"needs the Python module scvi.*pip install 'cellray\[sc"
    ):
        check_available(BASELINE)


@needs_scvi
def test_latent_cells_follow_the_seed_bit_for_bit_and_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    importlib.import_module("scvi")
    counts, _ = made_cells(130)
    cells = CellCounts(counts, np.arange(130) % 2)
    variables, state = dict(os.environ), torch.get_rng_state()
    drawn, level = np.random.get_state()[1].tolist(), logging.getLogger("scvi").level
    unit = baseline("scvi")
    first, again, other = (embed_with(unit, tiny(), cells, seed) for seed in (1, 1, 2))
    assert first.shape == (130, 4)
    assert first.dtype == np.float32
    assert np.isfinite(first).all()
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()
    assert dict(os.environ) == variables
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[1].tolist() == drawn
    assert logging.getLogger("scvi").level == level
    assert not list(tmp_path.iterdir())
    assert "".join(capfd.readouterr()) == ""


@needs_scvi
def test_query_cells_of_an_unseen_batch_are_labelled() -> None:
    counts, labels = made_cells(300)
    cells = CellCounts(counts, (np.arange(300) >= 200).astype(np.int64))
    train, query = cells.rows(np.arange(200)), cells.rows(np.arange(200, 300))
    found = annotate_with(BASELINE, tiny(max_epochs=60), train, labels[:200], query, 0)
    assert (found.codes == labels[200:]).mean() > 0.8
    assert found.embedding is not None
    assert found.embedding.shape == (100, 4)
