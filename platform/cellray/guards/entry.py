"""All checks of one data set and its split: what is refused, what a reader must know.

:func:`guard_split` is cheap and belongs before anything is fitted; :func:`check_table_data` adds
what is worth reading the counts for, once a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.data.contents import content_hashes, keeps_hashes, near_hashes
from cellray.data.dataset_name import is_synthetic
from cellray.data.stats import check_coverage, coverage
from cellray.data.stores import AnyStore
from cellray.data.vocab import Vocab
from cellray.guards.confounding import check_covariates, confounding, confounding_warnings
from cellray.guards.parts import UNIT_COLUMNS, check_parts, units_on_both_sides
from cellray.guards.twins import Twins, find_twins, without_twins
from cellray.tasks.base import Split, TaskConfig, task

__all__ = ["GuardReport", "SelectedCells", "check_table_data", "guard_split", "near_twins"]

I64 = npt.NDArray[np.int64]

READ_AT_MOST = 200_000  # cells whose counts are read for these checks
_BATCHES = ("batch", "batch_id", "dataset_id", "study", "assay", "tech", "platform")
_JOINID = "soma_joinid"


class SelectedCells(Protocol):
    """The cells of a run: where they are and what is known of them."""

    @property
    def store(self) -> AnyStore:
        """The store, or several read as one."""
        ...

    @property
    def obs(self) -> pd.DataFrame:
        """One row a cell, ascending by ``soma_joinid``."""
        ...

    @property
    def joinids(self) -> I64:
        """(N,) ascending."""
        ...


@dataclass(frozen=True)
class GuardReport:
    """What the checks found.

    Attributes:
        split: the split, without the training cells that ``task.duplicates`` drops.
        warnings: sentences that a table must show; those of the split come first.
        facts: numbers behind them, JSON-like.
    """

    split: Split
    warnings: list[str]
    facts: dict[str, Any] = field(default_factory=dict)


def _answers_with_labels(config: TaskConfig) -> bool:
    return task(config.name).answers == "labels"


def _exact(cells: SelectedCells, split: Split) -> Twins | None:
    """Twins by the hash of all counts; None where finding them would mean reading too many."""
    joinids = np.sort(np.concatenate([split.train, split.validation, split.test]))
    if not keeps_hashes(cells.store) and len(joinids) > READ_AT_MOST:
        return None
    return find_twins(split, joinids, content_hashes(cells.store, joinids))


def guard_split(
    cells: SelectedCells, split: Split, config: TaskConfig, *, covariates: Sequence[str] = ()
) -> GuardReport:
    """The split that may be trained on, and what is known of it without reading counts.

    The copies and parts of a task that is answered with an embedding are not looked at: its methods
    see all cells, and no label.

    Args:
        cells: the selection.
        split: of the task.
        config: the task's section; ``duplicates`` says what becomes of copies.
        covariates: obs columns that models are told with each cell.

    Raises:
        DataError: parts that overlap or are empty, copies across the split, or a covariate that is
            the label.
    """
    facts: dict[str, Any] = {"split.unit": split.unit, "synthetic": is_synthetic(cells.store)}
    told: list[str] = []
    if _answers_with_labels(config):
        check_parts(split)
        twins = _exact(cells, split)
        if twins is None:
            told.append(
                f"copies across the split were not looked for: '{cells.store.uri}' keeps no "
                f"content hashes, and more than {READ_AT_MOST:,} cells would be read"
            )
        else:
            split = without_twins(split, twins, config.duplicates)
            facts |= {
                "duplicates.test": len(twins.test),
                "duplicates.train_validation": len(twins.seen),
                "duplicates.validation_in_train": twins.inside,
            }
        if twins is not None and twins.inside:
            told.append(
                f"{twins.inside} validation cells have the same counts as a training cell: what is "
                "chosen by validation looks better than it is"
            )
        told += _unit_warnings(cells, split)
    more, found = _confounding(cells, split, config, covariates)
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    facts |= {**found, **{f"cells.{name}": len(part) for name, part in parts.items()}}
    warnings = tuple(dict.fromkeys([*split.warnings, *told, *more]))
    return GuardReport(replace(split, warnings=warnings), list(warnings), facts)


def _confounding(
    cells: SelectedCells, split: Split, config: TaskConfig, covariates: Sequence[str]
) -> tuple[list[str], dict[str, Any]]:
    """Association of the label with batches, donors, the split's column and covariates."""
    store = cells.store
    if not store.has_obs(config.label):
        return [], {}
    donor = [c for c in UNIT_COLUMNS if store.has_obs(c)][:1]
    wanted = [config.batch, split.unit, *_BATCHES, *donor, *covariates]
    columns = [c for c in dict.fromkeys(wanted) if c and c != config.label and store.has_obs(c)]
    obs = _with(cells, [config.label, *columns])
    inside = np.isin(cells.joinids, np.concatenate([split.train, split.validation, split.test]))
    obs = obs[inside & obs[config.label].notna().to_numpy()]
    if obs.empty:
        return [], {}
    labels = obs[config.label].astype(str).to_numpy()
    values = {c: obs[c].astype("string").fillna("(missing)").to_numpy() for c in columns}
    found = confounding(labels, values)
    check_covariates(found, covariates, label=config.label)
    facts: dict[str, Any] = {f"cramers_v.{one.column}": one.cramers_v for one in found}
    facts |= {f"only_in_one.{one.column}": dict(one.single) for one in found if one.single}
    return confounding_warnings(found, label=config.label), facts


def _unit_warnings(cells: SelectedCells, split: Split) -> list[str]:
    """Donors on both sides of a split by another column; a split by cell warns of them itself."""
    if split.unit == "cell" or split.unit in UNIT_COLUMNS:
        return []
    columns = [c for c in UNIT_COLUMNS if cells.store.has_obs(c)]
    return units_on_both_sides(_with(cells, columns), split, columns) if columns else []


def _with(cells: SelectedCells, columns: Sequence[str]) -> pd.DataFrame:
    """What obs says of the selection, with further columns of the store."""
    lacking = [c for c in columns if c not in cells.obs]
    if not lacking:
        return cells.obs
    more = cells.store.obs(lacking)
    rows = np.searchsorted(more[_JOINID].to_numpy(), cells.joinids)
    found = more[lacking].iloc[rows].reset_index(drop=True)
    return pd.concat([cells.obs.reset_index(drop=True), found], axis=1)


def near_twins(cells: SelectedCells, split: Split) -> Twins:
    """Cells across the split with the same 64 largest genes and the same total, but other counts.

    Reads the counts of all cells of the split.
    """
    joinids = np.sort(np.concatenate([split.train, split.validation, split.test]))
    same = find_twins(split, joinids, content_hashes(cells.store, joinids))
    others = replace(split, test=np.setdiff1d(split.test, same.test))
    return find_twins(others, joinids, near_hashes(cells.store, joinids))


def check_table_data(
    cells: SelectedCells,
    split: Split,
    config: TaskConfig,
    *,
    covariates: Sequence[str] = (),
    vocab: Vocab | None = None,
    allow_gene_loss: bool = False,
    near: bool = True,
) -> GuardReport:
    """Everything that can be said of a data set before a method sees it.

    Args:
        cells: the selection.
        split: of the task, as it is or from :func:`guard_split`.
        config: the task's section.
        covariates: obs columns that models are told with each cell.
        vocab: a model's gene space, to see what is lost of the cells.
        allow_gene_loss: warn of a loss of more than 40 % of the counts instead of refusing it.
        near: look for near copies too, which reads the counts of at most 200,000 cells.

    Raises:
        DataError: as :func:`guard_split`, or genes that do not match.
    """
    report = guard_split(cells, split, config, covariates=covariates)
    told, facts = list(report.warnings), dict(report.facts)
    if near and _answers_with_labels(config):
        more, found = _near(cells, report.split)
        told, facts = [*told, *more], facts | found
    if vocab is not None:
        covered = coverage(cells.store, vocab, joinids=cells.joinids)
        told += check_coverage(covered, vocab, refuse=not allow_gene_loss)
        facts |= {
            "genes_in": covered.genes_in_store,
            "genes_matched": covered.genes_matched,
            "umi_fraction_matched": covered.count_fraction,
        }
    return GuardReport(report.split, told, facts)


def _near(cells: SelectedCells, split: Split) -> tuple[list[str], dict[str, Any]]:
    asked = len(split.train) + len(split.validation) + len(split.test)
    if asked > READ_AT_MOST:
        return [f"near copies were not looked for: {asked:,} cells would be read"], {}
    twins = near_twins(cells, split)
    facts = {"duplicates.near_test": len(twins.test)}
    if not len(twins.test):
        return [], facts
    pairs = ", ".join(f"{ours} and {theirs}" for ours, theirs in twins.examples)
    return [
        f"{len(twins.test):,} of {len(split.test):,} test cells are near copies of training or "
        f"validation cells: the same 64 largest genes and the same total (joinids {pairs})"
    ], facts
