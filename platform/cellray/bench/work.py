"""One cell of a benchmark's table: how an entry comes to its answers for one seed.

An answer is a label and a confidence for every test cell, or a vector for every cell. Nothing here
opens the truth; scoring is :mod:`cellray.bench.record`'s.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cellray.baselines.base import (
    BaselineUnit,
    CellCounts,
    Labelled,
    annotate_with,
    baseline,
    embed_with,
)
from cellray.bench.entries import Entry, finetune_run, made_by, run_directory
from cellray.bench.genes import genes_known, loaded, vocabulary_of
from cellray.bench.heads import HEAD_TRIALS, logistic_head, neighbour_head
from cellray.bench.setting import Part, Setting
from cellray.bench.table import ResultRow
from cellray.core.errors import DataError
from cellray.core.section import to_dict
from cellray.data.corpus import Overlap, overlap
from cellray.data.stats import MIN_COUNT_FRACTION
from cellray.data.tokens import TokenSource
from cellray.data.vocab import Vocab
from cellray.guards.training import effective_batch
from cellray.infer.embed import embed_cells, token_source
from cellray.infer.load import LoadedModel, load
from cellray.metrics.probe import probe_folds, probe_labels, scored_rows
from cellray.tasks.base import Split
from cellray.train.adapt import count_parameters
from cellray.train.checkpoint import Manifest, model_of
from cellray.train.config import ScaleSection
from cellray.train.finetune import finetune, predict_cells, prepare_finetune
from cellray.train.saving import committed

__all__ = ["Answer", "Outcome", "answer_of"]

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What a method says of the cells it was asked about.

    Shapes:
        joinids: (N,) ascending.
        labels: (N,) class names, or None.
        confidence: (N,) float64 in 0..1, or None.
        embedding: (N, D) float32, or None.

    Attributes:
        probed: scores of a method that has no embedding in a table of embeddings.
        cutoff: the confidence below which the method itself would refuse; 0 never.
    """

    joinids: I64
    labels: npt.NDArray[Any] | None = None
    confidence: npt.NDArray[np.float64] | None = None
    embedding: F32 | None = None
    probed: Mapping[str, float] | None = None
    cutoff: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """An answer with what it cost and what is to be said of it.

    Attributes:
        answer: the answer.
        row: the result row's fields, filled in but for metric and value.
        params: for MLflow.
        child_run_id: the MLflow run that training made, "" if none.
        model_dir: exported model, "" if none.
        remarks: flags for the reader.
    """

    answer: Answer
    row: ResultRow
    params: Mapping[str, Any] = field(default_factory=dict)
    child_run_id: str = ""
    model_dir: str = ""
    remarks: tuple[str, ...] = ()


def _named(part: Part, found: Labelled, joinids: I64) -> Answer:
    """Codes as class names."""
    names = np.asarray(part.targets.classes, dtype=object)
    return Answer(joinids, names[found.codes], found.confidence)


def _scope(setting: Setting, part: Part, own: str) -> str:
    """What a seed changes, in words; "" only where it changes nothing at all."""
    parts = [own]
    if setting.unit.answers == "embedding":
        parts.append("clustering of the scores")
    elif len(part.split.validation):
        parts.append("validation cells")
    return ", ".join(p for p in parts if p)


def _probed(
    setting: Setting,
    part: Part,
    unit: BaselineUnit,
    config: Any,
    counts: Callable[[I64], CellCounts],
) -> dict[str, float]:
    """A baseline of labels in a table of embeddings: by the folds that probe each embedding."""
    known = part.asked[setting.labelled(part.asked)]
    labels = setting.truth(known)
    rows = scored_rows(labels)
    cells, folds = counts(known[rows]), probe_folds(labels[rows])
    names, codes = np.unique(labels[rows].astype(str), return_inverse=True)

    def predict(inside: I64, outside: I64) -> npt.NDArray[Any]:
        train = cells.rows(inside)
        found = annotate_with(unit, config, train, codes[inside], cells.rows(outside), part.seed)
        return np.asarray(names[found.codes])

    return probe_labels(folds, predict) | folds.counts


def _counts(setting: Setting, part: Part, entry: Entry) -> Callable[[I64], CellCounts]:
    """Where a baseline has its counts from: all genes, or those of a method's model."""
    if not entry.base:
        return setting.counts
    genes = np.flatnonzero(genes_known(setting, vocabulary_of(setting, entry, part.seed)))
    return lambda joinids: setting.counts(joinids).only(genes)


def _baseline(setting: Setting, part: Part, entry: Entry) -> Outcome:
    unit = baseline(entry.unit)
    config = unit.config(name=unit.name)
    started = time.perf_counter()
    counts = _counts(setting, part, entry)
    if setting.unit.answers == "embedding" and "embedding" not in unit.answers:
        answer = Answer(part.asked, probed=_probed(setting, part, unit, config, counts))
    elif setting.unit.answers == "embedding":
        joinids = part.asked
        cells = counts(joinids)
        truth = setting.label_codes(joinids) if unit.needs_labels else None
        embedding = embed_with(unit, config, cells, part.seed, truth=truth)
        answer = Answer(joinids, embedding=embedding)
    else:
        joinids = part.split.test
        train, query = counts(part.split.train), counts(joinids)
        codes = setting.codes(part, part.split.train)
        answer = _named(part, annotate_with(unit, config, train, codes, query, part.seed), joinids)
    seconds = time.perf_counter() - started
    lost = setting.gene_loss(vocabulary_of(setting, entry, part.seed)) if entry.base else {}
    row = replace(
        setting.template,
        method=entry.name,
        method_family=entry.family,
        base_method=entry.base,
        seed=part.seed,
        seed_scope=_scope(setting, part, unit.seed_scope),
        params_json=json.dumps(made_by(setting, entry, part.seed)),
        tuning_budget=tuning_budget(setting, entry),
        overlap_flag="none",
        wall_s=seconds,
        cpu_hours=seconds / 3600,
        gpu_hours=0.0,
        n_gpus=0,
        **_fields(lost),
    )
    remark = ("transductive: sees the counts of test cells",) if unit.transductive else ()
    return Outcome(answer, row, to_dict(config), remarks=remark)


@lru_cache(maxsize=8)
def weights_sha256(path: str) -> str:
    """SHA-256 over the weights and the vocabulary of a model."""
    model = loaded(path)
    digest = hashlib.sha256(model.vocab.fingerprint.encode())
    for name, value in sorted(model.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().numpy().tobytes())
    return digest.hexdigest()


def drawn_model(manifest: Manifest, vocab: Vocab, seed: int) -> LoadedModel:
    """The body that a manifest describes with weights drawn by ``seed``, as training draws them."""
    bare = replace(manifest, classes=[], objective={}, metrics={}, step=0)
    torch.manual_seed(seed)
    return LoadedModel(model_of(bare, vocab).eval(), vocab, bare, f"random weights, seed {seed}")


def _body(setting: Setting, entry: Entry, seed: int) -> LoadedModel:
    """The frozen model of an entry: its checkpoint, or drawn weights in the same architecture."""
    assert entry.method is not None
    if entry.method.model:
        model = loaded(entry.method.model)
        if entry.kind == "frozen":
            return model
        return drawn_model(model.manifest, model.vocab, seed)
    job = prepare_finetune(finetune_run(setting, entry, seed)).job
    return drawn_model(job.manifest, job.data.source.vocab, seed)


def _head(setting: Setting, entry: Entry) -> str:
    assert entry.method is not None
    if entry.method.head != "auto":
        return entry.method.head
    return "knn" if setting.unit.neighbours else "logistic"


def tuning_budget(setting: Setting, entry: Entry) -> int:
    """Trials spent on a row's configuration, those of its head among them."""
    if entry.kind == "baseline":
        unit = baseline(entry.unit)
        return int(unit.trials(unit.config(name=unit.name)))
    labels = setting.unit.answers == "labels"
    if entry.kind == "finetune":
        return entry.tuning_budget
    head = HEAD_TRIALS if labels and _head(setting, entry) == "logistic" else 1
    return max(entry.tuning_budget if entry.kind == "frozen" else 1, head)


def tokens_of(setting: Setting, entry: Entry, seed: int, model: LoadedModel) -> TokenSource:
    """What turns the set's cells into the tokens of an entry's model.

    Raises:
        DataError: the model knows too few of the counts, and neither the benchmark nor the
            method's own file lets it pass.
    """
    assert entry.method is not None
    lost = bool(entry.method.config) and finetune_run(setting, entry, seed).data.allow_gene_loss
    return setting.tokens_of(model, allow_gene_loss=lost)


_kept_vectors: dict[tuple[Any, ...], tuple[F32, float]] = {}


def _weights(setting: Setting, entry: Entry, seed: int) -> str:
    """What tells weights apart: their digest; "" of those that a seed draws."""
    checkpoint = checkpoint_of(setting, entry, seed)
    return weights_sha256(checkpoint) if checkpoint else ""


def _embedded(key: tuple[Any, ...], embed: Callable[[], F32]) -> tuple[F32, float, float]:
    """Vectors that are the same for every seed, made for the first of those done in a process.

    Returns:
        The vectors, the seconds it took to make them, and the seconds that were saved now: they
        belong to the cost of every seed's row.
    """
    saved = key in _kept_vectors
    if not saved:
        begun = time.perf_counter()
        vectors = embed()
        _kept_vectors.clear()  # one at a time: they may be large
        _kept_vectors[key] = vectors, time.perf_counter() - begun
    vectors, spent = _kept_vectors[key]
    return vectors, spent, spent if saved else 0.0


def _frozen(setting: Setting, part: Part, entry: Entry) -> Outcome:
    started = time.perf_counter()
    model = _body(setting, entry, part.seed)
    source = tokens_of(setting, entry, part.seed, model)
    labels_asked = setting.unit.answers == "labels"
    joinids = part.asked
    # seeds have other training and validation cells, but the same of both together
    learnt = np.union1d(part.split.train, part.split.validation)
    read = np.union1d(learnt, joinids) if labels_asked else joinids
    body = (model.path, repr(model.manifest), model.vocab.fingerprint)
    key = (setting.content_sha256, *body, _weights(setting, entry, part.seed), read.tobytes())
    vectors, spent, saved = _embedded(key, lambda: embed_cells(model, source, read))
    at = np.searchsorted(read, joinids)
    if labels_asked:
        train = vectors[np.searchsorted(read, part.split.train)]
        codes = setting.codes(part, part.split.train)
        if _head(setting, entry) == "logistic":
            found = logistic_head(train, codes, vectors[at], seed=part.seed)
        else:
            found = neighbour_head(train, codes, vectors[at], k=setting.num_neighbours)
        answer = _named(part, found, joinids)
    else:
        answer = Answer(joinids, embedding=vectors[at])
    seconds = time.perf_counter() - started + saved
    row = replace(
        _model_row(setting, entry, part, model),
        wall_s=seconds,
        cpu_hours=seconds / 3600,
        gpu_hours=0.0,
        n_gpus=0,
        cells_per_s=len(read) / spent,
    )
    made = {"model": model.path, "head": _head(setting, entry) if labels_asked else ""}
    return Outcome(answer, row, made, remarks=_loss_remarks(row))


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(values)


def _loss_remarks(row: ResultRow) -> tuple[str, ...]:
    """A flag on a model that knows less than 60 % of the counts."""
    share = 1.0 if row.umi_fraction_matched is None else row.umi_fraction_matched
    return (f"knows {share:.0%} of the counts",) if share < MIN_COUNT_FRACTION else ()


def _overlap_fields(seen: Overlap | None) -> dict[str, Any]:
    """What a row says of pretraining: nothing was seen where there was none."""
    if seen is None:
        return {"overlap_flag": "none"}
    return {
        "overlap_flag": seen.flag,
        "overlap_fraction": seen.fraction,
        "pretrain_corpus_id": seen.corpus_id,
    }


def _model_row(setting: Setting, entry: Entry, part: Part, model: LoadedModel) -> ResultRow:
    """The fields that say which model answered, which genes it knows and what it has seen."""
    assert entry.method is not None
    random = entry.kind == "random"
    seen = None if random or entry.scratch else overlap(model.folder, setting.cells, part.asked)
    backbone = model.backbone
    sizes = {**count_parameters(backbone), "n_params_trainable": 0}
    lost = setting.gene_loss(model.vocab)
    own = "" if entry.kind == "frozen" else "initial weights"
    head = _head(setting, entry) if setting.unit.answers == "labels" else ""
    if head == "logistic":
        own = ", ".join(p for p in (own, "inner folds") if p)
    return replace(
        setting.template,
        method=entry.name,
        method_family=entry.family,
        base_method=entry.base,
        seed=part.seed,
        seed_scope=_scope(setting, part, own),
        init="random_frozen" if random else "pretrained",
        checkpoint_id="" if random else entry.method.model,
        checkpoint_sha256="" if random else weights_sha256(model.path),
        **_overlap_fields(seen),
        tuning_budget=tuning_budget(setting, entry),
        params_json=json.dumps(made_by(setting, entry, part.seed)),
        **_fields({**sizes, **lost}),
    )


def _reserved(scale: ScaleSection) -> float:
    """CPUs that a fine-tuning run keeps for itself."""
    return scale.workers * (scale.cpus_per_worker + scale.tokenizer_actors * scale.cpus_per_actor)


def _check_same_cells(part: Part, split: Split) -> None:
    """A fine-tuning run must have the cells that the baselines have.

    Raises:
        DataError: its own file selects others.
    """
    for name in ("train", "validation", "test"):
        ours, theirs = getattr(part.split, name), getattr(split, name)
        if not np.array_equal(ours, theirs):
            raise DataError(
                f"the fine-tuning run has {len(theirs)} {name} cells, the benchmark {len(ours)}: "
                "leave out of its file what selects cells ([data] filters, [task] keys)"
            )


def _finetuned(setting: Setting, part: Part, entry: Entry) -> Outcome:
    assert entry.method is not None
    run = finetune_run(setting, entry, part.seed)
    goes_on = bool(committed(run_directory(setting, entry, part.seed).path))
    started = time.perf_counter()
    prepared = prepare_finetune(run)
    _check_same_cells(part, prepared.split)
    parent = setting.parent.run_id if setting.parent else None
    result = finetune(run, lambda line: None, parent=parent, prepared=prepared, look_at_test=False)
    model = load(result.trained.model_dir)
    if setting.unit.answers == "labels":
        labels, confidence = predict_cells(model, prepared, part.split.test)
        answer = Answer(part.split.test, labels, confidence.astype(np.float64), cutoff=model.cutoff)
    else:
        source, _ = token_source(model, prepared.cells, allow_gene_loss=run.data.allow_gene_loss)
        answer = Answer(part.asked, embedding=embed_cells(model, source, part.asked))
    seconds = time.perf_counter() - started
    gpus = run.scale.workers * run.scale.gpus_per_worker
    lost = setting.gene_loss(model.vocab)
    init = run.init_from if not entry.scratch else ""
    seen = overlap(loaded(init).folder, setting.cells, part.asked) if init else None
    row = replace(
        setting.template,
        method=entry.name,
        method_family=entry.family,
        base_method=entry.base,
        seed=part.seed,
        seed_scope=_scope(setting, part, "initial weights, batch order"),
        init="scratch" if entry.scratch else "pretrained",
        checkpoint_id=init,
        checkpoint_sha256=weights_sha256(init) if init else "",
        **_overlap_fields(seen),
        params_json=json.dumps(to_dict(run)),
        tuning_budget=tuning_budget(setting, entry),
        world_size=run.scale.workers,
        micro_batch=run.batch.cells_micro,
        effective_batch=effective_batch(
            prepared.job.data.plan, workers=run.scale.workers, cells_global=run.batch.cells_global
        ),
        precision=run.train.precision,
        n_gpus=int(gpus),
        gpu_hours=gpus * seconds / 3600,
        cpu_hours=_reserved(run.scale) * seconds / 3600,
        wall_s=seconds,
        cells_per_s=result.trained.metrics.get("cells_per_s"),
        mfu_real=result.trained.metrics.get("mfu"),
        **_fields({**result.params, **lost}),
    )
    remarks = (*setting.trained_remarks(part, result.train_accuracy), *_loss_remarks(row))
    if goes_on:
        remarks = (*remarks, "went on from a checkpoint: its hours are those of the last start")
    return Outcome(
        answer,
        row,
        child_run_id=result.trained.mlflow_run_id,
        model_dir=str(run_directory(setting, entry, part.seed).model),
        remarks=remarks,
    )


def answer_of(setting: Setting, part: Part, entry: Entry) -> Outcome:
    """Have an entry answer for a seed.

    Raises:
        CellrayError, RuntimeError, OSError: it could not; the cell of the table is then failed.
    """
    if entry.kind == "baseline":
        return _baseline(setting, part, entry)
    if entry.kind == "finetune":
        return _finetuned(setting, part, entry)
    return _frozen(setting, part, entry)


def checkpoint_of(setting: Setting, entry: Entry, seed: int) -> str:
    """The checkpoint whose weights an entry starts from, "" if it draws its own or has none."""
    if entry.method is None or entry.kind in ("baseline", "random") or entry.scratch:
        return ""
    return entry.method.model or finetune_run(setting, entry, seed).init_from


def answering_model(setting: Setting, entry: Entry, seed: int) -> LoadedModel | None:
    """The model that answered for an entry, None if there is none (any more)."""
    if entry.kind == "finetune":
        folder = run_directory(setting, entry, seed).model
        return load(str(folder)) if folder.is_dir() else None
    return None if entry.kind == "baseline" else _body(setting, entry, seed)
