"""``embed`` says what the model does not see of the cells it is given."""

from __future__ import annotations

import json
import warnings

import anndata as ad
import numpy as np
import pytest

import cellray
from cellray.infer.import_weights import import_weights
from helpers_upstream import SG, scgpt_folder, scgpt_weights


def cells(names: list[str]) -> ad.AnnData:
    adata = ad.AnnData(np.full((3, len(names)), 2, np.float32))
    adata.var.index = names
    return adata


def loaded(tmp_path, max_tokens: int):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    args = tmp_path / "sg" / "args.json"
    args.write_text(json.dumps({**json.loads(args.read_text()), "max_seq_len": max_tokens}))
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    return cellray.load(str(tmp_path / "out"))


KNOWN = [f"GENE{i}" for i in range(SG["genes"])]


def told(model, adata) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.embed(adata)
    assert all(one.filename == __file__ for one in caught), "the warning points at the caller"
    return [str(one.message) for one in caught]


def test_nothing_is_said_of_cells_that_are_seen_whole(tmp_path):
    assert told(loaded(tmp_path, 1200), cells(KNOWN)) == []


@pytest.mark.parametrize("adata", [cells(KNOWN)])
def test_cut_cells_are_counted(tmp_path, adata):
    (only,) = told(loaded(tmp_path, 21), adata)
    assert "3 of 3 cells looked at express more than 20 genes" in only


def test_lost_counts_and_missing_genes_are_told(tmp_path):
    model = loaded(tmp_path, 1200)
    (lost,) = told(model, cells([*KNOWN[:10], *(f"X{i}" for i in range(30))]))
    assert "covers only 25.0% of the counts (10 of 40 genes" in lost
    (missing,) = told(model, cells(KNOWN[:7]))
    assert "23 of the model's 30 genes are not among the genes of the cells" in missing
    assert told(model, cells(KNOWN[:8])) == []
