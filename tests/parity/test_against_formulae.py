"""Imported weights on raw counts, end to end, against the families written out from formulae."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import cellray
import reference_models as reference
from cellray.core.batch import CellBatch
from cellray.data.collate import collate_tokens
from cellray.infer.import_weights import import_weights
from helpers_upstream import (
    SB,
    SF,
    SG,
    TO,
    scbert_file,
    scbert_weights,
    scfoundation_file,
    scfoundation_weights,
    scgpt_folder,
    scgpt_weights,
    tosica_folder,
    tosica_weights,
)

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def cells(num_genes: int, num_cells: int = 5, seed: int = 0) -> ad.AnnData:
    """Raw counts whose columns stand in another order than the model's genes, one missing."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (num_cells, num_genes)) * (rng.random((num_cells, num_genes)) < 0.5)
    counts[:, 0] = 0
    order = rng.permutation(np.arange(1, num_genes))
    names = [f"GENE{i}" for i in order]
    matrix = counts[:, order].astype(np.float32)
    return ad.AnnData(matrix, var=pd.DataFrame(index=pd.Index(names)))


def in_order(adata: ad.AnnData, num_genes: int) -> np.ndarray:
    """(N, G) counts in the model's order."""
    dense = np.zeros((adata.n_obs, num_genes))
    for column, name in enumerate(adata.var_names):
        dense[:, int(name.removeprefix("GENE"))] = adata.X[:, column]
    return dense


def batch_of(model: cellray.infer.load.LoadedModel, adata: ad.AnnData) -> CellBatch:
    return collate_tokens(model.tokens(adata), pad=model.vocab.pad)


def log2_bins(counts: np.ndarray) -> torch.Tensor:
    """The source's preprocessing, step by step, with CLS behind."""
    scaled = counts / counts.sum(1, keepdims=True) * 1e4
    tokens = np.minimum(np.floor(np.log2(1 + scaled)), 5).astype(np.int64)
    return torch.from_numpy(np.pad(tokens, ((0, 0), (0, 1))))


@pytest.mark.parametrize("key_max", ["cell", "tensor"])
def test_scbert_logits_equal_the_formulae(tmp_path, key_max):
    weights = scbert_weights()
    import_weights("scbert", scbert_file(tmp_path / "x.pth", weights), tmp_path / "out")
    model = cellray.load(str(tmp_path / "out"))
    for block in model.model.encoder.blocks:
        block.attention.key_max = key_max
    adata = cells(SB["genes"])
    tokens = log2_bins(in_order(adata, SB["genes"]))
    hidden = reference.scbert_hidden(
        weights, tokens, layers=SB["L"], heads=SB["heads"], key_max=key_max
    )
    want = reference.lin(weights, "to_out", hidden)
    with torch.no_grad():
        got = model.model.bin_logits(batch_of(model, adata))
    torch.testing.assert_close(got, want, **CLOSE)


def test_scbert_one_cell_at_a_time_gives_the_batch_of_the_cell_convention(tmp_path):
    weights = scbert_weights()
    tokens = log2_bins(in_order(cells(SB["genes"]), SB["genes"]))
    sizes = {"layers": SB["L"], "heads": SB["heads"]}
    alone = torch.cat(
        [reference.scbert_hidden(weights, row[None], key_max="tensor", **sizes) for row in tokens]
    )
    together = reference.scbert_hidden(weights, tokens, key_max="cell", **sizes)
    torch.testing.assert_close(together, alone, **CLOSE)


def test_scbert_attention_sums_are_the_columns_of_the_averaged_matrix(tmp_path):
    import_weights("scbert", scbert_file(tmp_path / "x.pth", scbert_weights()), tmp_path / "out")
    model = cellray.load(str(tmp_path / "out"))
    batch = batch_of(model, cells(SB["genes"]))
    with torch.no_grad():
        layers = [model.model.attention(batch, layer).mean(1) for layer in range(SB["L"])]
        want = torch.stack(layers).mean(0).sum(1)[:, : SB["genes"]]
        got = model.model.attention_sums(batch)
    torch.testing.assert_close(got, want, **CLOSE)


def test_scbert_classes_equal_the_formulae_and_unsure_cells_are_refused(tmp_path):
    weights = scbert_weights(classes=3)
    import_weights("scbert", scbert_file(tmp_path / "x.pth", weights), tmp_path / "out")
    model = cellray.load(str(tmp_path / "out"))
    adata = cells(SB["genes"])
    hidden = reference.scbert_hidden(
        weights, log2_bins(in_order(adata, SB["genes"])), layers=SB["L"], heads=SB["heads"],
        key_max="cell",
    )  # fmt: skip
    want = torch.softmax(reference.scbert_classes(weights, hidden), -1)
    told = model.annotate(adata)
    np.testing.assert_allclose(told["probability"], want.max(-1).values, atol=1e-5)
    unsure = told["probability"] < 0.5
    assert (told["label"] == "Unassigned").tolist() == unsure.tolist()
    names = [str(i) for i in want.argmax(-1).tolist()]
    assert model.annotate(adata, refuse_below=0.0)["label"].tolist() == names


def depth_rows(counts: np.ndarray, target: str) -> torch.Tensor:
    totals = counts.sum(1)
    values = np.log1p(counts / totals[:, None] * 1e4)
    t = np.full(len(counts), float(target[1:]))
    if target[0] == "f":
        t = np.log10(totals * float(target[1:]))
    if target[0] == "a":
        t = np.log10(totals) + float(target[1:])
    rows = np.concatenate([values, t[:, None], np.log10(totals)[:, None]], axis=1)
    return torch.from_numpy(rows).float()


@pytest.mark.parametrize("target", ["f1", "t4", "a5", "f5"])
@pytest.mark.parametrize("pool", ["all", "max"])
def test_scfoundation_cells_equal_the_formulae_one_at_a_time(tmp_path, target, pool):
    weights = scfoundation_weights()
    file = scfoundation_file(tmp_path / "models.ckpt", weights)
    import_weights("scfoundation", file, tmp_path / "out")
    model = cellray.load(str(tmp_path / "out"))
    config = model.model.config.model_copy(update={"cell_embedding": pool})
    model.model.config = config
    model.model.width = SF["D"] * (4 if pool == "all" else 1)
    manifest = replace(
        model.manifest, tokenizer={**model.manifest.tokenizer, "target_depth": target}
    )
    model = replace(model, manifest=manifest)
    adata = cells(SF["genes"])
    want = []
    for row in depth_rows(in_order(adata, SF["genes"]), target):
        where, states = reference.scfoundation_encoder(
            weights, row, layers=SF["L"], heads=SF["heads"]
        )
        genes = states[where < SF["genes"]]
        parts = [states[-1], states[-2], genes.max(0).values, genes.mean(0)]
        want.append(torch.cat(parts) if pool == "all" else states.max(0).values)
    got = torch.from_numpy(model.embed(adata))
    torch.testing.assert_close(got, torch.stack(want), **CLOSE)


def test_scfoundation_predictions_and_gene_embeddings_equal_the_formulae(tmp_path):
    weights = scfoundation_weights()
    file = scfoundation_file(tmp_path / "models.ckpt", weights)
    import_weights("scfoundation", file, tmp_path / "out", entry="gene")
    model = cellray.load(str(tmp_path / "out"))
    adata = cells(SF["genes"])
    batch = batch_of(model, adata)
    hidden = torch.zeros(batch.token_ids.shape, dtype=torch.bool)
    hidden[:, 1::3] = batch.attention_mask[:, 1::3] & (batch.token_ids[:, 1::3] < SF["genes"])
    masked = replace(batch, unknown_mask=hidden, target_mask=hidden)
    sizes = {"layers": SF["L"], "encoder_heads": SF["heads"], "decoder_layers": SF["M"]}
    want, genes = [], []
    for number, row in enumerate(depth_rows(in_order(adata, SF["genes"]), "f1")):
        at = torch.zeros(len(row), dtype=torch.bool)
        at[batch.token_ids[number][hidden[number]]] = True
        state = reference.scfoundation_decoder(weights, row, at, **sizes)
        order = batch.token_ids[number][hidden[number]]
        want.append(reference.lin(weights, "to_final", state)[order, 0])
        plain = reference.scfoundation_decoder(weights, row, torch.zeros_like(at), **sizes)
        genes.append(plain[: SF["genes"]])
    with torch.no_grad():
        got = model.model(masked).predictions["expression"]
        in_cells = model.model.embed_genes_of_cells(batch)
    torch.testing.assert_close(got, torch.cat(want), **CLOSE)
    torch.testing.assert_close(in_cells, torch.stack(genes), **CLOSE)


@pytest.mark.parametrize("layout", ["interleaved", "pathway"])
def test_tosica_equals_the_dense_masked_matrix(tmp_path, layout):
    weights = tosica_weights()
    tosica_folder(tmp_path / "to", weights)
    import_weights("tosica", tmp_path / "to", tmp_path / "out")
    model = cellray.load(str(tmp_path / "out"))
    backbone = model.backbone
    backbone.config = backbone.config.model_copy(update={"token_layout": layout})
    adata = cells(TO["genes"])
    counts = in_order(adata, TO["genes"])
    x = torch.from_numpy(np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)).float()
    latent, logits, attention = reference.tosica(
        weights, x, width=TO["W"], heads=4, layers=TO["L"], interleaved=layout == "interleaved"
    )
    batch = batch_of(model, adata)
    with torch.no_grad():
        output = model.model(batch)
        rolled = backbone.pathway_attention(batch)
    torch.testing.assert_close(output.cell, latent, **CLOSE)
    torch.testing.assert_close(output.predictions["class_logits"], logits, **CLOSE)
    torch.testing.assert_close(rolled, attention, **CLOSE)
    assert set(model.annotate(adata)["label"]) <= {"alpha", "beta", "delta"}


def test_scgpt_cells_equal_the_formulae(tmp_path):
    weights = scgpt_weights(flash=False)
    scgpt_folder(tmp_path / "sg", weights)
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    model = cellray.load(str(tmp_path / "out"))
    adata = cells(SG["genes"])
    batch = batch_of(model, adata)
    want = reference.scgpt_hidden(
        weights, batch.token_ids, batch.values, batch.attention_mask, layers=SG["L"],
        heads=SG["heads"],
    )[:, 0]  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(model.embed(adata)), want, **CLOSE)
    assert (batch.values[:, 0] == -2).all()


def test_a_cell_is_the_same_in_any_company(tmp_path):
    makers = {
        "scbert": lambda p: scbert_file(p / "x.pth", scbert_weights()),
        "scfoundation": lambda p: scfoundation_file(p / "m.ckpt", scfoundation_weights()),
    }
    for name, make in makers.items():
        folder: Path = tmp_path / name
        import_weights(name, make(folder), folder / "out")
        model = cellray.load(str(folder / "out"))
        adata = cells(SB["genes"], num_cells=6)
        together = model.embed(adata)
        for row in range(6):
            alone = model.embed(adata[[row]].copy())
            np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
