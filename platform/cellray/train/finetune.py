"""The fine-tuning job: a checkpoint and a task in, a tuned model scored on held-out cells out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from cellray.core.errors import ConfigError
from cellray.core.section import build_section, flatten, to_dict
from cellray.data.config import DataSection
from cellray.data.schema import CELL_IDS
from cellray.data.tokens import tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.guards.entry import guard_split
from cellray.infer.embed import embed_cells
from cellray.infer.load import LoadedModel, load
from cellray.models.base import CellClassifier, GeneClassifier, ModelConfig, begin
from cellray.tasks.base import Split, Targets, Task, TaskConfig, score_labels, task
from cellray.train.adapt import PARAMETERS_FILE
from cellray.train.answers import (
    ANSWERS_DIR,
    Answers,
    refuse_section,
    with_threshold,
    write_answers,
)
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
    "predict_cells",
    "predict_labels",
    "prepare_finetune",
    "score_test",
]

Say = Callable[[str], None]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]

_TRAIN_SAMPLE = 1024


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
        train_accuracy: of the exported model on a seeded sample of at most 1,024 training cells:
            one that did not learn these did not train.
        params: ``n_params_total``, ``n_params_trainable`` and ``n_params_nonembedding``, see
            :func:`cellray.train.adapt.count_parameters`; {} for a run of an older version.
    """

    trained: TrainResult
    test: Mapping[str, float]
    registered: str = ""
    train_accuracy: float = math.nan
    params: Mapping[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """What the command line prints."""
        told = [f"model: {self.trained.model_dir}"]
        if self.params:
            told.append(
                f"parameters: {self.params['n_params_trainable']:,} trained of "
                f"{self.params['n_params_total']:,}"
            )
        if not math.isnan(self.train_accuracy):
            told.append(f"accuracy on training cells (a sample): {self.train_accuracy:.4f}")
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
        return manifest, vocab, weights if run.init_weights else None
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
        chosen_genes=run.data.vocab_genes > 0,
    )
    return empty, vocab, start


def _covariates(run: FinetuneRun) -> tuple[DataSection, Mapping[str, list[str]]]:
    """The data section with the covariates that the checkpoint's model was built with."""
    if not run.init_from:
        return run.data, {}
    known = read_checkpoint(run.init_from)[0].covariates
    more = [name for name in run.data.covariates if name not in known]
    if more:
        raise ConfigError(
            f"data.covariates names {', '.join(more)}, which the checkpoint of init_from was not "
            f"trained with (it has {', '.join(known) or 'none'}); leave the key out"
        )
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
    split = guard_split(cells, split, run.task, covariates=section.covariates).split  # type: ignore[arg-type]
    targets = unit.fit(cells.obs, run.task, split)
    _check_register(run, unit, targets)
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
        refuse_loss=bool(run.init_from)
        and not source.genes_chosen
        and len(vocab) == len(first.vocab),
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
        chosen_genes=source.genes_chosen,
    )
    _check_needs(unit, manifest, vocab)
    _check_refusal(run, split)
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
        adapt=run.adapt,
        device=device,
    )
    check_job(job)
    return Finetuning(job, unit, cells, split, targets, run.task, start.said)  # type: ignore[arg-type]


def _check_register(run: FinetuneRun, unit: Task, targets: Targets) -> None:
    if run.register_as and not targets.classes:
        raise ConfigError(
            f"register_as = '{run.register_as}': what is registered annotates cells, and task "
            f"'{unit.name}' trains no classifier; leave the key out"
        )


def _genes_chosen(run: FinetuneRun, source: Manifest) -> bool:
    """Whether the vocabulary is a choice of variable genes made on this very store."""
    if not run.init_from:
        return run.data.vocab_genes > 0
    return source.genes_chosen and source.run.get("data", {}).get("uri") == run.data.uri


def _check_refusal(run: FinetuneRun, split: Split) -> None:
    wanted = refuse_section(run.task).wanted
    if wanted and "below" not in wanted and not len(split.validation):
        raise ConfigError(
            f"task.refuse.{next(iter(wanted))} chooses the threshold by validation cells, and the "
            "split leaves none; set task.split.validation_fraction above 0, or give "
            "task.refuse.below"
        )


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


def predict_cells(
    model: LoadedModel, prepared: Finetuning, joinids: I64
) -> tuple[npt.NDArray[Any], F32]:
    """Predicted class names of cells of the prepared store and the probability of each.

    Nothing is refused here: every cell gets its best class.

    Args:
        model: the fine-tuned model.
        prepared: whose store the cells are of.
        joinids: (N,) of the cells.

    Returns:
        (N,) names and (N,) float32 probabilities, in the cells' order.
    """
    if not len(joinids):
        return np.empty(0, dtype=object), np.empty(0, dtype=np.float32)
    source = replace(prepared.job.data.source, tokenizer=model.manifest.tokenizer)
    probabilities = embed_cells(model, source, joinids, classify=True)
    names = np.asarray(model.manifest.classes, dtype=object)
    return np.asarray(names[probabilities.argmax(axis=1)]), probabilities.max(axis=1)


def predict_labels(model: LoadedModel, prepared: Finetuning, joinids: I64) -> npt.NDArray[Any]:
    """Predicted class names of cells of the prepared store, (N,) in their order."""
    return predict_cells(model, prepared, joinids)[0]


def accuracy_on_training(model: LoadedModel, prepared: Finetuning) -> float:
    """Share of right labels among at most 1,024 training cells, drawn by the run's seed."""
    every = prepared.split.train
    rng = np.random.default_rng(prepared.job.seed)
    chosen = np.sort(rng.choice(every, size=min(len(every), _TRAIN_SAMPLE), replace=False))
    labels, _ = predict_cells(model, prepared, chosen)
    return float(np.mean(labels == truth_labels(prepared, chosen)))


def truth_labels(prepared: Finetuning, joinids: I64) -> npt.NDArray[Any]:
    """True labels of cells, also those of classes that training never saw."""
    label = prepared.job.manifest.run["task"]["label"]
    rows = np.searchsorted(prepared.cells.joinids, joinids)
    return np.asarray(prepared.cells.obs[label].astype(str).to_numpy()[rows], dtype=object)


def _cell_names(prepared: Finetuning, joinids: I64) -> npt.NDArray[Any]:
    """Cells' ids as the store has them, their joinids where it has none."""
    store = prepared.cells.store
    column = next((name for name in CELL_IDS if name in store.obs_columns()), None)
    if column is None:
        return joinids
    obs = store.obs([column])
    rows = np.searchsorted(obs["soma_joinid"].to_numpy(), joinids)
    return np.asarray(obs[column].astype(str).to_numpy()[rows], dtype=object)


def score_test(model: LoadedModel, prepared: Finetuning) -> tuple[dict[str, float], Answers]:
    """Metrics of the task and of refusal on the test cells, and the answers themselves."""
    test = prepared.split.test
    predicted, confidence = predict_cells(model, prepared, test)
    truth, names = truth_labels(prepared, test), _cell_names(prepared, test)
    answers = Answers(names, truth, predicted, confidence)
    classes = prepared.targets.classes
    obs = prepared.cells.obs.iloc[np.searchsorted(prepared.cells.joinids, test)]
    scores = score_labels(prepared.task, obs, prepared.config, truth, predicted, classes)
    return {**scores, **answers.scores(classes, threshold=model.cutoff)}, answers


def _validated(
    model: LoadedModel, prepared: Finetuning
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Confidence of the validation cells, and whether each is right."""
    chosen = prepared.split.validation
    labels, confidence = predict_cells(model, prepared, chosen)
    return confidence, np.asarray(labels == truth_labels(prepared, chosen), dtype=bool)


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
    return _conclude(run, prepared, trained, uri, say, look_at_test=look_at_test)


def _conclude(
    run: FinetuneRun,
    prepared: Finetuning,
    trained: TrainResult,
    uri: str,
    say: Say,
    *,
    look_at_test: bool,
) -> FinetuneResult:
    """What follows training: the threshold, what training cells say, the test cells, registry."""
    directory = RunDirectory.at(trained.run_dir)
    params = directory.read(PARAMETERS_FILE)
    model, after, test = load(trained.model_dir), dict[str, float](), dict[str, float]()
    written: list[Path] = []
    if model.manifest.classes:
        unthresholded = model
        model = with_threshold(
            model, refuse_section(run.task), lambda: _validated(unthresholded, prepared), say
        )
        after["train/accuracy_after"] = accuracy_on_training(model, prepared)
        if look_at_test:
            test, answers = score_test(model, prepared)
            written = write_answers(
                directory.path / ANSWERS_DIR,
                answers,
                threshold=model.cutoff,
                title=f"{run.name}: test cells",
                say=say,
            )
    elif look_at_test and prepared.task.answers == "embedding":
        test, pictures = score_embedding(model, prepared, trained.run_dir)
        written = list(pictures)
    registered = ""
    if trained.mlflow_run_id:
        tracker = Tracker(uri, trained.mlflow_run_id)
        tracker.params(params)
        after |= {f"test/{name}": value for name, value in test.items()}
        tracker.metrics(after, step=trained.step)
        for path in written:
            tracker.artifact(path, ANSWERS_DIR)
        tracker.artifact(Path(model.path) / "manifest.json", "model")
        if run.register_as:
            from cellray.infer.predict import register

            registered = register(
                tracker,
                trained.model_dir,
                name=run.register_as,
                config=directory.path / "config.toml",
                metrics=after,
            )
    accuracy = after.get("train/accuracy_after", math.nan)
    return FinetuneResult(trained, test, registered, accuracy, params)
