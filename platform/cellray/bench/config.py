"""The sections of a benchmark: data sets with their splits, methods, and how a file becomes both.

A file may have one data set, as ``[data]`` and ``[task]``, or several, as ``[datasets.NAME]``; what
stands in the shared ``[data]`` and ``[task]`` holds for each of them. Either way a validated run
has ``datasets`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, create_model, model_validator

from cellray.core.errors import ConfigError
from cellray.core.section import Section, merge
from cellray.data.config import DataSection

if TYPE_CHECKING:
    from cellray.runs import BenchmarkRun

__all__ = ["DatasetSection", "MethodSection", "method_section", "plug_benchmark"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class MethodSection(Section):
    """A row of the table that a model makes.

    Attributes:
        config: fine-tuning configuration file, run once per data set and seed.
        model: checkpoint folder or MLflow model URI, used as it is: its frozen embedding is what is
            scored, or what ``head`` is fitted on.
        head: what turns a frozen embedding into labels: ``logistic`` (on standardised training
            cells, strength by inner folds) or ``knn``; ``auto`` is the task's own way.
        overrides: ``section.key=value`` laid over ``config``.
        scratch_config: fine-tuning file of the row from scratch, where that was tuned on its own
            (in as many trials); "" gives it ``config``, and a budget of 1.
        tuning_budget: configurations tried to arrive at this one, on validation cells; shown.
    """

    config: str = ""
    scratch_config: str = ""
    model: str = ""
    head: Literal["auto", "logistic", "knn"] = "auto"
    overrides: list[str] = []
    tuning_budget: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_kind(self) -> MethodSection:
        if bool(self.config) == bool(self.model):
            raise ValueError(
                "a method has either config (a fine-tuning file) or model (a checkpoint that is "
                f"used frozen), not {'both' if self.config else 'neither'}"
            )
        if self.scratch_config and not self.config:
            raise ValueError(
                "scratch_config is the file of the row from scratch beside a fine-tuned one; a "
                "model that is used frozen has none"
            )
        return self


class DatasetSection(Section):
    """A data set and its split.

    Attributes:
        data: the cells.
        task: what is scored and how cells are split; keys beside those of the shared ``[task]``.
        methods: rows that this set alone has, or has otherwise; as in the benchmark's own.
        overrides: ``section.key=value`` laid over every method's file for this set.
        license: as stated by its source; shown.
        split_id: the split's published name (``scgpt_v1``), under which reported values stand
            beside measured ones; "" takes what is held out.
    """

    data: DataSection
    task: Section
    methods: dict[str, MethodSection] = {}
    overrides: list[str] = []
    license: str = ""
    split_id: str = ""


def method_section(run: BenchmarkRun, dataset: str, name: str) -> MethodSection:
    """What a row of a data set is."""
    return {**run.methods, **run.datasets[dataset].methods}[name]


def _spelled_out(table: dict[str, Any]) -> None:
    """Methods given as a path alone, as tables: a file to fine-tune by, or a checkpoint."""
    methods = table.get("methods")
    if isinstance(methods, dict):
        for name, given in methods.items():
            if isinstance(given, str):
                methods[name] = {"config" if given.endswith(".toml") else "model": given}


def _check_names(names: Iterable[str], what: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"'{name}' cannot be the name of a {what}: it becomes that of a folder; use "
                "letters, digits, '.', '_' and '-'"
            )


def _default_name(raw: Mapping[str, Any]) -> str:
    """A data set's name where the file has one without a name: that of its store."""
    uri = raw.get("data", {}).get("uri", "data") if isinstance(raw.get("data"), Mapping) else "data"
    first = uri[0] if isinstance(uri, list) and uri else uri
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(str(first)).name).lstrip("._-") or "data"


def _fold(raw: dict[str, Any]) -> dict[str, Any]:
    """Move ``[data]`` and ``[task]`` into each data set; returns the data sets' tables."""
    shared = {key: raw.pop(key) for key in ("data", "task") if raw.get(key) is not None}
    tables = raw.setdefault("datasets", {}) or {}
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ConfigError("'datasets' holds tables: write [datasets.NAME] with uri under data")
    if not tables:
        if not {"data", "task"} <= set(shared):
            raise ConfigError(
                "a benchmark needs cells and a task: give [data] and [task], or [datasets.NAME] "
                "tables with data and task"
            )
        tables = {_default_name(shared): {}}
    raw["datasets"] = {name: merge(shared, table) for name, table in tables.items()}
    return raw["datasets"]  # type: ignore[no-any-return]


def plug_benchmark(
    raw: dict[str, Any], plug_task: Callable[[dict[str, Any]], type[Section]]
) -> dict[str, Any]:
    """The type of ``datasets`` in this run, with the task's configuration in it.

    Args:
        raw: the run's tables; ``data`` and ``task`` are moved into ``datasets``.
        plug_task: the configuration class of a raw table's task.

    Raises:
        ConfigError: no data set, one without a task, or more than one task.
    """
    tables = _fold(raw)
    for table in (raw, *tables.values()):
        _spelled_out(table)
    _check_names(tables, "data set")
    for table in (raw, *tables.values()):
        _check_names(table.get("methods") or {}, "method")
    types = {name: plug_task(table) for name, table in tables.items()}
    if len(set(types.values())) > 1:
        named = ", ".join(f"{name}: {tables[name]['task']['name']}" for name in tables)
        raise ConfigError(
            f"the data sets have different tasks ({named}); a table has one: make a benchmark each"
        )
    concrete = create_model(
        DatasetSection.__name__,
        __base__=DatasetSection,
        __module__=__name__,
        task=(next(iter(types.values())), ...),
    )
    return {"datasets": dict[str, concrete]}
