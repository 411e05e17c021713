"""The pretraining job: a store and a family in, a checkpoint and an MLflow run out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cellray.core.errors import CheckpointError, ConfigError
from cellray.core.section import flatten, to_dict
from cellray.models.base import ModelConfig, begin
from cellray.objectives.classification import OBJECTIVE as CLASSIFICATION
from cellray.train.checkpoint import Manifest, read_checkpoint
from cellray.train.job import TrainJob, check_job
from cellray.train.prepare import (
    TrainingData,
    check_vocab,
    make_training_data,
    no_cells,
    select_cells,
    store_vocab,
    total_steps,
    validation_mask,
)
from cellray.train.rundir import RunDirectory
from cellray.train.tracked import fit_tracked, pinned
from cellray.train.tracking import check_tracking, code_version, tracking_uri
from cellray.train.trainer import TrainResult, pick_device

if TYPE_CHECKING:
    from cellray.runs import PretrainRun

__all__ = ["Pretraining", "prepare_pretrain", "pretrain"]

Say = Callable[[str], None]
LABELLED = CLASSIFICATION.name


@dataclass(frozen=True)
class Pretraining:
    """A checked pretraining run, nothing started yet."""

    job: TrainJob
    data: TrainingData


def prepare_pretrain(run: PretrainRun) -> Pretraining:
    """Check a run against its store and work out vocabulary, split, order and steps.

    Raises:
        CellrayError: whatever in the configuration does not fit the data.
    """
    device = pick_device(run.scale)
    if to_dict(run.objective)["name"] == LABELLED:
        raise ConfigError(
            f"objective '{LABELLED}' learns from labels, which 'cellray pretrain' does not read; "
            "train this family with 'cellray finetune' and a [model] section (no init_from)"
        )
    cells = select_cells(run.data)
    held = validation_mask(cells, run.data)
    train, validation = cells.joinids[~held], cells.joinids[held]
    if not len(train):
        raise no_cells("training", run.name)
    tokenizer = to_dict(run.tokenizer)
    weights, chosen = None, run.data.vocab_genes > 0  # refused beside init_from
    if run.init_from:
        before, vocab, weights = read_checkpoint(run.init_from)
        check_vocab(run.data, vocab, run.init_from)
        _check_start(run, before)
        chosen = before.genes_chosen
    else:
        vocab = store_vocab(cells, run.data, tokenizer["name"], train, run.seed)
        assert isinstance(run.model, ModelConfig)
        vocab, weights = begin(run.model, vocab)
    data = make_training_data(
        cells,
        run.data,
        batch=run.batch,
        tokenizer=run.tokenizer,
        vocab=vocab,
        train=np.sort(train),
        validation=np.sort(validation),
        seed=run.seed,
        genes_chosen=run.data.vocab_genes > 0,
        refuse_loss=bool(run.init_from) and not chosen,
    )
    model = to_dict(run.model)
    manifest = Manifest(
        family=model["family"],
        model=model,
        tokenizer=tokenizer,
        objective=to_dict(run.objective),
        vocab_fingerprint=vocab.fingerprint,
        data_fingerprint=data.fingerprint,
        covariates=data.covariates,
        run=to_dict(run),
        code_version=" ".join(code_version().values()),
        chosen_genes=chosen,
    )
    job = TrainJob(
        name=run.name,
        manifest=manifest,
        data=data,
        steps=total_steps(run.train, data.plan),
        seed=run.seed,
        optim=run.optim,
        batch=run.batch,
        train=run.train,
        engine=run.engine,
        scale=run.scale,
        checkpoint=run.checkpoint,
        weights=weights,
        device=device,
    )
    check_job(job)
    return Pretraining(job, data)


def _check_start(run: PretrainRun, before: Manifest) -> None:
    """The run's family and tokenizer must be those of the checkpoint it starts from."""
    given = {
        "model.family": to_dict(run.model)["family"],
        "tokenizer": to_dict(run.tokenizer)["name"],
    }
    theirs = {"model.family": before.family, "tokenizer": before.tokenizer["name"]}
    for key, value in given.items():
        if value != theirs[key]:
            raise CheckpointError(
                f"{key} = '{value}', but the checkpoint '{run.init_from}' has '{theirs[key]}'; "
                "start from a checkpoint of the same kind, or leave init_from out"
            )


def pretrain(run: PretrainRun, say: Say) -> TrainResult:
    """Pretrain; continues an interrupted run of the same name and configuration."""
    uri = tracking_uri(run.tracking, run.checkpoint.dir)
    if run.tracking.enabled:
        check_tracking(uri)
    data = pinned(run.data, run.checkpoint, run.name)
    job = prepare_pretrain(run.model_copy(update={"data": data})).job
    return fit_tracked(
        job,
        RunDirectory(run.checkpoint.dir, run.name),
        tracking=run.tracking,
        uri=uri,
        experiment=run.tracking.experiment or "pretrain",
        params=flatten(to_dict(run)),
        config=to_dict(run),
        say=say,
    )
