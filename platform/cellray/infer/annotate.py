"""Labels for the cells of an h5ad file, written into a copy of it, block by block."""

from __future__ import annotations

import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import pandas as pd
from anndata.io import read_elem, write_elem

from cellray import __version__
from cellray.core.errors import ConfigError, DataError
from cellray.infer.load import UNASSIGNED, LoadedModel, checked_cutoff, load

__all__ = ["CONFIDENCE", "LABEL", "AnnotateReport", "annotate_file"]

LABEL, CONFIDENCE = "cellray_label", "cellray_confidence"  # obs columns of the output
_FACTS = "cellray_annotation"  # in uns
_BLOCK_CELLS = 4096

Say = Callable[[str], None]


@dataclass(frozen=True)
class AnnotateReport:
    """What was written.

    Attributes:
        path: the h5ad.
        counts: label -> cells, ``Unassigned`` among them.
        seconds: of labelling.
    """

    path: str
    counts: dict[str, int]
    seconds: float

    def lines(self) -> list[str]:
        """What the command line prints."""
        total = sum(self.counts.values())
        told = [f"{name}: {number}" for name, number in self.counts.items()]
        rate = total / max(self.seconds, 1e-9)
        return [*told, f"{self.path}: {total} cells, {rate:.0f} cells/s (obs '{LABEL}')"]


def _check_paths(source: Path, target: Path) -> None:
    if not source.is_file():
        raise DataError(f"no h5ad file at '{source}'")
    if target.exists():
        raise ConfigError(f"'{target}' exists; give a file that does not")
    if not target.parent.is_dir():
        raise ConfigError(f"no folder '{target.parent}' for '{target.name}'; make it first")


def annotate_file(
    model: str,
    source: str | Path,
    target: str | Path,
    *,
    layer: str | None = None,
    refuse_below: float | None = None,
    say: Say = lambda line: None,
) -> AnnotateReport:
    """Copy an h5ad file and add what a model calls its cells; the copy appears whole or not at all.

    obs gets ``cellray_label`` and ``cellray_confidence``, uns the model and the cutoff; all else
    stays as it is. Counts are read and labelled block by block.

    Args:
        model: checkpoint folder, run directory or MLflow model URI.
        source: h5ad with raw counts.
        target: a file that does not exist.
        layer: with raw counts; None takes ``X``.
        refuse_below: see :meth:`cellray.infer.load.LoadedModel.annotate`.
        say: receives progress, and warnings about genes.

    Raises:
        ConfigError: the target exists, or its folder does not; ``refuse_below`` is no probability.
        DataError: no such file, not h5ad, no cells, or cells that the model cannot take.
        CheckpointError: there is no model, or it has no classifier.
    """
    given, wanted = Path(source), Path(target)
    _check_paths(given, wanted)
    if refuse_below is not None:
        checked_cutoff(refuse_below)
    loaded = load(model)
    started = time.perf_counter()
    found = _labels(loaded, given, layer, refuse_below, say)
    seconds = time.perf_counter() - started
    partial = wanted.with_name(wanted.name + ".partial")
    try:
        shutil.copyfile(given, partial)
        with h5py.File(partial, "r+") as file:
            obs = read_elem(file["obs"])
            obs[LABEL] = pd.Categorical(found["label"])
            obs[CONFIDENCE] = found["probability"].to_numpy()
            del file["obs"]
            write_elem(file, "obs", obs)
            facts = {
                "model": model,
                "family": loaded.manifest.family,
                "refuse_below": float(loaded.cutoff if refuse_below is None else refuse_below),
                "cellray_version": __version__,
            }
            uns = file.require_group("uns")
            if _FACTS in uns:
                del uns[_FACTS]
            write_elem(uns, _FACTS, facts)
        partial.replace(wanted)
    finally:
        partial.unlink(missing_ok=True)
    counts = dict(Counter(found["label"].tolist()).most_common())
    if UNASSIGNED in counts:  # last, whatever its number
        counts[UNASSIGNED] = counts.pop(UNASSIGNED)
    return AnnotateReport(str(wanted), counts, seconds)


def _labels(
    model: LoadedModel, source: Path, layer: str | None, refuse_below: float | None, say: Say
) -> pd.DataFrame:
    """Label and probability of every cell of the file, in order."""
    try:
        cells = ad.read_h5ad(source, backed="r")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"'{source}' cannot be read as h5ad: {error}") from error
    try:
        if not cells.n_obs:
            raise DataError(f"'{source}' holds no cells")
        parts, said = [], set[str]()
        started = time.perf_counter()
        for start in range(0, cells.n_obs, _BLOCK_CELLS):
            block = cells[start : start + _BLOCK_CELLS].to_memory()
            with warnings.catch_warnings(record=True) as remarks:
                warnings.simplefilter("always", UserWarning)
                parts.append(model.annotate(block, layer=layer, refuse_below=refuse_below))
            for text in dict.fromkeys(str(remark.message) for remark in remarks):
                if text not in said:
                    said.add(text)
                    say(f"warning: {text}")
            done = start + block.n_obs
            rate = done / (time.perf_counter() - started)
            left = (cells.n_obs - done) / rate
            say(f"{done}/{cells.n_obs} cells  {rate:.0f} cells/s  ETA {left:.0f} s")
        return pd.concat(parts)
    finally:
        cells.file.close()
