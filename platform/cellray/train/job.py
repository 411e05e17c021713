"""A training run as it is shipped to workers, and what its sections build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cellray.core import registry
from cellray.core.errors import CheckpointError
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer
from cellray.models.base import CellModel
from cellray.nn.performer import RedrawSchedule
from cellray.objectives.base import Objective
from cellray.train.adapt import check_adapt
from cellray.train.checkpoint import Manifest, model_of
from cellray.train.config import (
    AdaptSection,
    BatchSection,
    CheckpointSection,
    EngineSection,
    OptimSection,
    ScaleSection,
    TrainSection,
)
from cellray.train.prepare import TrainingData

__all__ = [
    "TrainJob",
    "build_objective",
    "check_job",
    "fitting_weights",
    "for_workers",
    "load_backbone",
]


@dataclass(frozen=True)
class TrainJob:
    """All a worker needs; picklable.

    Attributes:
        name: the run's name.
        manifest: the checkpoint manifest of step 0.
        data: source, plan and validation cells.
        steps: last step of the run.
        weights: what a fresh run starts with (name -> tensor), None to start anew; they travel
            with the job, so that workers need not see the driver's disk.
        adapt: which weights a model with a classifier trains.
        device: ``cpu`` or ``cuda``.
        run_dir: the run's directory, on a disk that all workers see.
    """

    name: str
    manifest: Manifest
    data: TrainingData
    steps: int
    seed: int
    optim: OptimSection
    batch: BatchSection
    train: TrainSection
    engine: EngineSection
    scale: ScaleSection
    checkpoint: CheckpointSection
    weights: Mapping[str, torch.Tensor] | None = None
    adapt: AdaptSection = field(default_factory=AdaptSection)
    device: str = "cpu"
    run_dir: str = ""


def for_workers(job: TrainJob) -> TrainJob:
    """The job as it is shipped: without the sentences for people.

    They may name classes that test cells alone have, and what trains is to know nothing of those.
    """
    return replace(job, data=replace(job.data, warnings=[], mixing=[], cut=""))


def build_objective(config: Mapping[str, Any], vocab: Any) -> Objective:
    """Build the objective that ``config["name"]`` names."""
    unit = registry.find("cellray.objectives", config["name"], "OBJECTIVE")
    objective: Objective = unit.build(build_section(unit.config, config), vocab)
    return objective


def fitting_weights(
    model: CellModel, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The checkpoint's weights under the model's names; a head of another shape is left out.

    A classifier takes the weights of a bare backbone, and a backbone those of a classifier.

    Raises:
        CheckpointError: a weight of the backbone does not fit; ``model`` may be on ``meta``.
    """
    own = model.state_dict()
    renamed = {}
    for name, value in weights.items():
        bare = name.removeprefix("backbone.")
        renamed[next((n for n in (name, f"backbone.{name}", bare) if n in own), name)] = value
    fitting = {n: v for n, v in renamed.items() if n in own and own[n].shape == v.shape}
    wrong = [n for n in renamed if n not in fitting and not n.startswith("head.")]
    if wrong:
        here = tuple(own[wrong[0]].shape) if wrong[0] in own else "no such tensor"
        raise CheckpointError(
            f"the checkpoint of init_from does not fit the model: {len(wrong)} tensors differ, "
            f"e.g. {wrong[0]}: {tuple(renamed[wrong[0]].shape)} in the checkpoint, {here} in the "
            "model; give [model] and [tokenizer] as the checkpoint has them (cellray show)"
        )
    return fitting


def load_backbone(model: CellModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Start ``model`` from a checkpoint's weights."""
    model.load_state_dict({**model.state_dict(), **fitting_weights(model, weights)})
    for module in model.modules():
        if isinstance(module, RedrawSchedule):
            module.begin_run()


def check_job(job: TrainJob) -> None:
    """Build on the driver, without memory, what every worker will build.

    Raises:
        CellrayError: tokenizer, objective, model, starting weights or what is to be trained do
            not fit each other.
    """
    vocab = job.data.source.vocab
    build_objective(job.manifest.objective, vocab)
    unit = registry.find("cellray.objectives", job.manifest.objective["name"], "OBJECTIVE")
    unit.check(build_section(unit.config, job.manifest.objective), job.manifest.tokenizer)
    make_tokenizer(job.manifest.tokenizer, vocab)
    with torch.device("meta"):
        model = model_of(job.manifest, vocab)
    if job.weights is not None:
        fitting_weights(model, job.weights)
    check_adapt(model, job.adapt)
