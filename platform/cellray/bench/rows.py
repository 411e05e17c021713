"""One row of the long table of results: a method, a seed and a metric, and all it depends on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from cellray.core.errors import DataError
from cellray.core.jsonfile import read_json
from cellray.metrics.base import all_metrics

__all__ = [
    "SCHEMA_VERSION",
    "MethodFamily",
    "Provenance",
    "ResultRow",
    "Status",
    "failed_rows",
    "kept_rows",
    "own_fields",
    "row_from",
    "rows_of",
    "scores_of",
    "to_frame",
]

SCHEMA_VERSION = "results_long.v2"
TABLE_NOTES = "table.json"  # beside kept results: what their table is shown with

Provenance = Literal["measured", "reported", "derived"]
Status = Literal["ok", "failed", "timeout", "oom", "skipped"]
MethodFamily = Literal[
    "foundation_ft", "foundation_zs", "from_scratch", "random_init", "baseline", "control"
]
SpreadKind = Literal["", "sd", "ci95_half_width"]

# The interval over test units stands beside its metric in a mapping of scores.
_LOW, _HIGH = "/unit_ci95_low", "/unit_ci95_high"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One method x seed x metric.

    What is not known is empty ("" or None), never 0.

    Attributes:
        task: e.g. ``annotation``; ``subtask`` a named part of the test set, "" for all of it.
        dataset_id: a name a reader knows; ``synthetic/...`` for made data.
        method: the row's name.
        method_family: what kind of method it is.
        base_method: the method (or several, with commas) whose from-scratch or random-init
            control this row is.
        metric_id: versioned, e.g. ``macro_f1.union.v1``; "" only if the run failed. Its version
            stands in ``metric_version`` too, what it was computed with in ``metric_params``.
        value: None unless ``status`` is ok.
        higher_is_better: None for counts.
        unit_ci95_low: lower end of the bootstrap interval over test units (donors), which is not
            the spread over seeds; ``unit_ci95_high`` the upper end.
        ceiling: the positive control of the same table, likewise ``floor`` the negative one, and
            ``scaled_value`` (value - floor) / (ceiling - floor).
        seed: the run's seed; None for a reported value.
        seed_scope: what the seed changed; "" says nothing: the spread is then not applicable.
        provenance: measured here, reported by others, or derived by arithmetic.
        reported_source: DOI, table, what was read; required if reported, empty if not.
        reported_spread: as printed, of the kind ``reported_spread_kind``.
        status: ``ok``, or how the run ended, with its message in ``error``.
        remarks: flags of the run a reader must see, e.g. ``did not train``.
        dataset_sha256: over cell ids and counts.
        split_id: the split's name.
        split_sha256: over the sorted test ids.
        split_unit: ``cell``, or the obs column held out whole.
        n_cells: cells of the data set; likewise ``n_genes``, and ``n_train``, ``n_val``,
            ``n_test`` of the split, classes of each, and ``n_items`` the value averages over.
        gene_map_id: how gene names were mapped; ``genes_matched`` of ``genes_in`` were, with
            ``umi_fraction_matched`` of all counts.
        checkpoint_sha256: over the weights of ``checkpoint_id``.
        pretrain_corpus_id: what the checkpoint was pretrained on.
        overlap_flag: ``none``, ``partial``, ``full`` or ``unknown`` overlap of test cells with
            pretraining; ``overlap_fraction`` of the test cells, in 0..1.
        n_params_total: of the model; likewise trainable and outside of embeddings.
        config_sha256: over ``params_json``, the resolved configuration.
        tuning_budget: trials used to choose the configuration.
        git_dirty: whether the tree had changes that ``git_commit`` lacks.
        package_lock_sha256: over the installed packages; ``image_digest`` of the container.
        hardware: what it ran on, ``n_gpus`` of them.
        effective_batch: cells an optimiser step: micro_batch x grad_accum x world_size.
        wall_s: seconds from start to predictions.
        gpu_hours: GPUs x hours; likewise ``cpu_hours`` cores x hours.
        peak_gpu_mem_gb: of one GPU, GB.
        cells_per_s: cells trained on a second; embedded, by a frozen model.
        real_tokens_per_s_gpu: tokens without padding, a second and GPU.
        mfu_real: share of the peak by the formula ``mfu_formula_id``, of tokens without padding.
        run_id: the MLflow run.
        predictions_sha256: over the predictions the value was computed from.
    """

    task: str
    dataset_id: str
    method: str
    method_family: MethodFamily
    base_method: str = ""
    metric_id: str = ""
    metric_version: str = ""
    metric_params: str = ""
    value: float | None = None
    higher_is_better: bool | None = True
    unit_ci95_low: float | None = None
    unit_ci95_high: float | None = None
    ceiling: float | None = None
    floor: float | None = None
    scaled_value: float | None = None
    seed: int | None = None
    seed_scope: str = ""
    provenance: Provenance = "measured"
    reported_source: str = ""
    reported_spread: float | None = None
    reported_spread_kind: SpreadKind = ""
    status: Status = "ok"
    error: str = ""
    remarks: tuple[str, ...] = ()
    subtask: str = ""
    dataset_sha256: str = ""
    dataset_license: str = ""
    split_id: str = ""
    split_sha256: str = ""
    split_unit: str = ""
    n_cells: int | None = None
    n_genes: int | None = None
    n_train: int | None = None
    n_val: int | None = None
    n_test: int | None = None
    n_classes_train: int | None = None
    n_classes_test: int | None = None
    n_classes_unseen: int | None = None
    n_items: int | None = None
    gene_map_id: str = ""
    genes_in: int | None = None
    genes_matched: int | None = None
    umi_fraction_matched: float | None = None
    init: str = ""
    checkpoint_id: str = ""
    checkpoint_sha256: str = ""
    pretrain_corpus_id: str = ""
    overlap_flag: str = "unknown"
    overlap_fraction: float | None = None
    config_sha256: str = ""
    params_json: str = ""
    n_params_total: int | None = None
    n_params_trainable: int | None = None
    n_params_nonembedding: int | None = None
    tuning_budget: int | None = None
    tuning_metric: str = ""
    tuning_split: str = ""
    git_commit: str = ""
    git_dirty: bool | None = None
    package_lock_sha256: str = ""
    image_digest: str = ""
    hardware: str = ""
    n_gpus: int | None = None
    precision: str = ""
    deepspeed_config_sha256: str = ""
    world_size: int | None = None
    micro_batch: int | None = None
    grad_accum: int | None = None
    effective_batch: int | None = None
    wall_s: float | None = None
    gpu_hours: float | None = None
    cpu_hours: float | None = None
    peak_gpu_mem_gb: float | None = None
    cells_per_s: float | None = None
    real_tokens_per_s_gpu: float | None = None
    mfu_real: float | None = None
    mfu_formula_id: str = ""
    started_at: str = ""
    run_id: str = ""
    predictions_uri: str = ""
    predictions_sha256: str = ""
    schema_version: str = SCHEMA_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "remarks", tuple(self.remarks))  # JSON knows lists only
        problem = self._problem() or self._bad_interval() or self._bad_source()
        if problem:
            raise DataError(f"result row of '{self.method}', seed {self.seed}: {problem}")

    def _problem(self) -> str:
        for name, allowed in (
            ("method_family", get_args(MethodFamily)),
            ("status", get_args(Status)),
            ("provenance", get_args(Provenance)),
            ("reported_spread_kind", get_args(SpreadKind)),
        ):
            if getattr(self, name) not in allowed:
                return f"{name} '{getattr(self, name)}' is none of {', '.join(allowed)}"
        if self.status == "ok":
            if self.value is None or not math.isfinite(self.value):
                return (
                    f"{self.metric_id or 'no metric'} = {self.value} although status is ok; give "
                    "a finite value, or the status of a run that failed"
                )
            if not self.metric_id:
                return "a value without metric_id"
        elif self.value is not None:
            return f"status is {self.status} but it has a value ({self.value}); leave it out"
        return ""

    def _bad_interval(self) -> str:
        low, high = self.unit_ci95_low, self.unit_ci95_high
        if (low is None) != (high is None):
            return "unit_ci95_low and unit_ci95_high are given together or not at all"
        if low is not None and high is not None and not low <= high:
            return f"the interval over test units ends before it begins ({low} to {high})"
        return ""

    def _bad_source(self) -> str:
        if (self.provenance == "reported") != bool(self.reported_source):
            return "reported_source is required for reported values and must be empty for others"
        if (self.reported_spread is None) != (not self.reported_spread_kind):
            return "reported_spread and reported_spread_kind are given together or not at all"
        if self.reported_spread is not None and self.provenance != "reported":
            return f"a {self.provenance} value has no reported_spread; it comes from the seeds"
        return ""

    @property
    def bases(self) -> tuple[str, ...]:
        """The methods in ``base_method``."""
        return tuple(name.strip() for name in self.base_method.split(",") if name.strip())

    @property
    def is_synthetic(self) -> bool:
        """Whether the data were made."""
        return self.dataset_id.startswith("synthetic/")

    @property
    def row_id(self) -> str:
        """16 hex digits over the identifying fields."""
        named = (self.task, self.subtask, self.dataset_id, self.dataset_sha256, self.split_id)
        which = (self.split_sha256, self.method, self.config_sha256, self.seed, self.metric_id)
        text = json.dumps([*named, *which, self.provenance, self.reported_source])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def seedless(params_json: str) -> str:
    """Parameters without what differs between seeds of one method anyway."""
    params = json.loads(params_json or "{}")
    for key in ("seed", "name", "checkpoint", "tracking", "scale"):
        params.pop(key, None)
    return json.dumps(params, sort_keys=True)


def row_from(raw: Mapping[str, Any]) -> ResultRow:
    """A row read from JSON; fields that an older version did not write keep their defaults.

    Raises:
        DataError: a field that no version has, or an impossible row.
    """
    known = {f.name for f in fields(ResultRow)}
    odd = sorted(set(raw) - known - {"row_id"})
    if odd:
        raise DataError(
            f"result row of '{raw.get('method', '?')}' has unknown fields: {', '.join(odd)}; it "
            "was written by a newer version: read it with that"
        )
    return ResultRow(**{name: value for name, value in raw.items() if name != "row_id"})


def kept_rows(file: Path) -> list[ResultRow]:
    """The rows of a file of results, one at least.

    Raises:
        DataError: the file is damaged, or holds anything else.
    """
    cure = "remove it, and the same benchmark does that cell of the table again"
    raw = read_json(file, what="result of a benchmark", cure=cure)
    try:
        rows = [row_from(row) for row in raw]
    except DataError as error:
        raise DataError(f"'{file}': {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        rows = []
        cure = f"{error}; {cure}"
    if not rows:
        raise DataError(f"'{file}' is no result of a benchmark; {cure}")
    return rows


def rows_of(template: ResultRow, scores: Mapping[str, float]) -> list[ResultRow]:
    """One row for each metric of a run.

    Args:
        template: the run's fields, with any metric.
        scores: metric id -> value, as a task's ``score`` gives; the interval over test units of
            a metric, if there is one, stands under ``ID/unit_ci95_low`` and
            ``ID/unit_ci95_high``.
    """
    known = all_metrics()
    items = scores.get("n_items", template.n_items)
    return [
        replace(
            template,
            metric_id=name,
            metric_version=_version(name),
            value=float(value),
            status="ok",
            higher_is_better=known[name].higher_is_better if name in known else True,
            unit_ci95_low=scores.get(f"{name}{_LOW}"),
            unit_ci95_high=scores.get(f"{name}{_HIGH}"),
            n_items=None if items is None else int(items),
        )
        for name, value in scores.items()
        if not name.endswith((_LOW, _HIGH))
    ]


def _version(metric_id: str) -> str:
    found = re.search(r"\.(v\d+)$", metric_id)
    return found[1] if found else ""


def scores_of(rows: Iterable[ResultRow]) -> dict[str, float]:
    """The reverse of :func:`rows_of`: what to log of one run's rows as metrics."""
    found: dict[str, float] = {}
    for row in rows:
        if row.value is None:
            continue
        found[row.metric_id] = row.value
        if row.unit_ci95_low is not None and row.unit_ci95_high is not None:
            found[f"{row.metric_id}{_LOW}"] = row.unit_ci95_low
            found[f"{row.metric_id}{_HIGH}"] = row.unit_ci95_high
    return found


def failed_rows(template: ResultRow, error: str, *, status: Status = "failed") -> list[ResultRow]:
    """The one row of a run that gave no value: it is shown as failed, never as zero."""
    return [replace(own_fields(template), status=status, error=error)]


def own_fields(row: ResultRow) -> ResultRow:
    """What all rows of a run share: ``row`` without its metric and value."""
    return replace(
        row,
        status="skipped",
        metric_id="",
        metric_version="",
        value=None,
        higher_is_better=None,
        unit_ci95_low=None,
        unit_ci95_high=None,
        ceiling=None,
        floor=None,
        scaled_value=None,
        n_items=None,
    )


def to_frame(rows: Iterable[ResultRow]) -> pd.DataFrame:
    """The long table: ``row_id`` and every field of :class:`ResultRow`, one row each."""
    names = ["row_id", *(f.name for f in fields(ResultRow))]
    return pd.DataFrame([{"row_id": r.row_id, **asdict(r)} for r in rows], columns=names)
