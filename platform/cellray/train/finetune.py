"""The fine-tuning job: a checkpoint and a task in, a tuned model scored on held-out cells out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from cellray.core.errors import ConfigError
from cellray.core.section import build_section, flatten, to_dict
from cellray.data.config import DataSection
from cellray.data.tokens import tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.infer.embed import embed_cells
from cellray.infer.load import LoadedModel, load
from cellray.models.base import CellClassifier, GeneClassifier, ModelConfig, begin
from cellray.tasks.base import Split, Targets, Task, TaskConfig, score_labels, task
from cellray.train.checkpoint import Manifest, model_of, read_checkpoint
from cellray.train.job import TrainJob, check_job
from cellray.train.overlay import Start, lay_over
from cellray.train.prepare import (
    Cells,
    check_vocab,
    encode,
    make_training_data,
    select_cells,
    store_vocab,
    total_steps,
)
from cellray.train.rundir import RunDirectory
from cellray.train.score_embedding import score_embedding
from cellray.train.tracked import fit_tracked, pinned
from cellray.train.tracking import Tracker, check_tracking, code_version, tracking_uri
from cellray.train.trainer import TrainResult, pick_device

if TYPE_CHECKING:
    from cellray.runs import FinetuneRun

__all__ = [
    "FinetuneResult",
    "Finetuning",
    "finetune",
    "predict_labels",
    "prepare_finetune",
    "score_test",
]

Say = Callable[[str], None]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Finetuning:
    """A checked fine-tuning run, nothing started yet.

    Attributes:
        job: what workers need; labels of test cells are not in it.
        task: the task.
        cells: the selection.
        split: training, validation and test cells.
        targets: classes and codes.
        config: the task's section.
        said: what of the checkpoint is not as it was.
    """

    job: TrainJob
    task: Task
    cells: Cells
    split: Split
    targets: Targets
    config: TaskConfig
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class FinetuneResult:
    """A fine-tuned model and how it does on the held-out cells.

    Attributes:
        trained: run directory, model, MLflow run.
        test: versioned metric id -> value on the test cells; empty if they were not looked at.
        registered: MLflow URI of the registered model, "" if none.
    """

    trained: TrainResult
    test: Mapping[str, float]
    registered: str = ""

    def lines(self) -> list[str]:
        """What the command line prints."""
        told = [f"model: {self.trained.model_dir}"]
        told += [f"test {name}: {value:.4f}" for name, value in self.test.items()]
        return told + ([f"registered: {self.registered}"] if self.registered else [])


def _start(
    run: FinetuneRun, cells: Cells, train: I64
) -> tuple[Manifest, Vocab, dict[str, torch.Tensor] | None]:
    """Model, vocabulary and weights: of the checkpoint, or of the run's own sections."""
    if run.init_from:
        manifest, vocab, weights = read_checkpoint(run.init_from)
        check_vocab(run.data, vocab, run.init_from)
        if run.tokenizer is not None:
            raise ConfigError(
                "[tokenizer] is for training from scratch; with init_from the checkpoint's own "
                "tokenizer is used: leave the section out"
            )
        return manifest, vocab, weights
    assert run.model is not None
    assert run.tokenizer is not None
    model, tokenizer = to_dict(run.model), to_dict(run.tokenizer)
    vocab = store_vocab(cells, run.data, tokenizer["name"], train, run.seed)
    assert isinstance(run.model, ModelConfig)
    vocab, start = begin(run.model, vocab)
    empty = Manifest(
        family=model["family"],
        model=model,
        tokenizer=tokenizer,
        objective={},
        vocab_fingerprint=vocab.fingerprint,
        data_fingerprint="",
    )
    return empty, vocab, start


def _covariates(run: FinetuneRun) -> tuple[DataSection, Mapping[str, list[str]]]:
    """The data section with the covariates that the checkpoint's model was built with."""
    if not run.init_from:
        return run.data, {}
    known = read_checkpoint(run.init_from)[0].covariates
    return run.data.model_copy(update={"covariates": list(known)}), known


def _conditioned(section: DataSection, targets: Targets) -> DataSection:
    """The data section with the task's covariates beside those of the checkpoint."""
    names = list(dict.fromkeys([*section.covariates, *targets.covariates]))
    return section.model_copy(update={"covariates": names})


def prepare_finetune(run: FinetuneRun) -> Finetuning:
    """Check a run against its checkpoint and store: labels, split, vocabulary, order, steps.

    Raises:
        CellrayError: whatever in the configuration does not fit the data.
    """
    device = pick_device(run.scale)
    unit = task(run.task.name)  # type: ignore[attr-defined]
    section, categories = _covariates(run)
    cells = select_cells(section, lambda known: unit.columns(run.task, known))
    split = unit.split(cells.keyed(), run.task, seed=run.seed)
    targets = unit.fit(cells.obs, run.task, split)
    if run.register_as and not targets.classes:
        raise ConfigError(
            f"register_as = '{run.register_as}': what is registered annotates cells, and task "
            f"'{unit.name}' trains no classifier; leave the key out"
        )
    first = Start(*_start(run, cells, split.train))
    section = _conditioned(section, targets)
    start = lay_over(
        first,
        targets,
        cells,
        split.train,
        covariates=encode(cells.obs, section.covariates, categories)[1],
        statistics_cells=section.statistics_cells,
        seed=run.seed,
    )
    source, vocab, tokenizer = start.manifest, start.vocab, start.manifest.tokenizer
    seen = np.isin(cells.joinids, np.concatenate([split.train, split.validation]))
    data = make_training_data(
        cells,
        section,
        batch=run.batch,
        tokenizer=build_section(tokenizer_unit(tokenizer["name"]).config, tokenizer),
        vocab=vocab,
        train=split.train,
        validation=split.validation,
        seed=run.seed,
        categories=categories,
        extra_codes={"label": np.where(seen, targets.codes, -1)},
        genes_chosen=_genes_chosen(run, source) or len(vocab) < len(first.vocab),
    )
    data = replace(data, warnings=[*data.warnings, *split.warnings])
    manifest = replace(
        source,
        data_fingerprint=data.fingerprint,
        covariates=data.covariates,
        classes=list(targets.classes),
        classes_of="cell",  # also where the checkpoint classified genes
        step=0,
        cursor={},
        metrics={},
        run=to_dict(run),
        code_version=" ".join(code_version().values()),
    )
    _check_needs(unit, manifest, vocab)
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
        weights=start.weights,
        train_backbone=run.train_backbone,
        device=device,
    )
    check_job(job)
    return Finetuning(job, unit, cells, split, targets, run.task, start.said)  # type: ignore[arg-type]


def _genes_chosen(run: FinetuneRun, source: Manifest) -> bool:
    """Whether the vocabulary is a choice of variable genes made on this very store."""
    if not run.init_from:
        return run.data.vocab_genes > 0
    before = source.run.get("data", {})
    return bool(before.get("vocab_genes")) and before.get("uri") == run.data.uri


def _check_needs(unit: Task, manifest: Manifest, vocab: Vocab) -> None:
    with torch.device("meta"):
        model = model_of(manifest, vocab)
    backbone = model.backbone if isinstance(model, CellClassifier | GeneClassifier) else model
    lacking = [need.__name__ for need in unit.needs if not isinstance(backbone, need)]
    if lacking:
        raise ConfigError(
            f"task '{unit.name}' needs {', '.join(lacking)}, which family '{manifest.family}' "
            "does not offer; choose another family"
        )


def predict_labels(model: LoadedModel, prepared: Finetuning, joinids: I64) -> npt.NDArray[Any]:
    """Predicted class names of cells of the prepared store, (N,) in their order."""
    source = replace(prepared.job.data.source, tokenizer=model.manifest.tokenizer)
    probabilities = embed_cells(model, source, joinids, classify=True)
    names = np.asarray(model.manifest.classes, dtype=object)
    return np.asarray(names[probabilities.argmax(axis=1)])


def truth_labels(prepared: Finetuning, joinids: I64) -> npt.NDArray[Any]:
    """True labels of cells, also those of classes that training never saw."""
    label = prepared.job.manifest.run["task"]["label"]
    rows = np.searchsorted(prepared.cells.joinids, joinids)
    return np.asarray(prepared.cells.obs[label].astype(str).to_numpy()[rows], dtype=object)


def score_test(
    model: LoadedModel, prepared: Finetuning
) -> tuple[dict[str, float], npt.NDArray[Any], npt.NDArray[Any]]:
    """Metrics, truth and prediction on the test cells."""
    test = prepared.split.test
    predicted = predict_labels(model, prepared, test)
    truth = truth_labels(prepared, test)
    obs = prepared.cells.obs.iloc[np.searchsorted(prepared.cells.joinids, test)]
    classes = prepared.targets.classes
    scores = score_labels(prepared.task, obs, prepared.config, truth, predicted, classes)
    return scores, truth, predicted


def finetune(
    run: FinetuneRun,
    say: Say,
    *,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    extra_callbacks: list[Any] | None = None,
    prepared: Finetuning | None = None,
    look_at_test: bool = True,
) -> FinetuneResult:
    """Fine-tune; continues an interrupted run of the same name and configuration.

    Args:
        run: the configuration.
        say: receives progress.
        parent: MLflow run that this one is a child of.
        tags: further MLflow tags.
        extra_callbacks: further Ray Train callbacks.
        prepared: of the same run, if it has been prepared already.
        look_at_test: score the held-out cells at the end; a sweep must not.
    """
    uri = tracking_uri(run.tracking, run.checkpoint.dir)
    if run.tracking.enabled:
        check_tracking(uri)
    if prepared is None:
        data = pinned(run.data, run.checkpoint, run.name)
        prepared = prepare_finetune(run.model_copy(update={"data": data}))
    for line in prepared.said:
        say(line)
    trained = fit_tracked(
        prepared.job,
        RunDirectory(run.checkpoint.dir, run.name),
        tracking=run.tracking,
        uri=uri,
        experiment=run.tracking.experiment or "finetune",
        params=flatten(to_dict(run)),
        config=to_dict(run),
        say=say,
        parent=parent,
        tags=tags,
        extra_callbacks=extra_callbacks,
    )
    test: dict[str, float] = {}
    pictures: tuple[Path, ...] = ()
    if look_at_test and prepared.task.answers == "embedding":
        test, pictures = score_embedding(load(trained.model_dir), prepared, trained.run_dir)
    elif look_at_test:
        test, _, _ = score_test(load(trained.model_dir), prepared)
    registered = ""
    if trained.mlflow_run_id:
        tracker = Tracker(uri, trained.mlflow_run_id)
        if test:
            tracker.metrics({f"test/{k}": v for k, v in test.items()}, step=trained.step)
        for picture in pictures:
            tracker.artifact(picture)
        if run.register_as:
            from cellray.infer.predict import register

            registered = register(tracker, trained.model_dir, name=run.register_as)
    return FinetuneResult(trained, test, registered)
