"""A reference of labelled cells that were embedded once, and the mapping of others onto it.

Layout of a reference folder
    reference.json   format, model and its fingerprints, cells, label column, index; written last
    embedding.npy    (N, D) float32, memory-mapped when it is read
    obs.parquet      the label and the obs columns that were kept, one row a cell
    index/           how it is searched, and the checksum of the embedding

Legend: N cells of the reference, Q query cells, D width of the embedding, K neighbours.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from cellray.baselines._vote import count_votes
from cellray.core.errors import CheckpointError, DataError, did_you_mean
from cellray.infer.load import UNASSIGNED, LoadedModel, load
from cellray.infer.neighbour_index import EXACT_BELOW, NeighbourIndex

__all__ = ["EXACT_BELOW", "NEIGHBOURS", "Origin", "Reference", "partial_of"]

FORMAT = "cellray.reference.v1"
NEIGHBOURS = 10  # scGPT's reference mapping (doi:10.1038/s41592-024-02201-0)
EMBEDDING = "embedding.npy"
_ROWS_AT_ONCE = 65_536
_FACTS, _OBS, _INDEX = "reference.json", "obs.parquet", "index"

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


def partial_of(folder: str | Path) -> Path:
    """Where a reference is put together before it takes its place."""
    path = Path(folder)
    return path.with_name(path.name + ".partial")


@dataclass(frozen=True)
class Origin:
    """What made an embedding; an empty one says that no model of cellray did.

    Attributes:
        model: where it was loaded from.
        family: its family.
        weights_sha256: over names, shapes and values of the backbone's tensors.
        vocab_sha256: fingerprint of its gene space.
        settings: its configuration, its tokenizer's, and the covariates it knows.
    """

    model: str = ""
    family: str = ""
    weights_sha256: str = ""
    vocab_sha256: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(model: LoadedModel) -> Origin:
        """The origin of what ``model`` embeds; a classifier on top of it plays no part."""
        manifest = model.manifest
        settings = {
            "model": dict(manifest.model),
            "tokenizer": dict(manifest.tokenizer),
            "covariates": {name: list(levels) for name, levels in manifest.covariates.items()},
        }
        return Origin(
            model=model.path,
            family=manifest.family,
            weights_sha256=_tensors_sha256(model.backbone.state_dict()),
            vocab_sha256=manifest.vocab_fingerprint,
            settings=json.loads(json.dumps(settings)),
        )

    def refuse_other(self, other: Origin, where: str) -> None:
        """Refuse a model that embeds elsewhere than the one the reference was made with.

        Raises:
            CheckpointError: family, gene space, weights or settings differ, or the reference was
                made without a model.
        """
        advice = "map with the model it was made with, or make a reference for this one"
        if not self.weights_sha256:
            raise CheckpointError(
                f"{where} was made of an embedding that no model is known of; map embeddings of "
                "the same origin onto it, not cells"
            )
        pairs = [
            ("family", self.family, other.family),
            ("gene space", self.vocab_sha256[:12], other.vocab_sha256[:12]),
            ("weights", self.weights_sha256[:12], other.weights_sha256[:12]),
        ]
        for what, ours, theirs in pairs:
            if ours != theirs:
                raise CheckpointError(
                    f"{where} was made with another model ('{self.model}'): its {what} is {ours}, "
                    f"that of '{other.model}' {theirs}; {advice}"
                )
        for name in sorted({*self.settings, *other.settings}):
            if self.settings.get(name) != other.settings.get(name):
                raise CheckpointError(
                    f"{where} was made with other settings of '{name}' than '{other.model}' has: "
                    f"{_differing(self.settings.get(name), other.settings.get(name))}; {advice}"
                )


def _differing(ours: Any, theirs: Any) -> str:
    """The first key in which two tables differ, with both values."""
    ours, theirs = ours or {}, theirs or {}
    key = next(k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k))
    return f"{key} = {ours.get(key)} there, {theirs.get(key)} here"


def _tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Reference:
    """Labelled cells in a model's embedding.

    Attributes:
        embedding: where each cell lies.
        labels: (N,) a label of each.
        obs: (N,) rows of the columns that were kept.
        origin: what made the embedding.
        label: name of the column the labels come from.
        cells_sha256: fingerprint of the cells, "" if unknown.
        exact_below: references with fewer cells are searched exactly.

    Shapes:
        embedding: (N, D) float32.
    """

    embedding: F32
    labels: npt.NDArray[np.object_]
    obs: pd.DataFrame
    origin: Origin
    label: str
    cells_sha256: str
    exact_below: int
    folder: str = ""

    @staticmethod
    def build(
        embedding: npt.NDArray[np.floating],
        labels: Sequence[str] | npt.NDArray[np.generic] | pd.Series,
        *,
        model: LoadedModel | None = None,
        obs: pd.DataFrame | None = None,
        label: str = "cell_type",
        cells_sha256: str = "",
        exact_below: int = EXACT_BELOW,
    ) -> Reference:
        """Make a reference of cells that are embedded.

        Args:
            embedding: (N, D), e.g. ``model.embed(adata)``.
            labels: N labels.
            model: what embedded them; None for an embedding of another origin (principal
                components), onto which embeddings can be mapped, but no cells.
            obs: N rows to keep beside the labels.
            label: name for the labels.
            cells_sha256: fingerprint of the cells.
            exact_below: with fewer cells neighbours are found exactly, with more by FAISS.

        Raises:
            DataError: nothing to refer to, lengths that differ, values that are not finite, or
                cells without a label.
        """
        vectors = embedding if isinstance(embedding, np.memmap) else np.asarray(embedding)
        vectors = vectors.astype(np.float32, copy=False)
        texts = np.asarray(labels, dtype=object)
        if vectors.ndim != 2 or not vectors.size:
            raise DataError(f"a reference needs (cells, width) vectors; given: {vectors.shape}")
        if texts.shape != (len(vectors),) or (obs is not None and len(obs) != len(vectors)):
            rows = len(vectors) if obs is None else len(obs)
            raise DataError(
                f"a reference of {len(vectors)} embedded cells was given {len(texts)} labels and "
                f"{rows} rows of obs; give one a cell"
            )
        if missing := int(pd.isna(texts).sum()):
            raise DataError(
                f"{missing} of {len(texts)} reference cells have no '{label}'; leave them out"
            )
        _refuse_not_finite(vectors, "reference cells")
        kept = pd.DataFrame(index=pd.RangeIndex(len(vectors))) if obs is None else obs
        return Reference(
            embedding=vectors,
            labels=np.array([str(text) for text in texts], dtype=object),
            obs=kept.drop(columns=label, errors="ignore"),
            origin=Origin() if model is None else Origin.of(model),
            label=label,
            cells_sha256=cells_sha256,
            exact_below=exact_below,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Its labels, sorted, each once."""
        return tuple(sorted(set(self.labels)))

    @cached_property
    def index(self) -> NeighbourIndex:
        """What finds the nearest cells."""
        kept = Path(self.folder) / _INDEX
        if self.folder and kept.is_dir():
            return NeighbourIndex.load(kept, self.embedding)
        return NeighbourIndex.build(self.embedding, exact_below=self.exact_below)

    def save(self, folder: str | Path) -> Path:
        """Write the reference; it appears whole or not at all.

        Raises:
            DataError: there is something at ``folder`` already.
        """
        target, partial = Path(folder), partial_of(folder)
        if target.exists():
            raise DataError(f"there is something at '{target}' already; remove it or name another")
        partial.mkdir(parents=True, exist_ok=True)
        if not _lies_at(self.embedding, partial / EMBEDDING):
            np.save(partial / EMBEDDING, self.embedding)
        obs = self.obs.assign(**{self.label: self.labels.astype(str)})
        obs.index = obs.index.astype(str)
        obs.to_parquet(partial / _OBS)
        shutil.rmtree(partial / _INDEX, ignore_errors=True)
        self.index.save(partial / _INDEX, with_embedding=False)
        facts = {
            "format": FORMAT,
            "origin": asdict(self.origin),
            "label": self.label,
            "cells_sha256": self.cells_sha256,
            "cells": len(self.embedding),
            "width": self.embedding.shape[1],
            "exact_below": self.exact_below,
        }
        (partial / _FACTS).write_text(json.dumps(facts, indent=1))
        os.replace(partial, target)
        return target

    @staticmethod
    def load(folder: str | Path, model: LoadedModel | None = None) -> Reference:
        """Open a reference; its embedding stays on the disk until it is needed.

        Args:
            folder: from :meth:`save`.
            model: what will embed the queries; None leaves that to :meth:`map`.

        Raises:
            DataError: there is no reference, or it is damaged.
            CheckpointError: the model is not the one it was made with.
        """
        path = Path(folder)
        if not (path / _FACTS).is_file():
            near = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
            raise DataError(f"no reference at '{path}'.{did_you_mean(path.name, near)}")
        try:
            facts = json.loads((path / _FACTS).read_text())
            if facts.get("format") != FORMAT:
                raise DataError(f"'{path}' has format {facts.get('format')!r}, not '{FORMAT}'")
            origin = Origin(**facts["origin"])
            embedding = np.load(path / EMBEDDING, mmap_mode="r")
            obs = pd.read_parquet(path / _OBS)
            labels = obs.pop(facts["label"]).to_numpy(dtype=object)
            shape = (facts["cells"], facts["width"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the reference '{path}' is damaged: {error}") from error
        if embedding.shape != shape or len(obs) != shape[0]:
            raise DataError(
                f"the reference '{path}' is damaged: {shape[0]} cells x {shape[1]} are promised, "
                f"the embedding is {embedding.shape} and obs has {len(obs)} rows"
            )
        found = Reference(
            embedding=embedding,
            labels=labels,
            obs=obs,
            origin=origin,
            label=facts["label"],
            cells_sha256=facts["cells_sha256"],
            exact_below=facts["exact_below"],
            folder=str(path),
        )
        if model is not None:
            found.refuse_other(model)
        return found

    def refuse_other(self, model: LoadedModel) -> None:
        """Refuse a model other than the one the reference was made with.

        Raises:
            CheckpointError: says in what they differ.
        """
        self.origin.refuse_other(Origin.of(model), f"the reference '{self.folder or self.label}'")

    def _embedder(self, model: LoadedModel | None) -> LoadedModel:
        """The model given, or the one the reference names, once it is known to be its own."""
        if model is None and self.origin.weights_sha256:
            model = load(self.origin.model)
        other = Origin() if model is None else Origin.of(model)
        self.origin.refuse_other(other, f"the reference '{self.folder or self.label}'")
        assert model is not None, "a reference without a model has refused every other"
        return model

    def map(
        self,
        query: ad.AnnData | npt.NDArray[np.floating],
        *,
        model: LoadedModel | None = None,
        k: int = NEIGHBOURS,
        unknown_below: float = 0.0,
        layer: str | None = None,
    ) -> pd.DataFrame:
        """Label cells by the vote of their nearest reference cells (Euclidean distance).

        Args:
            query: Q cells with raw counts, or their (Q, D) embedding.
            model: what embeds cells; None loads the one that the reference names.
            k: reference cells that vote, one vote each; all of them if there are fewer. A tie
                goes to the class of the nearest among the tied.
            unknown_below: a cell whose winner has a smaller share of the votes is ``Unassigned``.
            layer: layer of the query with raw counts; None takes ``X``.

        Returns:
            ``label``, ``confidence`` (the winner's share of the votes) and ``distance`` (to the
            nearest reference cell, in units of the embedding), one row a cell.

        Raises:
            DataError: an embedding of another width, values that are not finite, or cells that
                the model cannot embed.
            CheckpointError: cells are given, and the model is not that of the reference.
        """
        if k < 1 or not 0 <= unknown_below <= 1:
            raise DataError(
                f"k = {k}, unknown_below = {unknown_below:g}: give k >= 1 and a share from 0 to 1"
            )
        if isinstance(query, ad.AnnData):
            embedding = self._embedder(model).embed(query, layer=layer)
            found = self.map(embedding, k=k, unknown_below=unknown_below)
            return found.set_index(query.obs_names)
        vectors = np.asarray(query, dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.embedding.shape[1]:
            raise DataError(
                f"queries of shape {vectors.shape} cannot be mapped onto a reference of width "
                f"{self.embedding.shape[1]}; embed them with the model of the reference"
            )
        _refuse_not_finite(vectors, "queries")
        if not len(vectors):
            return _answer(np.empty(0, dtype=object), np.empty(0), np.empty(0))
        distances, rows = self.index.search(vectors, min(k, len(self.embedding)))
        classes, codes = np.unique(self.labels.astype(str), return_inverse=True)
        winners, shares = _vote(codes.astype(np.int64)[rows])
        labels = classes.astype(object)[winners]
        labels[shares < unknown_below] = UNASSIGNED
        return _answer(labels, shares, distances[:, 0])


def _lies_at(vectors: F32, file: Path) -> bool:
    """Whether an array is that file, memory-mapped."""
    mapped = getattr(vectors, "filename", None)
    return mapped is not None and file.exists() and os.path.samefile(mapped, file)


def _refuse_not_finite(vectors: F32, whose: str) -> None:
    """Refuse NaN and infinity, looking at some rows at a time."""
    steps = range(0, len(vectors), _ROWS_AT_ONCE)
    bad = sum(int((~np.isfinite(vectors[i : i + _ROWS_AT_ONCE])).any(1).sum()) for i in steps)
    if bad:
        raise DataError(f"the embeddings of {bad} of {len(vectors)} {whose} are not finite")


def _vote(codes: I64) -> tuple[I64, F64]:
    """Winners and shares of (Q, K) neighbours' codes, some queries at a time."""
    steps = range(0, len(codes), _ROWS_AT_ONCE)
    parts = [count_votes(codes[i : i + _ROWS_AT_ONCE]) for i in steps]
    winners, shares = zip(*parts, strict=True)
    return np.concatenate(winners), np.concatenate(shares)


def _answer(labels: npt.NDArray[np.object_], confidence: F64, distance: F64) -> pd.DataFrame:
    return pd.DataFrame({"label": labels, "confidence": confidence, "distance": distance})
