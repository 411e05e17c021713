"""The genes that a method's model knows, and the baseline on these genes alone.

A model that knows a part of the counts is not beaten by a baseline on all of them for want of a
better idea, but for want of genes: the row says how much of the difference that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cellray.bench.entries import Entry, finetune_run
from cellray.bench.setting import Setting
from cellray.data.stats import coverage
from cellray.data.vocab import Vocab
from cellray.infer.load import LoadedModel, load
from cellray.train.finetune import prepare_finetune
from cellray.train.prepare import gene_map

__all__ = ["ENOUGH", "gene_rows", "genes_known", "loaded", "vocabulary_of"]

ENOUGH = 0.99  # share of the counts above which a model's genes are all that matter


@lru_cache(maxsize=2)
def loaded(path: str) -> LoadedModel:
    """A frozen model, read once."""
    return load(path)


def vocabulary_of(setting: Setting, entry: Entry, seed: int) -> Vocab:
    """The gene space of a method's model; one that chooses genes does so by its training cells."""
    assert entry.method is not None
    if entry.method.model:
        return loaded(entry.method.model).vocab
    own = replace(entry, base="")
    return prepare_finetune(finetune_run(setting, own, seed)).job.data.source.vocab


def genes_known(setting: Setting, vocab: Vocab) -> npt.NDArray[np.bool_]:
    """(G,) which genes of the store a vocabulary has."""
    return np.asarray(gene_map(setting.cells.store, vocab) >= 0)


def _baseline_for(setting: Setting) -> str:
    """What the row is made with: the baseline that works as the task's methods do."""
    if setting.unit.answers == "embedding":
        return "pca"
    return "knn" if setting.unit.neighbours else "logistic"


def gene_rows(setting: Setting, entries: Sequence[Entry]) -> list[Entry]:
    """A row ``logistic_on_NAME_genes`` for each set of genes that a model is confined to.

    Args:
        setting: the data set.
        entries: its other rows.

    Returns:
        One a set of genes with less than 99 % of the counts, named after the first method with it.
    """
    rows, seen = [], set()
    for entry in entries:
        if entry.base or entry.kind not in ("frozen", "finetune"):
            continue
        vocab = vocabulary_of(setting, entry, setting.run.seeds[0])
        known = genes_known(setting, vocab).tobytes()
        if known in seen:
            continue
        seen.add(known)
        found = coverage(setting.cells.store, vocab, joinids=setting.cells.joinids)
        if found.count_fraction < ENOUGH:
            unit = _baseline_for(setting)
            name = f"{unit}_on_{entry.name}_genes"
            rows.append(Entry(name, "baseline", "baseline", entry.name, entry.method, unit=unit))
    return rows
