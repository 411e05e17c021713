"""How a fine-tuned model does on a task that is answered with an embedding: scores and a picture.

Legend: N cells, D width, P principal components, V genes of a store.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cellray.baselines._features import FeatureConfig, fit_components, fit_genes
from cellray.core.errors import ConfigError
from cellray.core.section import to_dict
from cellray.infer.embed import embed_cells
from cellray.infer.load import LoadedModel
from cellray.tasks.base import asked_cells
from cellray.train.prepare import Cells

if TYPE_CHECKING:
    from cellray.train.finetune import Finetuning

__all__ = ["PICTURE", "score_embedding", "unintegrated"]

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

PICTURE = "umap.png"
_BLOCK_CELLS = 4096
_COMPONENTS = 50
_MOST_DRAWN = 20_000


def unintegrated(cells: Cells, joinids: I64, batch: str = "") -> F32:
    """Principal components of log-normalised variable genes, (N, P): cells before integration.

    Args:
        cells: the selection.
        joinids: (N,) ascending cells.
        batch: obs column; genes are chosen that vary within its values. "" takes all cells as one.
    """
    store = cells.store
    every = np.arange(store.num_genes, dtype=np.int32)
    parts = []
    for first in range(0, len(joinids), _BLOCK_CELLS):
        block = store.read_block(joinids[first : first + _BLOCK_CELLS], every)
        shape = (len(block), store.num_genes)
        parts.append(sparse.csr_matrix((block.counts, block.genes, block.indptr), shape=shape))
    counts = sparse.csr_matrix(sparse.vstack(parts))
    batches = None
    if batch:
        column = cells.obs[batch].astype(str).to_numpy()
        batches = np.unique(column[np.searchsorted(cells.joinids, joinids)], return_inverse=True)[1]
    genes = fit_genes(counts, FeatureConfig(name="unintegrated"), batches).apply(counts)
    return fit_components(genes, _COMPONENTS).apply(genes)


def score_embedding(
    model: LoadedModel, prepared: Finetuning, folder: str | Path
) -> tuple[dict[str, float], tuple[Path, ...]]:
    """Embed every cell the task asks for, each as of its own batch, and score the embedding.

    Args:
        model: the fine-tuned model.
        prepared: of its run.
        folder: receives the picture, if the task wants one.

    Returns:
        Versioned metric id -> value, and the pictures.

    Raises:
        ConfigError: the task is not answered with an embedding.
        DataError: the cells cannot be scored (no labels, too few cells).
    """
    unit = prepared.task
    if unit.score_embedding is None:
        raise ConfigError(f"task '{unit.name}' is not answered with an embedding")
    asked = asked_cells(unit, prepared.split)
    source = replace(prepared.job.data.source, tokenizer=model.manifest.tokenizer)
    embedding = embed_cells(model, source, asked)
    obs = prepared.cells.obs.iloc[np.searchsorted(prepared.cells.joinids, asked)]
    obs = obs.reset_index(drop=True)
    config = prepared.config
    before = unintegrated(prepared.cells, asked, config.batch)
    scores = unit.score_embedding(obs, config, embedding, before, prepared.job.seed)
    if not to_dict(config).get("umap", False):
        return scores, ()
    from cellray.bench.umap import plot_umap, umap_embedding

    rows = np.arange(len(asked))
    if len(rows) > _MOST_DRAWN:
        rows = np.linspace(0, len(asked) - 1, _MOST_DRAWN).astype(np.int64)
    columns = [c for c in (config.label, config.batch) if c]
    path = plot_umap(
        umap_embedding(embedding[rows], seed=prepared.job.seed),
        colours={c: obs[c].astype("string").fillna("unknown").to_numpy()[rows] for c in columns},
        path=Path(folder) / PICTURE,
        title=f"{prepared.job.name}: cell embedding after fine-tuning",
    )
    return scores, (path,)
