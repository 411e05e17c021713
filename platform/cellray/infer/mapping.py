"""The mapping job: a reference embedded once, queries labelled by their nearest cells in it.

The reference is embedded block by block into a file beside its folder; a job that is killed goes
on with the block it was at. The output appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.data.h5ad import H5adFile
from cellray.infer.embed import embed_cells, embed_seen, token_source
from cellray.infer.load import UNASSIGNED, LoadedModel, load, without_counts
from cellray.infer.reference import EMBEDDING, Origin, Reference, partial_of
from cellray.metrics.classification import score_annotation
from cellray.metrics.refusal import score_refusal
from cellray.tasks._labels import NO_LABEL, given, labels_of
from cellray.train.prepare import Cells, select_cells

if TYPE_CHECKING:
    from cellray.infer.map_config import ReferenceSection
    from cellray.runs import MapRun

__all__ = ["MapResult", "check_map", "embed_once", "map_cells", "open_reference"]

Say = Callable[[str], None]
F32 = npt.NDArray[np.float32]
_BLOCK_CELLS = 4096
_LISTED = 5
_SHOWN_SCORES = ("accuracy.v1", "macro_f1.union.v1", "macro_f1.test.v1")
_KEY, _DONE = "embedding.json", "embedded.json"


@dataclass(frozen=True)
class MapResult:
    """What a mapping gave.

    Attributes:
        path: h5ad with obs ``cellray_label``, ``cellray_confidence`` and ``cellray_distance``,
            obsm ``X_cellray``, and the counts if the query was a file.
        num_cells: query cells.
        num_unassigned: those whose neighbours agree too little.
        reference: its folder.
        num_reference: its cells.
        reused: whether the folder was there already.
        scores: versioned metric id -> value over the query cells with a label; empty without.
        umap_path: the picture, "" if none was asked for.
    """

    path: str
    num_cells: int
    num_unassigned: int
    reference: str
    num_reference: int
    reused: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    umap_path: str = ""

    def lines(self) -> list[str]:
        """What the command line prints."""
        how = "used again" if self.reused else "made"
        told = [
            f"reference: {self.reference} ({self.num_reference} cells, {how})",
            f"mapped: {self.path} ({self.num_cells} cells, {self.num_unassigned} {UNASSIGNED})",
        ]
        told += [f"query {name}: {self.scores[name]:.4f}" for name in _SHOWN_SCORES if self.scores]
        if self.scores.get("n_unseen_cells"):
            told.append(
                f"query cells of {self.scores['n_unseen_classes']:.0f} classes that the reference "
                f"lacks: {self.scores['n_unseen_cells']:.0f} of {self.scores['n_items']:.0f}, all "
                "counted as wrong"
            )
        return told + ([f"umap: {self.umap_path}"] if self.umap_path else [])


def _reference_cells(section: ReferenceSection, model: LoadedModel) -> tuple[Cells, int]:
    """The labelled cells of a reference, and how many have no label."""
    assert section.data is not None

    def columns(known: list[str]) -> list[str]:
        if section.label not in known:
            raise DataError(
                f"reference.label = '{section.label}' is no obs column of the reference; it has: "
                f"{', '.join(known)}"
            )
        donors = [c for c in section.donor_columns if c in known]
        covariates = list(model.manifest.covariates)
        return list(dict.fromkeys([section.label, *section.columns, *donors, *covariates]))

    cells = select_cells(section.data, columns)
    labelled = given(labels_of(cells.obs[section.label], NO_LABEL))
    if not labelled.any():
        raise DataError(f"no cell of the reference has a '{section.label}'")
    obs = cells.obs[labelled].reset_index(drop=True)
    return replace(cells, obs=obs), int((~labelled).sum())


def embed_once(
    model: LoadedModel,
    cells: Cells,
    folder: str | Path,
    *,
    cells_sha256: str,
    cells_micro: int,
    say: Say,
    allow_gene_loss: bool = False,
) -> F32:
    """Embed cells into the file of a reference to be, going on where an earlier attempt stopped.

    Args:
        model: embeds them.
        cells: the selection, N cells.
        folder: the reference's; the file lies in ``<folder>.partial`` until it is saved.
        cells_sha256: fingerprint of the cells: an attempt with other cells starts anew.
        cells_micro: cells of a forward pass.
        say: is told cells/s and the time left.
        allow_gene_loss: warn of genes that the model does not know instead of refusing the cells.

    Returns:
        (N, D) float32, memory-mapped.
    """
    partial = partial_of(folder)
    source, warnings = token_source(model, cells, allow_gene_loss=allow_gene_loss)
    for warning in warnings:
        say(f"warning: reference: {warning}")
    shape = (len(cells.joinids), model.backbone.width)
    key = {"origin": asdict(Origin.of(model)), "cells_sha256": cells_sha256, "shape": list(shape)}
    done = _attempted(partial, key)
    if done is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.lib.format.open_memmap(partial / EMBEDDING, "w+", np.float32, shape).flush()
        (partial / _KEY).write_text(json.dumps(key))
        done = 0
    elif done:
        say(f"{done} of {shape[0]} reference cells were embedded before; going on")
    vectors = np.lib.format.open_memmap(partial / EMBEDDING, "r+")
    began, before = time.perf_counter(), done
    for start in range(done, shape[0], _BLOCK_CELLS):
        part = cells.joinids[start : start + _BLOCK_CELLS]
        vectors[start : start + len(part)] = embed_cells(
            model, source, part, cells_micro=cells_micro
        )
        vectors.flush()
        done = start + len(part)
        marker = partial / f"{_DONE}.partial"
        marker.write_text(json.dumps({"cells": done}))
        marker.replace(partial / _DONE)
        rate = (done - before) / max(time.perf_counter() - began, 1e-9)
        left = (shape[0] - done) / rate
        say(f"reference {done}/{shape[0]} cells  {rate:.0f} cells/s  ETA {left:.0f} s")
    return vectors


def _attempted(partial: Path, key: Mapping[str, object]) -> int | None:
    """Cells that an earlier attempt of the same kind has embedded; None if there was none."""
    try:
        if json.loads((partial / _KEY).read_text()) != json.loads(json.dumps(key)):
            return None
        vectors = np.load(partial / EMBEDDING, mmap_mode="r")
    except (OSError, ValueError):
        return None
    if list(vectors.shape) != key["shape"]:
        return None
    try:
        return int(json.loads((partial / _DONE).read_text())["cells"])
    except (OSError, ValueError, KeyError):
        return 0


def open_reference(run: MapRun, model: LoadedModel, say: Say) -> tuple[Reference, bool]:
    """The reference of a run, and whether it was there already.

    Raises:
        ConfigError: the folder is missing, and no cells are given to make it of.
        DataError: the folder was made of other cells or labels, or is damaged.
        CheckpointError: it was made with another model.
    """
    section = run.reference
    if Path(section.folder).exists():
        found = Reference.load(section.folder, model)
        if section.data is not None:
            _refuse_changed(found, section, _reference_cells(section, model)[0])
        return found, True
    if section.data is None:
        raise ConfigError(
            f"there is no reference at '{section.folder}', and no [reference.data] to make it of"
        )
    cells, without = _reference_cells(section, model)
    if without:
        say(f"{without} reference cells have no '{section.label}' and are left out")
    fingerprint = cells.store.fingerprint(cells.joinids)
    embedding = embed_once(
        model,
        cells,
        section.folder,
        cells_sha256=fingerprint,
        cells_micro=run.cells_micro,
        say=say,
        allow_gene_loss=bool(section.data and section.data.allow_gene_loss),
    )
    made = Reference.build(
        embedding,
        cells.obs[section.label],
        model=model,
        obs=cells.obs.set_index("soma_joinid", drop=False),
        label=section.label,
        cells_sha256=fingerprint,
        exact_below=run.exact_below,
    )
    folder = made.save(section.folder)
    for name in (_KEY, _DONE):
        (folder / name).unlink(missing_ok=True)
    return Reference.load(folder, model), False


def _refuse_changed(found: Reference, section: ReferenceSection, cells: Cells) -> None:
    """Refuse a reference that is not of the cells and labels that the run names."""
    advice = "remove the folder to make it anew, or name another (reference.folder)"
    if found.label != section.label:
        raise DataError(
            f"the reference '{section.folder}' holds '{found.label}', the run asks for "
            f"'{section.label}'; {advice}"
        )
    fingerprint = cells.store.fingerprint(cells.joinids)
    if found.cells_sha256 != fingerprint:
        raise DataError(
            f"the reference '{section.folder}' was made of other cells ({len(found.labels)}, "
            f"{found.cells_sha256[:12]}) than [reference.data] selects ({len(cells.joinids)}, "
            f"{fingerprint[:12]}); {advice}"
        )
    labels = cells.obs[section.label].astype(str).to_numpy()
    if changed := int((found.labels.astype(str) != labels).sum()):
        raise DataError(
            f"the labels of {changed} cells of the reference '{section.folder}' differ from "
            f"'{section.label}' in the store; {advice}"
        )


def _query(
    run: MapRun, model: LoadedModel, say: Say
) -> tuple[ad.AnnData, F32, npt.NDArray[np.bool_]]:
    """The query cells (with counts if of a file), their embedding, and which have counts."""
    if run.query.data is None:
        with H5adFile(run.query.h5ad):
            pass  # says what is wrong with a file that anndata could not read
        adata = ad.read_h5ad(run.query.h5ad)
        _check_query_label(run, list(adata.obs.columns))
        say(f"{adata.n_obs} query cells of {run.query.h5ad}")
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            vectors, seen = model.embed_seen(adata, layer=run.query.layer or None)
        for remark in remarks:
            say(f"warning: queries: {remark.message}")
        return adata, vectors, seen
    cells = _query_cells(run, model)
    data = run.query.data
    source, told = token_source(model, cells, allow_gene_loss=data.allow_gene_loss)
    for warning in told:
        say(f"warning: queries: {warning}")
    vectors, seen = embed_seen(model, source, cells.joinids, cells_micro=run.cells_micro, say=say)
    if not seen.all():
        say(f"warning: queries: {without_counts(int((~seen).sum()), len(seen))}")
    obs = cells.obs.copy()
    obs.index = pd.Index(obs["soma_joinid"].astype(str), name="cell")
    return ad.AnnData(obs=obs), vectors, seen


def _query_cells(run: MapRun, model: LoadedModel) -> Cells:
    assert run.query.data is not None
    wanted = [_query_label(run), *run.reference.columns, *run.reference.donor_columns]
    covariates = list(model.manifest.covariates)

    def columns(known: list[str]) -> list[str]:
        _check_query_label(run, known)
        return list(dict.fromkeys(c for c in [*wanted, *covariates] if c in known))

    return select_cells(run.query.data, columns)


def _check_query_label(run: MapRun, known: Sequence[str]) -> None:
    if run.query.label and run.query.label not in known:
        raise ConfigError(
            f"query.label = '{run.query.label}' is no obs column of the queries."
            f"{did_you_mean(run.query.label, known)} They have: {', '.join(known)}"
        )


def _check_output(run: MapRun) -> None:
    """The queries are read again by whoever checks the answer: they are not written over."""
    if run.query.h5ad and Path(run.output).resolve() == Path(run.query.h5ad).resolve():
        raise ConfigError(f"output = '{run.output}' is the query file; name another file")


def _query_label(run: MapRun) -> str:
    return run.query.label or run.reference.label


def _leaks(reference: Reference, query: pd.DataFrame, columns: list[str]) -> list[str]:
    """Warnings of donors that are both in the reference and among the queries."""
    found = []
    for column in columns:
        if column in reference.obs and column in query:
            theirs = set(reference.obs[column].astype("string").dropna())
            both = sorted(theirs & set(query[column].astype("string").dropna()))
            if both:
                shown = ", ".join(both[:_LISTED])
                found.append(
                    f"{len(both)} values of '{column}' are both in the reference and among the "
                    f"queries ({shown}): scores of such cells are too good"
                )
    return found


def _scores(
    adata: ad.AnnData,
    answer: pd.DataFrame,
    label: str,
    classes: tuple[str, ...],
    threshold: float,
) -> dict[str, float]:
    """Annotation metrics over the queries whose label is known; empty if none is."""
    if label not in adata.obs:
        return {}
    known = given(labels_of(adata.obs[label], NO_LABEL))
    if not known.any():
        return {}
    truth = adata.obs[label].astype(str).to_numpy()[known]
    predicted = answer["label"].to_numpy()[known]
    confidence = answer["confidence"].to_numpy(np.float64)[known]
    scores = score_annotation(truth, predicted, train_classes=classes)
    return scores | score_refusal(
        truth, predicted, confidence, train_classes=classes, threshold=threshold
    )


def _picture(
    run: MapRun, reference: Reference, vectors: F32, labels: pd.Series
) -> tuple[F32, Path]:
    """UMAP of queries and (at most ``umap_cells`` of the) reference, laid out together."""
    from cellray.bench.umap import plot_umap, umap_embedding

    rng = np.random.default_rng(run.seed)
    num = min(run.umap_cells, len(reference.labels))
    rows = np.sort(rng.choice(len(reference.labels), num, replace=False))
    coords = umap_embedding(np.concatenate([reference.embedding[rows], vectors]), seed=run.seed)
    path = Path(run.output).with_suffix(".umap.png")
    plot_umap(
        coords,
        colours={
            "reference and mapped labels": [*reference.labels[rows], *labels],
            "part": ["reference"] * num + ["query"] * len(vectors),
        },
        path=path,
        title=f"{len(vectors)} queries on {num} reference cells: {run.model}",
    )
    return coords[num:], path


def map_cells(run: MapRun, say: Say) -> MapResult:
    """Make or open the reference and map the queries onto it.

    Raises:
        CellrayError: model, reference and queries do not fit each other; see
            :func:`open_reference`.
    """
    _check_output(run)
    model = load(run.model)
    reference, reused = open_reference(run, model, say)
    adata, vectors, seen = _query(run, model, say)
    for leak in _leaks(reference, adata.obs, run.reference.donor_columns):
        say(f"warning: {leak}")
    answer = reference.map(vectors, k=run.k)
    answer["confidence"] = np.where(seen, answer["confidence"], 0.0)
    same = int((answer["distance"] == 0).sum())
    if same:
        say(f"warning: {same} query cells lie exactly on a reference cell: are they in it?")
    scores = _scores(adata, answer, _query_label(run), reference.classes, run.unknown_below)
    sure = seen & (answer["confidence"] >= run.unknown_below)
    labels = answer["label"].where(sure, UNASSIGNED)
    adata.obs["cellray_label"] = pd.Categorical(labels)
    adata.obs["cellray_confidence"] = answer["confidence"].to_numpy()
    adata.obs["cellray_distance"] = answer["distance"].to_numpy()
    adata.obsm["X_cellray"] = vectors
    adata.uns["cellray"] = {
        "model": model.path,
        "reference": run.reference.folder,
        "weights_sha256": reference.origin.weights_sha256,
        "k": run.k,
        "unknown_below": run.unknown_below,
    }
    output = Path(run.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = ""
    if run.umap:
        adata.obsm["X_umap"], path = _picture(run, reference, vectors, labels)
        picture = str(path)
    partial = output.with_name(output.name + ".partial")
    adata.write_h5ad(partial)
    partial.replace(output)
    return MapResult(
        path=str(output),
        num_cells=len(answer),
        num_unassigned=int((labels == UNASSIGNED).sum()),
        reference=run.reference.folder,
        num_reference=len(reference.labels),
        reused=reused,
        scores=scores,
        umap_path=picture,
    )


def check_map(run: MapRun) -> list[str]:
    """Check model, reference and queries; embeds nothing. Returns lines for ``--check``.

    Raises:
        CellrayError: as in :func:`map_cells`.
    """
    _check_output(run)
    model = load(run.model)
    section = run.reference
    if Path(section.folder).exists():
        reference, _ = open_reference(run, model, lambda line: None)
        told = f"{len(reference.labels)} cells, used again"
    elif section.data is not None:
        cells, without = _reference_cells(section, model)
        token_source(model, cells, allow_gene_loss=section.data.allow_gene_loss)
        told = f"{len(cells.joinids)} cells to embed, {without} without '{section.label}' left out"
    else:
        raise ConfigError(
            f"there is no reference at '{section.folder}', and no [reference.data] to make it of"
        )
    lines = [
        f"model: {model.path} ({model.manifest.family}, width {model.backbone.width})",
        f"reference: {section.folder} ({told})",
    ]
    if run.query.data is None:
        return [*lines, *_check_file(run, model)]
    queries = _query_cells(run, model)
    _, warnings = token_source(model, queries, allow_gene_loss=run.query.data.allow_gene_loss)
    where = queries.store.uri
    lines.append(f"queries: {len(queries.joinids)} cells of {where}")
    return lines + [f"warning: {w}" for w in warnings]


def _check_file(run: MapRun, model: LoadedModel) -> list[str]:
    """Check a file of queries: its columns, genes and first cells."""
    with H5adFile(run.query.h5ad) as file:
        num_cells = file.num_cells
    cells = ad.read_h5ad(run.query.h5ad, backed="r")
    try:
        _check_query_label(run, list(cells.obs.columns))
        first = cells[:_BLOCK_CELLS].to_memory()
    finally:
        cells.file.close()
    model.covariates_of(first.obs)
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        model.tokens(first, layer=run.query.layer or None)
    where = "queries" if len(first) == num_cells else f"queries, the first {len(first):,}"
    told = [f"queries: {num_cells} cells of {run.query.h5ad}"]
    return told + [f"warning: {where}: {remark.message}" for remark in remarks]
