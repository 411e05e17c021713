"""A published set as a store for the benchmark: hashes, counts and columns checked on the way.

Every file becomes an h5ad of whole counts with the columns ``cell_type``, ``split`` (of sets that
are split), ``batch`` and ``donor_id`` (where there are such), which is then ingested as any other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import io, sparse

from cellray.core.errors import DataError
from cellray.core.section import to_toml
from cellray.data.h5ad import H5adFile
from cellray.data.ingest import IngestConfig, IngestReport, ingest
from cellray.data.published import Published, PublishedFile, check_hash, locate, published
from cellray.data.published_counts import COUNTS, Recovered, recover_counts
from cellray.data.split import hash_unit

__all__ = ["PublishedStore", "make_store"]

Say = Callable[[str], None]
_BLOCK_CELLS = 4096
_LISTED = 8
_ANNOTATION = "68k_pbmc_barcodes_annotation.tsv"


@dataclass(frozen=True)
class PublishedStore:
    """A set that was ingested.

    Attributes:
        name: the set.
        report: of the ingest.
        task: the ``[task]`` table to use it with.
        dataset: the same as a data set of a benchmark, with the names of set and split under
            which tables show reported values.
        sha256: file -> hash.
        left_out: batch -> cells left out because their values are no counts.
    """

    name: str
    report: IngestReport
    task: str
    dataset: str
    sha256: Mapping[str, str]
    left_out: Mapping[str, int]

    def lines(self) -> list[str]:
        """What the command line prints."""
        lost = ", ".join(f"{batch} ({n} cells)" for batch, n in self.left_out.items())
        told = [*self.report.lines()]
        told += [f"left out, no counts are known: {lost}"] if lost else []
        return [*told, "", "use it with:", self.task, "", "or in a benchmark:", self.dataset]


@dataclass
class _Cells:
    """One file in memory: its values as published, and its tables."""

    matrix: sparse.csr_matrix
    obs: pd.DataFrame
    var: pd.DataFrame


def _first(columns: Sequence[str], wanted: Sequence[str]) -> str:
    return next((name for name in wanted if name in columns), "")


def _label(entry: Published, obs: pd.DataFrame, where: Path) -> pd.Series:
    column = _first(list(obs.columns), entry.label)
    if not column:
        raise DataError(
            f"'{where}' has no obs column {' or '.join(repr(c) for c in entry.label)} with the "
            f"cell types; it has: {', '.join(map(str, obs.columns)) or 'none'}"
        )
    return obs[column]


def _check_counts_of(entry: Published, file: PublishedFile, cells: _Cells, where: Path) -> None:
    """Refuse a file of another size than the published one."""
    classes = _label(entry, cells.obs, where).nunique()
    held = {"cells": cells.matrix.shape[0], "genes": cells.matrix.shape[1], "classes": classes}
    for what, number in held.items():
        expected = getattr(file, what)
        if expected and expected != number:
            raise DataError(
                f"'{where}' holds {number} {what}, the published file {expected}: it is another "
                "version or a part of it"
            )


def _obs_of(file: H5adFile) -> pd.DataFrame:
    columns = {
        name: pd.Series(values.to_pandas() if hasattr(values, "to_pandas") else values)
        for name, values in file.obs()
    }
    frame = pd.DataFrame({name: np.asarray(c, dtype=object) for name, c in columns.items()})
    frame.index = pd.Index(file.ids().to_pylist(), dtype=object)
    return frame


def _read_layer(file: H5adFile, layer: str) -> sparse.csr_matrix:
    parts = [block for _, block in file.blocks(layer, _BLOCK_CELLS)]
    return sparse.csr_matrix(sparse.vstack(parts))


def _read_h5ad(entry: Published, path: Path) -> tuple[_Cells, Recovered, str]:
    """The file by the layer that gives the counts of most cells, and which layer that is."""
    with H5adFile(path) as file:
        order = [c for c in dict.fromkeys([*entry.layers, "X", "raw.X"]) if c in file.layers]
        if not order:
            raise DataError(
                f"'{path}' has none of the layers {', '.join([*entry.layers, 'X', 'raw.X'])}; it "
                f"has: {', '.join(file.layers) or 'none'}"
            )
        best: tuple[_Cells, Recovered, str] | None = None
        for layer in order:
            cells = _Cells(_read_layer(file, layer), _obs_of(file), file.var(layer))
            found = recover_counts(cells.matrix)
            if best is None or found.exact.sum() > best[1].exact.sum():
                best = (cells, found, layer)
            if found.exact.all():
                break
        assert best is not None
        return best


def _read_10x(path: Path) -> tuple[_Cells, Recovered, str]:
    """matrix.mtx (genes x cells) with genes.tsv, barcodes.tsv and the annotation beside it."""
    folder = path.parent
    places = [parent / _ANNOTATION for parent in (folder, *list(folder.parents)[:3])]
    annotation = next((place for place in places if place.is_file()), places[0])
    for needed in (folder / "genes.tsv", folder / "barcodes.tsv", annotation):
        if not needed.is_file():
            raise DataError(f"'{path}' is not complete: there is no file at '{needed}'")
    genes = pd.read_csv(folder / "genes.tsv", sep="\t", header=None, dtype=str)
    barcodes = pd.read_csv(folder / "barcodes.tsv", sep="\t", header=None, dtype=str)[0]
    labels = pd.read_csv(annotation, sep="\t", dtype=str)
    if "barcodes" not in labels:
        raise DataError(f"'{annotation}' has no column 'barcodes'; it has: {list(labels.columns)}")
    matrix = sparse.csr_matrix(io.mmread(path).T)
    if matrix.shape != (len(barcodes), len(genes)):
        raise DataError(
            f"'{path}' is {matrix.shape[1]} x {matrix.shape[0]} but genes.tsv has {len(genes)} "
            f"lines and barcodes.tsv {len(barcodes)}"
        )
    obs = labels.set_index("barcodes").reindex(barcodes.to_numpy())
    obs.index = pd.Index(barcodes.to_numpy(dtype=object))
    ids = pd.Index(genes[0].to_numpy(dtype=object))
    var = pd.DataFrame({"gene_symbol": genes[1].to_numpy()}, index=ids)
    return _Cells(matrix, obs, var), recover_counts(matrix), "matrix.mtx"


def _split_of(entry: Published, file: PublishedFile, labels: pd.Series) -> npt.NDArray[np.object_]:
    """``train`` or ``test`` of each cell; "" of sets that are not split."""
    if not entry.test_fraction:
        return np.full(len(labels), file.part, dtype=object)
    # in each class, the cells whose ids hash lowest: no order of the file matters
    ranks = pd.Series(hash_unit(labels.index.astype(str).to_numpy()), index=labels.index)
    texts = labels.astype(str)
    order = ranks.groupby(texts.to_numpy()).rank(method="first")
    sizes = texts.groupby(texts.to_numpy()).transform("size").to_numpy()
    test = order.to_numpy() <= np.rint(entry.test_fraction * sizes)
    return np.where(test, "test", "train").astype(object)


def _columns(entry: Published, file: PublishedFile, cells: _Cells, where: Path) -> pd.DataFrame:
    """The columns of the store."""
    labels = _label(entry, cells.obs, where)
    obs = pd.DataFrame({"cell_type": labels.to_numpy(dtype=object)}, index=cells.obs.index)
    split = _split_of(entry, file, labels)
    if any(split):
        obs["split"] = split
    for name, wanted in (("batch", entry.batch), ("donor_id", entry.donor)):
        column = _first(list(cells.obs.columns), wanted)
        if column:
            obs[name] = cells.obs[column].astype(str).to_numpy(dtype=object)
        elif name == "batch" and wanted:
            raise DataError(
                f"'{where}' has no obs column {' or '.join(repr(c) for c in wanted)} with the "
                f"batches; it has: {', '.join(map(str, cells.obs.columns))}"
            )
    return obs


def _describe(values: npt.NDArray[np.generic]) -> str:
    """What a matrix holds, for an error message."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "no finite value"
    kind = "whole" if (known == np.floor(known)).all() else "fractional"
    return f"{kind} values from {known.min():.4g} to {known.max():.4g}"


def _leave_out(
    obs: pd.DataFrame, cells: _Cells, found: Recovered, layer: str, where: Path, allowed: bool
) -> npt.NDArray[np.bool_]:
    """Cells to keep: whole batches of which every cell's counts are known."""
    if found.exact.all():
        return found.exact
    batches = (obs["batch"] if "batch" in obs else pd.Series("all cells", index=obs.index)).astype(
        str
    )
    bad = batches[~found.exact].value_counts()
    total = batches.value_counts()
    if not allowed or len(bad) == len(total):
        shown = "; ".join(f"{name}: {n} of {total[name]}" for name, n in bad.head(_LISTED).items())
        advice = (
            "--leave-out ingests the other batches"
            if len(bad) < len(total)
            else "get the raw counts from the authors, and ingest those"
        )
        raise DataError(
            f"'{where}' layer {layer} gives no raw counts for {int((~found.exact).sum())} of "
            f"{len(obs)} cells ({shown}): it holds {_describe(cells.matrix.data)}, which are "
            "neither counts nor log1p-normalised or UMI-corrected counts that come out whole. "
            f"{advice}"
        )
    return np.asarray(~batches.isin(bad.index))


def _task_of(entry: Published, obs_columns: Sequence[str]) -> dict[str, Any]:
    """The task that fits a store of the set."""
    table: dict[str, Any] = {"name": entry.task, "label": "cell_type"}
    if "batch" in obs_columns:
        table["batch"] = "batch"
    if entry.is_split:
        table["split"] = {"column": "split", "test_values": ["test"]}
    return table


def make_store(
    name: str,
    folder: str | Path,
    store: str,
    *,
    pins: Mapping[str, str] | None = None,
    leave_out: bool = False,
    progress: Say = lambda line: None,
) -> PublishedStore:
    """Ingest a published set.

    Args:
        name: one of :func:`cellray.data.published.known`.
        folder: where its files lie.
        store: the store to make.
        pins: file -> SHA-256 that it must have.
        leave_out: leave out batches whose counts are not known, instead of refusing the set.
        progress: is told what is done.

    Raises:
        ConfigError: no such set.
        DataError: a file is not present, is another than the published or pinned one, lacks a
            column, or holds no counts.
    """
    entry = published(name)
    hashes: dict[str, str] = {}
    left_out: dict[str, int] = {}
    columns: list[str] = []
    paths = locate(name, Path(folder))
    with tempfile.TemporaryDirectory(prefix="cellray-published-") as scratch:
        written = []
        for number, (file, path) in enumerate(zip(entry.files, paths, strict=True)):
            check = check_hash(file, path, pins or {})
            hashes[file.name] = check.sha256
            for line in check.lines:
                progress(line)
            cells, found, layer = (
                _read_10x(path) if entry.layout == "10x" else _read_h5ad(entry, path)
            )
            _check_counts_of(entry, file, cells, path)
            obs = _columns(entry, file, cells, path)
            keep = _leave_out(obs, cells, found, layer, path, leave_out)
            if not keep.all():
                for batch, lost in obs["batch"][~keep].astype(str).value_counts().items():
                    left_out[str(batch)] = left_out.get(str(batch), 0) + int(lost)
            how = ", ".join(f"{way} of {n} cells" for way, n in found.how.items())
            undone = "" if set(found.how) <= {COUNTS} else "; undone exactly"
            progress(f"{path}: layer {layer}: {how}{undone}")
            target = Path(scratch) / f"{number}.h5ad"
            var = cells.var.copy()
            var.index = var.index.astype(str)
            ad.AnnData(found.counts[keep], obs=obs[keep], var=var).write_h5ad(target)
            written.append(str(target))
            columns = list(obs.columns)
        report = ingest(
            IngestConfig(
                files=written,
                uri=store,
                append=False,
                organism=entry.organism,
                dataset_ids=[f"{name}/{file.part or 'all'}" for file in entry.files],
                workers=1,
            ),
            progress=progress,
        )
    task = _task_of(entry, columns)
    # with cells left out it is another split than the one that papers report values of
    split = {} if left_out else {"split_id": entry.split_id}
    whole = {**split, "data": {"uri": store}, "task": task}
    return PublishedStore(
        name,
        report,
        task=to_toml({"task": task}).strip(),
        dataset=to_toml({"datasets": {name: whole}}).strip(),
        sha256=hashes,
        left_out=left_out,
    )
