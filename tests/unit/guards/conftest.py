"""Stores of cells with planted faults."""

from __future__ import annotations

from collections.abc import Callable

import anndata as ad
import pytest

from cellray.data.ingest import IngestConfig, ingest


@pytest.fixture
def ingested(tmp_path) -> Callable[..., str]:
    """Writes cells to a store; gives its address."""

    def write(cells: ad.AnnData, name: str = "store") -> str:
        cells.write_h5ad(tmp_path / f"{name}.h5ad")
        uri = str(tmp_path / name)
        ingest(IngestConfig(files=[str(tmp_path / f"{name}.h5ad")], uri=uri))
        return uri

    return write
