"""Tiny h5ad files with known counts, and stores made of them."""

import os
from pathlib import Path

import anndata as ad
import pytest
from cells_by_hand import make_adata

from cellray.data.ingest import IngestConfig, ingest
from cellray.data.soma import open_store


@pytest.fixture(scope="session")
def cellray_data():
    root = os.environ.get("CELLRAY_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("not run: CELLRAY_DATA is not set")
    return Path(root)


@pytest.fixture
def write_h5ad(tmp_path):
    """Write an AnnData, or one made of counts, under a name; returns the path as text."""

    def write(name, counts, *args, **kwargs):
        adata = counts if isinstance(counts, ad.AnnData) else make_adata(counts, *args, **kwargs)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        adata.write_h5ad(path)
        return str(path)

    return write


@pytest.fixture
def make_store(tmp_path, write_h5ad):
    """Ingest counts and open the store."""

    def make(counts, *args, uri="store", **kwargs):
        path = write_h5ad(f"{uri}.h5ad", counts, *args, **kwargs)
        ingest(IngestConfig(files=[path], uri=str(tmp_path / uri), cells_per_block=7))
        return open_store(str(tmp_path / uri))

    return make
