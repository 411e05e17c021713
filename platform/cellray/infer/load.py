"""A trained model ready for AnnData: load, embed, annotate."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import torch

from cellray.core.batch import CellBatch
from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.errors import CheckpointError, ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.collate import collate_tokens
from cellray.data.stats import VocabCoverage, check_coverage
from cellray.data.tokens import make_tokenizer, tokenise_content, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import (
    CellClassifier,
    CellModel,
    EmbedsCells,
    GeneClassifier,
    family,
)
from cellray.tokenizers.base import Tokenizer
from cellray.train.checkpoint import Manifest, model_of, read_checkpoint

__all__ = [
    "UNASSIGNED",
    "LoadedModel",
    "block_of",
    "checked_cutoff",
    "load",
    "local_folder",
    "without_counts",
]

UNASSIGNED = "Unassigned"  # the label of a cell that no class is sure of

# Cells with fewer of the model's genes (a selection of variable ones) are worth a word.
MIN_GENE_FRACTION = 0.25

F32 = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


def block_of(adata: ad.AnnData, vocab: Vocab, *, layer: str | None = None) -> CellBlock:
    """Cells of an AnnData as a block over a vocabulary, whatever order its genes come in.

    Gene ids are looked for in ``var['feature_id']``, ``var['ensembl_id']``, ``var['gene_ids']``
    and the index, symbols in ``var['feature_name']``, ``var['gene_symbol']`` and the index; the
    pair that matches the most genes of the vocabulary is taken.

    Args:
        adata: N cells with raw counts.
        vocab: the model's gene space.
        layer: layer with raw counts; None takes ``X``.

    Raises:
        DataError: counts that are not raw, or no gene in common with the vocabulary.
    """
    return _covered_block(adata, vocab, layer)[0]


def without_counts(empty: int, num_cells: int) -> str:
    """What is said of cells of which the model sees nothing."""
    return (
        f"{empty:,} of {num_cells:,} cells have no counts of the model's genes: nothing is known "
        "of them"
    )


def _covered_block(
    adata: ad.AnnData, vocab: Vocab, layer: str | None
) -> tuple[CellBlock, VocabCoverage]:
    """The block of :func:`block_of`, and how much of the cells the vocabulary knows."""
    matrix = _counts(adata, layer)
    _check_raw(matrix.data)
    genes = _match(adata.var, vocab)
    _check_repeats(adata.var, genes, vocab)
    library = np.asarray(matrix.sum(axis=1), dtype=np.float32).reshape(-1)
    order = np.argsort(genes, kind="stable")
    order = order[genes[order] >= 0]
    chosen = sp.csr_matrix(matrix[:, order])
    chosen.eliminate_zeros()
    chosen.sort_indices()
    matched, total = float(chosen.sum()), float(library.sum())
    _check_loss(matched, total, len(order), vocab)
    covered = VocabCoverage(
        genes_in_store=adata.n_vars,
        genes_matched=len(order),
        count_fraction=matched / total if total else 1.0,
        cells_sampled=adata.n_obs,
        example_ids=tuple(str(name) for name in adata.var_names[:3]),
        genes_per_cell=tuple(np.diff(chosen.indptr).tolist()),
    )
    block = CellBlock(
        joinids=np.arange(adata.n_obs, dtype=np.int64),
        indptr=chosen.indptr.astype(np.int64),
        genes=genes[order][chosen.indices].astype(np.int32),
        counts=chosen.data.astype(np.float32),
        library_sizes=library,
    )
    return block, covered


def _counts(adata: Any, layer: str | None) -> sp.csr_matrix:
    if not isinstance(adata, ad.AnnData):
        raise DataError(f"cells are given as {type(adata).__name__}; give an AnnData")
    if layer is not None and layer not in adata.layers:
        raise DataError(f"no layer '{layer}'; there are: {', '.join(adata.layers) or 'none'}")
    if layer is None and adata.X is None:
        raise DataError(f"X is empty; pass layer='...': {', '.join(adata.layers) or 'none there'}")
    return sp.csr_matrix(adata.X if layer is None else adata.layers[layer], dtype=np.float32)


def _check_repeats(var: pd.DataFrame, genes: npt.NDArray[np.int32], vocab: Vocab) -> None:
    known, times = np.unique(genes[genes >= 0], return_counts=True)
    twice = [vocab.gene_ids[g] for g in known[times > 1]]
    if twice:
        raise DataError(
            f"{len(twice)} genes occur more than once among the {len(var)} columns: "
            f"{', '.join(twice[:5])}; add their counts up or drop all but one"
        )


def _check_loss(matched: float, total: float, num_genes: int, vocab: Vocab) -> None:
    """Refuse cells without a single count that the model knows."""
    if total and not matched:
        raise DataError(
            f"none of the counts lie on the {num_genes} genes shared with the model's vocabulary "
            f"({', '.join(vocab.gene_ids[:3])}, ...); are these cells of the same organism?"
        )


def _check_raw(values: F32) -> None:
    bad = ~np.isfinite(values) | (values < 0) | (values != np.floor(values))
    if bad.any():
        raise DataError(
            f"the model needs raw counts, but the matrix holds {values[bad][0]:.4g} (NaN, negative "
            "or not an integer); pass layer='...' with the raw counts"
        )


def _match(var: pd.DataFrame, vocab: Vocab) -> npt.NDArray[np.int32]:
    index = [str(name) for name in var.index]
    ids = [
        [str(x) if x else index[i] for i, x in enumerate(var[c].astype("string").fillna(""))]
        for c in ("feature_id", "ensembl_id", "gene_ids")
        if c in var
    ]
    names = [
        var[c].astype("string").fillna("").tolist()
        for c in ("feature_name", "gene_symbol", "gene_symbols", "gene_name")
        if c in var
    ]
    best = np.full(len(index), -1, dtype=np.int32)
    for feature_ids in [*ids, index]:
        for symbols in [*names, index]:
            found = vocab.match(feature_ids, symbols)
            if (found >= 0).sum() > (best >= 0).sum():
                best = found
    if not (best >= 0).any():
        raise DataError(
            f"none of the {len(index)} genes ({', '.join(index[:3])}, ...) is in the model's "
            f"vocabulary of {len(vocab)} ({', '.join(vocab.gene_ids[:3])}, ...); give Ensembl ids "
            "or symbols of the organism the model was trained on"
        )
    return best


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its gene space and tokenizer.

    Attributes:
        model: the module, in eval mode on the CPU.
        vocab: its gene space.
        manifest: how it was trained.
        path: where it was loaded from.
        folder: where its files lie on this machine; "" for one that was not loaded.
    """

    model: CellModel
    vocab: Vocab
    manifest: Manifest
    path: str
    folder: str = ""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Blocks of cells -> tokens."""
        return make_tokenizer(self.manifest.tokenizer, self.vocab)

    @property
    def backbone(self) -> CellModel:
        """The family's model, without a classifier."""
        if isinstance(self.model, CellClassifier | GeneClassifier):
            return self.model.backbone
        return self.model

    @property
    def cutoff(self) -> float:
        """A cell whose best class has a lower probability gets no label.

        Chosen at the end of fine-tuning (``[task.refuse]``); else the family's own (scBERT 0.5,
        TOSICA 0.1, others none).
        """
        chosen = self.manifest.refuse_below
        return family(self.manifest.family).refuse_below if chosen is None else chosen

    def batches(
        self,
        tokens: TokenBlock,
        *,
        cells_micro: int = 64,
        covariates: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> Iterator[tuple[npt.NDArray[np.int64], CellBatch]]:
        """Padded batches of cells of like length, with the rows each holds."""
        order = np.argsort(np.diff(tokens.indptr), kind="stable")
        codes = {name: np.zeros(len(tokens), dtype=np.int64) for name in self.manifest.covariates}
        codes |= dict(covariates or {})
        for start in range(0, len(order), cells_micro):
            rows = order[start : start + cells_micro]
            part = tokens.take(rows)
            here = {name: code[rows] for name, code in codes.items()}
            yield rows, collate_tokens(part, pad=self.vocab.pad, covariates=here)

    def embed_tokens(
        self,
        tokens: TokenBlock,
        *,
        cells_micro: int = 64,
        covariates: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> F32:
        """Zero-shot cell embeddings of tokenised cells, (N, D) in their order.

        Raises:
            CheckpointError: the family gives no cell embeddings.
        """
        backbone = self.backbone
        if not isinstance(backbone, EmbedsCells):
            raise CheckpointError(f"family '{self.manifest.family}' does not embed cells")
        result = np.zeros((len(tokens), backbone.width), dtype=np.float32)
        with torch.no_grad():
            for rows, batch in self.batches(tokens, cells_micro=cells_micro, covariates=covariates):
                result[rows] = backbone.embed_cells(batch).float().numpy()
        return result

    def classify_tokens(
        self,
        tokens: TokenBlock,
        *,
        cells_micro: int = 64,
        covariates: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> F32:
        """Class probabilities of tokenised cells, (N, C) in their order.

        Raises:
            CheckpointError: the model has no classifier.
        """
        if isinstance(self.model, GeneClassifier):
            raise CheckpointError(
                f"'{self.path}' classifies the genes of a cell, not cells; for labels of cells "
                "fine-tune it: cellray finetune (init_from takes it)"
            )
        if not isinstance(self.model, CellClassifier):
            raise CheckpointError(
                f"'{self.path}' has no classifier; fine-tune it first: cellray finetune"
            )
        result = np.zeros((len(tokens), len(self.manifest.classes)), dtype=np.float32)
        with torch.no_grad():
            for rows, batch in self.batches(tokens, cells_micro=cells_micro, covariates=covariates):
                logits = self.model(batch).predictions["class_logits"]
                result[rows] = torch.softmax(logits.float(), dim=-1).numpy()
        return result

    def tokens(self, adata: ad.AnnData, *, layer: str | None = None) -> TokenBlock:
        """Tokenise the cells of an AnnData; warns of what the model will not see of them."""
        return self._tokens(adata, layer, stacklevel=4)[0]

    def _tokens(
        self, adata: ad.AnnData, layer: str | None, *, stacklevel: int
    ) -> tuple[TokenBlock, Flags]:
        """Tokens, and which cells (N,) have no counts of the model's genes."""
        block, covered = _covered_block(adata, self.vocab, layer)
        for remark in self._remarks(covered):
            warnings.warn(remark, stacklevel=stacklevel)
        return tokenise_content(self.tokenizer, block), np.diff(block.indptr) == 0

    def _remarks(self, covered: VocabCoverage) -> list[str]:
        """What is lost of cells: genes the model does not know, genes it misses, cut cells."""
        remarks = check_coverage(covered, self.vocab)
        if covered.genes_matched < MIN_GENE_FRACTION * len(self.vocab):
            remarks.append(
                f"{len(self.vocab) - covered.genes_matched:,} of the model's {len(self.vocab):,} "
                "genes are not among the genes of the cells: to the model they are not expressed"
            )
        unit = tokenizer_unit(self.manifest.tokenizer["name"])
        limit = unit.max_genes(build_section(unit.config, self.manifest.tokenizer))
        cut = covered.longer_than(limit, unit.when_longer)
        empty = covered.genes_per_cell.count(0)
        if empty:
            remarks.append(without_counts(empty, covered.cells_sampled))
        return [*remarks, cut] if cut else remarks

    def covariates_of(self, obs: pd.DataFrame) -> dict[str, npt.NDArray[np.int64]]:
        """Codes of the covariates the model was trained with, (N,) each, from columns of obs.

        Raises:
            DataError: a column is missing, or has a value the model was not trained with.
        """
        from cellray.train.prepare import encode

        wanted = list(self.manifest.covariates)
        missing = [name for name in wanted if name not in obs]
        if missing:
            known = ", ".join(self.manifest.covariates[missing[0]][:5])
            raise DataError(
                f"the model was trained with the covariates {', '.join(wanted)}, and obs has no "
                f"column {', '.join(missing)}; add it, with values such as {known}"
            )
        return encode(obs, wanted, self.manifest.covariates)[0]

    def embed(self, adata: ad.AnnData, *, layer: str | None = None) -> F32:
        """Zero-shot cell embeddings, (N, D); ``obs`` gives the model's covariates, if it has any.

        Warns where many counts or genes are lost, and where cells are longer than is kept.

        Raises:
            DataError: counts that are not raw, genes of another organism, or missing covariates.
        """
        codes = self.covariates_of(adata.obs)
        return self.embed_tokens(self.tokens(adata, layer=layer), covariates=codes)

    def embed_seen(self, adata: ad.AnnData, *, layer: str | None = None) -> tuple[F32, Flags]:
        """As :meth:`embed`, and (N,) which cells have counts of the model's genes at all."""
        codes = self.covariates_of(adata.obs)
        tokens, empty = self._tokens(adata, layer, stacklevel=3)
        return self.embed_tokens(tokens, covariates=codes), ~empty

    def annotate(
        self, adata: ad.AnnData, *, layer: str | None = None, refuse_below: float | None = None
    ) -> pd.DataFrame:
        """Predicted label and its probability for each cell, indexed like ``adata.obs``.

        Args:
            adata: N cells with raw counts.
            layer: layer with raw counts; None takes ``X``.
            refuse_below: a cell whose best class has a lower probability is ``Unassigned``; None
                takes the model's own :attr:`cutoff`. A cell without counts of the model's genes is
                ``Unassigned`` whatever it is, with probability 0.

        Raises:
            ConfigError: ``refuse_below`` is no probability.
            DataError: as in :meth:`embed`.
        """
        cutoff = self.cutoff if refuse_below is None else checked_cutoff(refuse_below)
        codes = self.covariates_of(adata.obs)
        tokens, empty = self._tokens(adata, layer, stacklevel=3)
        probabilities = self.classify_tokens(tokens, covariates=codes)
        best = probabilities.argmax(axis=1)
        labels = np.asarray(self.manifest.classes, dtype=object)[best]
        sure = np.where(empty, np.float32(0), probabilities.max(axis=1))
        labels[empty | (sure < cutoff)] = UNASSIGNED
        return pd.DataFrame({"label": labels, "probability": sure}, index=adata.obs_names)


def checked_cutoff(refuse_below: float) -> float:
    """``refuse_below`` as it was given.

    Raises:
        ConfigError: it is no probability.
    """
    if not 0 <= refuse_below <= 1:  # NaN too
        raise ConfigError(
            f"refuse_below = {refuse_below}: a cell is refused below a probability, so give 0 "
            "(refuse none) to 1, or leave it out for the model's own"
        )
    return refuse_below


def load(path: str) -> LoadedModel:
    """Load a checkpoint folder, a run directory, or an MLflow model URI (``models:/name/1``).

    Raises:
        CheckpointError: there is no model, or it is torn.
    """
    folder = local_folder(path)
    manifest, vocab, weights = read_checkpoint(folder)
    model = model_of(manifest, vocab)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in '{path}' do not fit its own configuration: {error}"
        ) from error
    return LoadedModel(model.eval(), vocab, manifest, str(path), str(folder))


def local_folder(path: str) -> Path:
    """The folder of an exported model, of a run directory's, or of a copy of a model URI's.

    Raises:
        CheckpointError: the URI holds no checkpoint.
    """
    if path.startswith(("models:/", "runs:/", "mlflow-artifacts:/")):
        from mlflow.artifacts import download_artifacts

        fetched = Path(download_artifacts(artifact_uri=path))
        found: list[Any] = sorted(fetched.rglob("manifest.json"))
        if not found:
            raise CheckpointError(f"'{path}' holds no cellray checkpoint")
        return Path(found[0].parent)
    folder = Path(path)
    return folder / "model" if (folder / "model" / "manifest.json").is_file() else folder
