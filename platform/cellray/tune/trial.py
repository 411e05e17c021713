"""The fine-tuning run of one trial: its configuration, and what a sweep may search."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellray.core.errors import ConfigError
from cellray.core.section import apply_overrides, merge, read_toml, to_dict, to_toml
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import tracking_uri
from cellray.tune.ledger import Ledger
from cellray.tune.space import Space, parse_space

if TYPE_CHECKING:
    from cellray.runs import FinetuneRun, TuneRun

__all__ = ["check_space", "ledger_of", "read_base", "trial_run", "write_best"]

_OWN = "the sweep gives every trial its own"
_CELLS = "trials would be compared on different validation cells, or trained on each other's test"
# Keys that a sweep may not search, and why.
_HELD = {
    "name": _OWN,
    "checkpoint": _OWN,
    "tracking": _OWN,
    "register_as": "only the run of best.toml is registered",
    "seed": _CELLS,
    "task": _CELLS,
    "data.uri": _CELLS,
    "data.timestamp": _CELLS,
    "data.obs_filter": _CELLS,
    "data.min_genes_per_cell": _CELLS,
    "data.held_out": _CELLS,
    "data.held_out_by": _CELLS,
    "data.split": _CELLS,
    "train.eval_every_steps": "trials are compared at its steps",
    "train.eval_cells": _CELLS,
}
# What of [task] a sweep may search: neither cells nor genes nor labels depend on it.
_OF_TASK = ("task.donor_columns", "task.refuse", "task.umap", "task.model", "task.objective")
# Weights of terms of the loss: with others, validation/loss is another number.
_LOSS = ("task.objective", "objective")
# What a run can change on its way; all else is the model's shape, or where training began.
_CHANGEABLE = ("optim", "batch.cells_micro", "batch.tokens_micro")
_PBT_KEEPS = 4  # checkpoints: one that another trial is to go on from must not have gone


def ledger_of(run: TuneRun) -> Ledger:
    """Where the trials of a sweep are noted."""
    return Ledger(RunDirectory(run.checkpoint.dir, run.name).path / "trials")


def read_base(run: TuneRun) -> dict[str, Any]:
    """The fine-tuning file with the sweep's overrides, as tables.

    Raises:
        ConfigError: the file is missing or not TOML.
    """
    return apply_overrides(read_toml(run.base), run.overrides)


def _under(key: str, path: str) -> bool:
    return key == path or key.startswith(f"{path}.")


def _with(raw: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """The tables with every ``section.key`` of a point set.

    Raises:
        ConfigError: a key walks through a plain value.
    """
    result = copy.deepcopy(dict(raw))
    for key, value in point.items():
        node = result
        *parents, last = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"search.{key}: '{part}' is a value, not a section")
        node[last] = copy.deepcopy(value)
    return result


def _build(run: TuneRun, raw: Mapping[str, Any]) -> FinetuneRun:
    from cellray.runs import FinetuneRun, build_run

    built = build_run("finetune", raw, source=f"{run.base} with search of {run.name}")
    assert isinstance(built, FinetuneRun)
    return built


def trial_run(
    run: TuneRun,
    base: Mapping[str, Any],
    point: Mapping[str, Any],
    folder: Path,
    *,
    timestamp: str = "",
) -> FinetuneRun:
    """The fine-tuning run of one trial, validated.

    Args:
        run: the sweep.
        base: from :func:`read_base`.
        point: searched key -> value.
        folder: the trial's run directory.
        timestamp: read the store as it was then, unless the base says when.

    Raises:
        ConfigError: a searched key that the schema does not know, a value it refuses, or a base
            that never validates.
    """
    raw = _with(base, point)
    every = raw.get("train", {}).get("eval_every_steps")
    if not every:
        raise ConfigError(
            f"'{run.base}': a sweep compares trials at train.eval_every_steps; set it above 0"
        )
    saved = raw.get("checkpoint", {})
    pbt = run.scheduler == "pbt"
    own: dict[str, Any] = {
        "name": folder.name,
        "register_as": "",
        "checkpoint": {
            "dir": str(folder.parent),
            "resume": "auto",
            # a trial goes on from its last checkpoint, and PBT hands on the one of a report
            "every_steps": every if pbt else saved.get("every_steps") or every,
            **({"keep_last": max(_PBT_KEEPS, saved.get("keep_last", 0))} if pbt else {}),
        },
        "tracking": to_dict(run.tracking)
        | {
            "mlflow_uri": tracking_uri(run.tracking, run.checkpoint.dir),
            "experiment": run.tracking.experiment or "tune",
        },
    }
    raw = merge(raw, own)
    data = raw.get("data", {})
    if timestamp and isinstance(data, dict) and not data.get("timestamp"):
        raw["data"] = {**data, "timestamp": timestamp}
    return _build(run, raw)


def check_space(run: TuneRun, base: Mapping[str, Any]) -> dict[str, Any]:
    """Check every searched key and each of its values against the schema.

    Returns:
        The space, from :func:`cellray.tune.space.parse_space`.

    Raises:
        ConfigError: a key that may not be searched, that the schema does not know, or a value
            that it refuses.
    """
    space = parse_space(run.search)
    folder = ledger_of(run).root / "check"
    for key in space:
        allowed = any(_under(key, path) for path in _OF_TASK)
        for path, why in _HELD.items():
            if (_under(key, path) and not allowed) or _under(path, key):
                raise ConfigError(f"search.{key} cannot be searched: {why}")
        if run.metric == "validation/loss" and any(_under(key, path) for path in _LOSS):
            raise ConfigError(
                f"search.{key} changes what validation/loss is: trials could not be compared by "
                "it; set metric to a part of the loss, e.g. 'validation/gep'"
            )
        if run.scheduler == "pbt" and not any(_under(key, path) for path in _CHANGEABLE):
            raise ConfigError(
                f"search.{key}: scheduler = 'pbt' changes values while a model trains, which only "
                f"keys of {', '.join(_CHANGEABLE)} can; search it with 'asha' or 'none'"
            )
    first = {key: axis.ends()[0] for key, axis in space.items()}
    for key, axis in space.items():
        for value in axis.ends():
            trial_run(run, base, {**first, key: value}, folder)
    return dict(space)


def most(space: Space, run: FinetuneRun) -> FinetuneRun:
    """The run with the largest searched value of each key of its ``scale`` section."""
    searched = {
        key.removeprefix("scale."): max(axis.ends())
        for key, axis in space.items()
        if key.startswith("scale.")
    }
    return run.model_copy(update={"scale": run.scale.model_copy(update=searched)})


def write_best(run: TuneRun, base: Mapping[str, Any], trial: int, told: str) -> Path:
    """The best trial's configuration as a file that ``cellray finetune`` takes as it is.

    Args:
        run: the sweep.
        base: from :func:`read_base`.
        trial: the best one.
        told: what the file says of it, one line.

    Returns:
        Its path.
    """
    ledger = ledger_of(run)
    raw = _with(base, ledger.point(trial))
    raw = merge(
        raw,
        {
            "name": f"{run.name}-best",
            "checkpoint": {"dir": run.checkpoint.dir},
            "tracking": to_dict(run.tracking),
        },
    )
    built = {k: v for k, v in to_dict(_build(run, raw)).items() if v is not None}
    lines = [f"# {told}"]
    lines += [
        f"# From step {change['step']} trial {trial} went on from the weights of trial "
        f"{change['from']}; the values are those it had at the end."
        for change in ledger.changes(trial)
    ]
    path = ledger.root.parent / "best.toml"
    path.write_text("\n".join([*lines, to_toml(built)]) + "\n", encoding="utf-8")
    return path
