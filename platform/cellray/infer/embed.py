"""The embedding job: zero-shot cell embeddings of a store, as h5ad and as a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import DataError
from cellray.core.section import build_section
from cellray.data.stats import check_coverage, coverage
from cellray.data.tokens import TokenSource, tokenise_content, tokenizer_unit
from cellray.infer.load import Flags, LoadedModel, load
from cellray.train.prepare import Cells, encode, gene_map, select_cells

if TYPE_CHECKING:
    from cellray.runs import EmbedRun

__all__ = ["EmbedResult", "check_embed", "embed", "embed_cells", "embed_seen", "token_source"]

Say = Callable[[str], None]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
_BLOCK_CELLS = 4096


@dataclass(frozen=True)
class EmbedResult:
    """Where the embedding lies.

    Attributes:
        path: h5ad with ``obsm['X_cellray']`` (and ``X_umap``), no counts.
        umap_path: the picture, "" if none was asked for.
        num_cells: rows.
        width: columns of the embedding.
    """

    path: str
    umap_path: str
    num_cells: int
    width: int

    def lines(self) -> list[str]:
        """What the command line prints."""
        told = [f"embedding: {self.path} ({self.num_cells} cells x {self.width})"]
        return told + ([f"umap: {self.umap_path}"] if self.umap_path else [])


def token_source(
    model: LoadedModel, cells: Cells, *, allow_gene_loss: bool = False
) -> tuple[TokenSource, list[str]]:
    """What turns a store's cells into a model's tokens, and warnings about the genes.

    Args:
        model: the model.
        cells: the selection.
        allow_gene_loss: warn where its genes cover less than 60 % of the counts, or where, being a
            choice of variable genes, less than 60 % of them are there.

    Raises:
        DataError: no gene in common, less than 60 % of the counts covered, or covariate values the
            model does not know.
    """
    mapping = gene_map(cells.store, model.vocab)
    covered = coverage(cells.store, model.vocab, joinids=cells.joinids)
    warnings = check_coverage(
        covered, model.vocab, refuse=not allow_gene_loss, chosen=model.manifest.genes_chosen
    )
    unit = tokenizer_unit(model.manifest.tokenizer["name"])
    limit = unit.max_genes(build_section(unit.config, model.manifest.tokenizer))
    if cut := covered.longer_than(limit, unit.when_longer):
        warnings.append(cut)
    wanted = list(model.manifest.covariates)
    missing = [name for name in wanted if name not in cells.obs]
    if missing:
        raise DataError(
            f"the model was trained with the covariates {', '.join(wanted)}; name them in "
            f"data.covariates and make sure that obs has {', '.join(missing)}"
        )
    codes, _ = encode(cells.obs, wanted, model.manifest.covariates)
    source = TokenSource(
        store=cells.store,
        gene_map=mapping,
        vocab=model.vocab,
        tokenizer=model.manifest.tokenizer,
        joinids=cells.joinids,
        codes=codes,
    )
    return source, warnings


def embed_cells(
    model: LoadedModel,
    source: TokenSource,
    joinids: I64,
    *,
    classify: bool = False,
    cells_micro: int = 64,
    say: Say | None = None,
) -> F32:
    """Embeddings (N, D), or with ``classify`` class probabilities (N, C), block by block."""
    work = model.classify_tokens if classify else model.embed_tokens
    return np.concatenate([p for p, _ in _blocks(model, source, joinids, work, cells_micro, say)])


def embed_seen(
    model: LoadedModel, source: TokenSource, joinids: I64, *, cells_micro: int = 64, say: Say
) -> tuple[F32, Flags]:
    """Embeddings (N, D), and (N,) which cells have counts of the model's genes at all."""
    parts, seen = zip(
        *_blocks(model, source, joinids, model.embed_tokens, cells_micro, say), strict=True
    )
    return np.concatenate(parts), np.concatenate(seen)


def _blocks(
    model: LoadedModel,
    source: TokenSource,
    joinids: I64,
    work: Callable[..., F32],
    cells_micro: int,
    say: Say | None,
) -> Iterator[tuple[F32, Flags]]:
    """What ``work`` gives for the tokens of each block, and which of its cells have counts."""
    started = time.perf_counter()
    for start in range(0, len(joinids), _BLOCK_CELLS):
        part = joinids[start : start + _BLOCK_CELLS]
        block = source.store.read_block(part, source.gene_map)
        tokens = tokenise_content(model.tokenizer, block)
        done = work(tokens, cells_micro=cells_micro, covariates=source.covariates(part))
        yield done, np.diff(block.indptr) > 0
        number = start + len(part)
        rate = number / (time.perf_counter() - started)
        if say:
            left = (len(joinids) - number) / rate
            say(f"{number}/{len(joinids)} cells  {rate:.0f} cells/s  ETA {left:.0f} s")


def check_embed(run: EmbedRun) -> list[str]:
    """Check a run against its model and store; returns lines for ``--check``."""
    model, cells, source, warnings = _open(run)
    found = int((source.gene_map >= 0).sum())
    return [
        f"model: {model.path} ({model.manifest.family}, width {model.backbone.width})",
        f"cells: {len(cells.joinids)}, {found} of {len(model.vocab)} vocabulary genes in the store",
        *[f"warning: {w}" for w in warnings],
    ]


def _open(run: EmbedRun) -> tuple[LoadedModel, Cells, TokenSource, list[str]]:
    model = load(run.model)
    columns = [*run.colour_by, *model.manifest.covariates]
    cells = select_cells(run.data, columns)
    source, warnings = token_source(model, cells, allow_gene_loss=run.data.allow_gene_loss)
    return model, cells, source, warnings


def _picture(run: EmbedRun, embedding: F32, obs: pd.DataFrame) -> F32:
    from cellray.bench.umap import plot_umap, umap_embedding

    coords = umap_embedding(embedding, seed=run.seed)
    colours = {
        name: obs[name].astype("string").fillna("unknown").tolist() for name in run.colour_by
    }
    plot_umap(
        coords,
        colours=colours or {"cells": ["cell"] * len(obs)},
        path=Path(run.output) / "umap.png",
        title=f"zero-shot embedding: {run.model}",
    )
    return coords


def embed(run: EmbedRun, say: Say) -> EmbedResult:
    """Embed every selected cell; the output appears whole or not at all."""
    model, cells, source, warnings = _open(run)
    for warning in warnings:
        say(f"warning: {warning}")
    folder = Path(run.output)
    folder.mkdir(parents=True, exist_ok=True)
    embedding = embed_cells(model, source, cells.joinids, cells_micro=run.cells_micro, say=say)
    obs = cells.obs.copy()
    obs.index = pd.Index(obs["soma_joinid"].astype(str), name="cell")
    result = ad.AnnData(obs=obs, obsm={"X_cellray": embedding})
    result.uns["cellray"] = {"model": model.path, "family": model.manifest.family}
    if run.umap:
        result.obsm["X_umap"] = _picture(run, embedding, obs)
    partial = folder / "embedding.h5ad.partial"
    result.write_h5ad(partial)
    partial.replace(folder / "embedding.h5ad")
    picture = str(folder / "umap.png") if run.umap else ""
    return EmbedResult(str(folder / "embedding.h5ad"), picture, *embedding.shape)
