"""The entries of a table: baselines, methods, and the controls that methods bring along."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cellray.baselines.base import BaselineUnit, baseline, check_available
from cellray.bench.config import MethodSection, method_section
from cellray.bench.setting import Setting
from cellray.bench.table import MethodFamily
from cellray.core.errors import ConfigError
from cellray.core.section import apply_overrides, merge, read_toml, to_dict
from cellray.tasks.base import Task
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import tracking_uri

if TYPE_CHECKING:
    from cellray.runs import BenchmarkRun, FinetuneRun

__all__ = [
    "Entry",
    "check_names",
    "compulsory_of",
    "entries_of",
    "finetune_run",
    "made_by",
    "run_directory",
]

Kind = Literal["baseline", "finetune", "frozen", "random"]


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        name: shown; a negative or positive control ends in ``.negative`` or ``.positive``.
        kind: how it comes to its answers: a baseline, a fine-tuning run, a frozen checkpoint, or a
            frozen body with random weights.
        family: what kind of method a reader takes it for.
        base: the method whose control it is, "" for others.
        method: the section that says which model; None for baselines.
        scratch: a fine-tuning run that starts from drawn weights.
        unit: key of the baseline.
    """

    name: str
    kind: Kind
    family: MethodFamily
    base: str = ""
    method: MethodSection | None = None
    scratch: bool = False
    unit: str = ""

    @property
    def config(self) -> str:
        """The fine-tuning file; that of the row from scratch may be another than its method's."""
        assert self.method is not None
        own = self.method.scratch_config if self.base and self.scratch else ""
        return own or self.method.config

    @property
    def tuning_budget(self) -> int:
        """Trials spent on this row's own configuration."""
        assert self.method is not None
        borrowed = bool(self.base) and self.scratch and not self.method.scratch_config
        return 1 if borrowed else self.method.tuning_budget


def _applies(unit: BaselineUnit, setting: Setting) -> bool:
    """Whether a baseline can be run on a data set: one that corrects batches needs two."""
    if not unit.needs_batches:
        return True
    batches = setting.batches(setting.cells.joinids)
    return batches is not None and len(set(batches.tolist())) > 1


def _shown_as(unit: BaselineUnit) -> str:
    return f"{unit.name}.{unit.control}" if unit.control else unit.name


def _needed(setting: Setting) -> list[str]:
    """Keys of the baselines that this data set's table cannot do without."""
    return [name for name in setting.unit.compulsory if _applies(baseline(name), setting)]


def compulsory_of(setting: Setting) -> list[str]:
    """The rows without which this data set's table is not shown, by name."""
    return [_shown_as(baseline(name)) for name in _needed(setting)]


def _check_answers(unit: Task, found: BaselineUnit) -> None:
    """A baseline must be able to answer; one of labels is probed in a table of embeddings."""
    if unit.answers == "labels" and "labels" not in found.answers:
        raise ConfigError(
            f"baseline '{found.name}' gives no labels ({found.title}), which task '{unit.name}' "
            "asks for; leave it out of baselines"
        )


def _baselines(setting: Setting) -> list[Entry]:
    asked = setting.run.baselines or list(setting.unit.compulsory)
    for name in asked:
        baseline(name)  # a typo is named as such, before what is missing because of it
    absent = [name for name in _needed(setting) if name not in asked]
    if absent:
        raise ConfigError(
            f"baselines = {asked} lacks {', '.join(absent)}; a table of task "
            f"'{setting.unit.name}' is not shown without {', '.join(_needed(setting))}"
        )
    rows = []
    for name in asked:
        unit = baseline(name)
        if _applies(unit, setting):
            check_available(unit)
            _check_answers(setting.unit, unit)
            rows.append(Entry(_shown_as(unit), "baseline", unit.family, unit=name))
    return rows


def _check_kind(unit: Task, name: str, method: MethodSection) -> None:
    if method.config and unit.neighbours:
        raise ConfigError(
            f"method '{name}' has config = '{method.config}', but task '{unit.name}' trains "
            'nothing: it takes frozen models; give model = "CHECKPOINT"'
        )
    if method.head != "auto" and (method.config or unit.answers == "embedding"):
        raise ConfigError(
            f"method '{name}': head = '{method.head}' turns the embedding of a frozen model into "
            "labels; leave it out beside config, and in tasks that score the embedding itself"
        )


def _of_method(setting: Setting, name: str) -> list[Entry]:
    """A method's own row and its controls."""
    method = method_section(setting.run, setting.name, name)
    _check_kind(setting.unit, name, method)
    if method.model:
        rows = [Entry(name, "frozen", "foundation_zs", method=method)]
    else:
        raw = _raw(setting, method, method.config)
        pretrained = bool(raw.get("init_from")) and bool(raw.get("init_weights", True))
        if method.scratch_config and not pretrained:
            raise ConfigError(
                f"method '{name}' has scratch_config = '{method.scratch_config}', but its own "
                f"file '{method.config}' has no init_from: it trains from scratch itself"
            )
        rows = [
            Entry(
                name,
                "finetune",
                "foundation_ft" if pretrained else "from_scratch",
                method=method,
                scratch=not pretrained,
            )
        ]
        if pretrained:
            scratch = f"{name}_scratch"
            rows.append(Entry(scratch, "finetune", "from_scratch", name, method, scratch=True))
    rows.append(Entry(f"{name}_random", "random", "random_init", name, method))
    return rows


def left_out(setting: Setting) -> list[str]:
    """Baselines that were asked for and cannot be run on this data set, and why."""
    absent = [name for name in setting.run.baselines if not _applies(baseline(name), setting)]
    return [
        f"baseline '{name}' is left out: it corrects batches, and there are none (task.batch)"
        for name in absent
    ]


def entries_of(setting: Setting) -> list[Entry]:
    """All rows of a data set's table.

    Raises:
        ConfigError: a compulsory baseline is left out or its package is not installed, two rows
            have one name, or a method does not fit the task.
    """
    rows = _baselines(setting)
    for name in {**setting.run.methods, **setting.section.methods}:
        rows += _of_method(setting, name)
    check_names(rows)
    return rows


def check_names(rows: Sequence[Entry]) -> None:
    """See that every row has a name of its own.

    Raises:
        ConfigError: two have one.
    """
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two rows would be called {', '.join(twice)}; give methods names that no baseline and "
            "no control has"
        )


def _raw(setting: Setting, method: MethodSection, path: str) -> dict[str, object]:
    read = setting.files.get(path) or read_toml(path)
    own = method.overrides if path == method.config else []
    raw = apply_overrides(read, own)
    return apply_overrides(raw, [*setting.run.overrides, *setting.section.overrides])


def _experiment(run: BenchmarkRun, unit: Task) -> str:
    return run.tracking.experiment or f"benchmark-{unit.name}"


def _shared_cores(scale: Mapping[str, Any], concurrent: int) -> dict[str, Any]:
    """The scale section with threads of CPU workers, where several runs share the cores."""
    if scale.get("threads_per_worker") or scale.get("gpus_per_worker"):
        return dict(scale)
    cores = (os.cpu_count() or 1) // (int(scale.get("workers") or 1) * concurrent)
    return {**scale, "threads_per_worker": max(1, cores)}


_SHARED: Sequence[str] = (
    "uri",
    "timestamp",
    "tiledb",
    "measurement",
    "layer",
    "obs_filter",
    "min_genes_per_cell",
    "held_out",
    "held_out_by",
)


def finetune_run(setting: Setting, row: Entry, seed: int) -> FinetuneRun:
    """The fine-tuning run of one cell of the table, validated.

    Its task and selection of cells are the benchmark's, whatever its own file says.

    Raises:
        ConfigError: as in :func:`cellray.runs.build_run`.
    """
    from cellray.runs import FinetuneRun, build_run

    assert row.method is not None
    run = setting.run
    data = to_dict(setting.section.data)
    raw = merge(
        _raw(setting, row.method, row.config),
        {
            "name": f"{row.name}-seed{seed}",
            "seed": seed,
            "data": {key: data[key] for key in _SHARED}
            | ({"allow_gene_loss": True} if data["allow_gene_loss"] else {}),
            "checkpoint": {"dir": str(setting.directory)},
            "tracking": to_dict(run.tracking)
            | {
                "mlflow_uri": tracking_uri(run.tracking, run.checkpoint.dir),
                "experiment": _experiment(run, setting.unit),
            },
        },
    )
    raw["task"] = to_dict(setting.config)
    raw["scale"] = _shared_cores(raw.get("scale") or {}, run.concurrent)
    if row.base and raw.get("init_from"):
        raw["init_weights"] = False
    if seed != run.seeds[0] or row.base:
        raw.pop("register_as", None)  # one version a method, not one a seed
    built = build_run("finetune", raw, source=f"{row.config} for '{row.name}'")
    assert isinstance(built, FinetuneRun)
    return built


def made_by(setting: Setting, entry: Entry, seed: int) -> dict[str, Any]:
    """The whole configuration that decides an entry's answers."""
    if entry.kind == "baseline":
        unit = baseline(entry.unit)
        return to_dict(unit.config(name=unit.name)) | {"revision": unit.revision}
    assert entry.method is not None
    if entry.method.config:
        return to_dict(finetune_run(setting, entry, seed))
    return to_dict(entry.method)


def run_directory(setting: Setting, row: Entry, seed: int) -> RunDirectory:
    """Where the fine-tuning run of one cell of the table lies."""
    return RunDirectory(str(setting.directory), f"{row.name}-seed{seed}")
