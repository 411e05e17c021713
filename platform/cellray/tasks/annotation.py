"""Cell-type annotation: learn labels on some donors, predict them on others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator

from cellray.core.errors import DataError, did_you_mean
from cellray.core.section import Section
from cellray.data.split import hash_unit
from cellray.metrics.classification import score_annotation
from cellray.models.base import EmbedsCells
from cellray.tasks._labels import NO_LABEL, column_texts, given, labels_of
from cellray.tasks._refusal import RefuseSection
from cellray.tasks.base import Split, Targets, Task, TaskConfig, check_columns, ids_sha256

__all__ = ["TASK", "AnnotationConfig", "AnnotationSplit", "annotation_split", "annotation_targets"]

BoolArray = npt.NDArray[np.bool_]
Labels = Sequence[str] | npt.NDArray[np.generic]

JOINID, CELL_KEY = "soma_joinid", "cellray_cell_key"
_ENOUGH_GROUPS = 10  # below it, whole groups make a validation set of one or two donors
_LISTED = 12


class AnnotationSplit(Section):
    """How cells are divided. Give ``test_values``, or ``test_fraction``, not both.

    Attributes:
        column: obs column whose values are kept whole between training and test (e.g.
            ``donor_id``); "" splits cell by cell.
        test_values: values of ``column`` whose cells are the test set.
        test_fraction: share of the column's values (or of the cells) drawn as the test set by a
            stable hash that no seed changes.
        validation_fraction: share of the remaining cells (or groups) set apart for model choice;
            which ones, the seed decides.
        validation_by: ``cell``, ``group`` (whole values of ``column``), or ``auto``: group if at
            least 10 of them remain.
    """

    column: str = ""
    test_values: list[str] = []
    test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    validation_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    validation_by: Literal["auto", "cell", "group"] = "auto"

    @model_validator(mode="after")
    def _one_test(self) -> AnnotationSplit:
        if bool(self.test_values) == bool(self.test_fraction):
            raise ValueError(
                "give either test_values (held-out values of column) or test_fraction, not "
                f"{'both' if self.test_values else 'neither'}"
            )
        if not self.column and (self.test_values or self.validation_by == "group"):
            key = "test_values" if self.test_values else 'validation_by = "group"'
            raise ValueError(f"{key} needs column, the obs column that holds the groups")
        return self


class AnnotationConfig(TaskConfig):
    """Keys of the annotation task.

    Attributes:
        ignore_labels: values of it that mean "no label".
        split: how cells are divided.
        donor_columns: obs columns that would make better units than single cells: a split by
            cell is flagged if one of them is there.
        refuse: which cells are left without a label.
    """

    name: str = "annotation"
    ignore_labels: list[str] = list(NO_LABEL)
    split: AnnotationSplit
    donor_columns: list[str] = ["donor_id", "donor", "patient", "individual", "subject"]
    refuse: RefuseSection = RefuseSection()


def _check_named(config: AnnotationConfig, available: Sequence[str]) -> None:
    wanted = {"task.label": config.label}
    if config.split.column:
        wanted["task.split.column"] = config.split.column
    check_columns(available, wanted)


def _columns(config: AnnotationConfig, available: Sequence[str]) -> list[str]:
    """The columns to read: the named ones, and the donors that a split by cell would mix."""
    _check_named(config, available)
    if not config.split.column:
        return [config.label, *(c for c in config.donor_columns if c in available)]
    return list(dict.fromkeys([config.label, config.split.column]))


def _check(obs: pd.DataFrame, config: AnnotationConfig) -> None:
    _check_named(config, [c for c in map(str, obs.columns) if c not in (JOINID, CELL_KEY)])
    if JOINID not in obs:
        raise DataError(f"the cells have no '{JOINID}' column; read them from a store")


def _labels(obs: pd.DataFrame, config: AnnotationConfig) -> npt.NDArray[np.object_]:
    """Labels as text, None where there is none."""
    return labels_of(obs[config.label], config.ignore_labels)


def _groups(obs: pd.DataFrame, config: AnnotationConfig) -> npt.NDArray[np.object_]:
    if config.split.column:
        return column_texts(obs[config.split.column])
    return _cell_names(obs)


def _cell_names(obs: pd.DataFrame) -> npt.NDArray[np.object_]:
    """What the split of a cell by itself depends on: its key, or its joinid where it has none."""
    names = obs[CELL_KEY if CELL_KEY in obs else JOINID].astype(str)
    return np.asarray(names, dtype=object)


def _check_test_values(groups: npt.NDArray[np.object_], split: AnnotationSplit) -> None:
    there = sorted({str(g) for g in groups if g is not None})
    absent = [value for value in split.test_values if value not in there]
    if absent:
        more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
        raise DataError(
            f"task.split.test_values: no cell has {split.column} = '{absent[0]}'."
            f"{did_you_mean(absent[0], there)} There are: {', '.join(there[:_LISTED])}{more}"
        )


def _lowest(groups: npt.NDArray[np.object_], fraction: float, *, salt: int) -> BoolArray:
    """Cells of the distinct groups that hash lowest: ``fraction`` of them, at least one."""
    names = np.array(sorted({str(g) for g in groups}), dtype=np.str_)
    wanted = max(1, round(fraction * len(names))) if fraction and len(names) else 0
    chosen = names[np.argsort(hash_unit(names, salt=salt), kind="stable")[:wanted]]
    return np.isin(groups.astype(str), chosen)


def _test_mask(groups: npt.NDArray[np.object_], split: AnnotationSplit) -> BoolArray:
    if split.test_values:
        return np.isin(groups.astype(str), split.test_values)
    if split.column:
        return _lowest(groups, split.test_fraction, salt=-1)
    return np.asarray(hash_unit(groups.astype(str), salt=-1) < split.test_fraction)


def _validation_mask(
    obs: pd.DataFrame, groups: npt.NDArray[np.object_], split: AnnotationSplit, *, seed: int
) -> tuple[BoolArray, str]:
    """Validation among the cells given (those not in the test set), and its unit."""
    num_groups = len(set(groups)) if split.column else 0
    whole = split.validation_by == "group" or (
        split.validation_by == "auto" and num_groups >= _ENOUGH_GROUPS
    )
    if whole:
        return _lowest(groups, split.validation_fraction, salt=seed), split.column
    return np.asarray(hash_unit(_cell_names(obs), salt=seed) < split.validation_fraction), "cell"


def _split_warnings(
    obs: pd.DataFrame, config: AnnotationConfig, labels: npt.NDArray[np.object_], part: pd.Series
) -> tuple[str, ...]:
    found = []
    donors = [c for c in config.donor_columns if c in obs and obs[c].nunique() > 1]
    if not config.split.column and donors:
        found.append(
            f"cells are split one by one although obs has '{donors[0]}': the score is "
            "in-distribution, cells of the same donor are on both sides; set task.split.column"
        )
    train, test = set(labels[part == "train"]), labels[part == "test"]
    unseen = sorted(set(test) - train)
    if unseen:
        num = int(np.isin(test.astype(str), unseen).sum())
        found.append(
            f"{len(unseen)} test classes ({num} of {len(test)} test cells) are not among the "
            f"training cells and count as wrong: {', '.join(unseen[:_LISTED])}"
        )
    only = sorted(set(labels[part == "validation"]) - train)
    if only:
        found.append(f"classes found in validation but not in training: {', '.join(only)}")
    return tuple(found)


def annotation_split(obs: pd.DataFrame, config: AnnotationConfig, *, seed: int) -> Split:
    """Divide labelled cells into training, validation and test; a pure function of its arguments.

    The test set does not depend on ``seed``; validation does. Hashes are of the cells' own ids or
    of group names, so appending cells moves no old cell of a split by cell, and at most as many
    whole groups as were added.

    Args:
        obs: N cells with ``soma_joinid``, the label and the split column, and
            ``cellray_cell_key`` where cells have ids of their own.
        config: the task's section.
        seed: chooses the validation cells.

    Raises:
        DataError: a missing column, test values that no cell has, or an empty part.
    """
    _check(obs, config)
    obs = obs.reset_index(drop=True)
    labels, groups = _labels(obs, config), _groups(obs, config)
    if config.split.test_values:
        _check_test_values(groups, config.split)
    no_label, no_group = ~given(labels), ~given(groups)
    left_out = {"no label": int(no_label.sum()), "no group": int((no_group & ~no_label).sum())}
    kept = np.flatnonzero(~no_label & ~no_group)
    if not len(kept):
        raise DataError(
            f"no cell has a label: all {len(obs)} values of '{config.label}' are missing or in "
            f"task.ignore_labels ({', '.join(repr(v) for v in config.ignore_labels)})"
        )
    obs, labels, groups = obs.iloc[kept], labels[kept], groups[kept]
    test = _test_mask(groups, config.split)
    validation = np.zeros(len(kept), dtype=bool)
    rest = np.flatnonzero(~test)
    inside, unit = _validation_mask(obs.iloc[rest], groups[rest], config.split, seed=seed)
    validation[rest] = inside
    part = pd.Series(np.where(test, "test", np.where(validation, "validation", "train")))
    _check_parts(part, config)
    joinids = obs[JOINID].to_numpy(dtype=np.int64)
    parts = {p: np.sort(joinids[part == p]) for p in ("train", "validation", "test")}
    return Split(
        **parts,
        split_sha256=ids_sha256(parts["test"]),
        unit=config.split.column or "cell",
        validation_unit=unit,
        left_out={why: num for why, num in left_out.items() if num},
        warnings=_split_warnings(obs, config, labels, part),
    )


def _check_parts(part: pd.Series, config: AnnotationConfig) -> None:
    split = config.split
    for name in ("train", "test", *(["validation"] if split.validation_fraction else [])):
        if not (part == name).any():
            what = (
                f"test_values {split.test_values}"
                if split.test_values
                else f"test_fraction {split.test_fraction}"
            )
            raise DataError(
                f"the split leaves no labelled {name} cell ({what}, validation_fraction "
                f"{split.validation_fraction} of {len(part)} labelled cells); change task.split"
            )


def annotation_targets(obs: pd.DataFrame, config: AnnotationConfig, split: Split) -> Targets:
    """The class list, sorted, from training cells alone, and every cell's code.

    Args:
        obs: the N cells that were split.
        config: the task's section.
        split: from :func:`annotation_split`.

    Raises:
        DataError: a missing column, or fewer than two classes to learn.
    """
    _check(obs, config)
    labels = _labels(obs, config)
    training = np.isin(obs[JOINID].to_numpy(dtype=np.int64), split.train) & given(labels)
    classes = tuple(sorted(set(labels[training])))
    if len(classes) < 2:
        raise DataError(
            f"the training cells have {len(classes)} class of '{config.label}' "
            f"({', '.join(classes) or 'none'}); annotation needs at least two"
        )
    code_of = {name: code for code, name in enumerate(classes)}
    codes = np.array([code_of.get(label, -1) for label in labels], dtype=np.int64)
    return Targets(objective="classification", classes=classes, codes=codes)


def _score(truth: Labels, predicted: Labels, classes: Sequence[str]) -> dict[str, float]:
    return score_annotation(truth, predicted, train_classes=classes)


TASK = Task(
    name="annotation",
    config=AnnotationConfig,
    needs=(EmbedsCells,),
    columns=_columns,
    split=annotation_split,
    fit=annotation_targets,
    score=_score,
    headline="macro_f1.union.v1",
    compulsory=("majority", "logistic", "knn", "hvg", "harmony"),
)
