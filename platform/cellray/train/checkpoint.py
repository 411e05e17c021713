"""What a checkpoint folder holds beside the engine's state, and how it is read back.

Layout of a checkpoint folder
    manifest.json    format, family, model/tokenizer/objective configuration, step, cursor,
                     vocabulary and data fingerprints, covariate and class names, code version
    vocab.json.gz    the gene space
    weights.pt       the whole model's float32 state dict, whatever engine and ZeRO stage wrote it
    engine/          the engine's own state, for resuming; absent from exported models
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from cellray.core.errors import CheckpointError, DataError, did_you_mean
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, CellModel, build_model, family

__all__ = [
    "ENGINE_DIR",
    "Manifest",
    "export_model",
    "model_of",
    "read_checkpoint",
    "read_manifest",
    "write_checkpoint",
]

FORMAT = "cellray.checkpoint.v1"
ENGINE_DIR = "engine"
_MANIFEST, _VOCAB, _WEIGHTS = "manifest.json", "vocab.json.gz", "weights.pt"


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its tensors; JSON-like.

    Attributes:
        family: key of the model family.
        model: its configuration.
        tokenizer: the tokenizer's configuration.
        objective: the objective's configuration.
        vocab_fingerprint: SHA-256 of the gene space.
        data_fingerprint: SHA-256 over ids and counts of the cells the run was given.
        covariates: name -> categories, in code order.
        classes: label names in code order; empty if there is no classifier.
        classes_of: what the labels are of, ``cell`` or ``gene``.
        step: optimizer steps taken.
        cursor: where the data stream stands, ``{"epoch", "position"}``.
        workers: ranks that wrote it.
        run: the run's whole resolved configuration.
        metrics: the last validation's numbers.
        code_version: cellray's version and git commit.
    """

    family: str
    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    objective: Mapping[str, Any]
    vocab_fingerprint: str
    data_fingerprint: str
    covariates: Mapping[str, list[str]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    classes_of: str = "cell"
    step: int = 0
    cursor: Mapping[str, int] = field(default_factory=dict)
    workers: int = 1
    run: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    code_version: str = ""
    format: str = FORMAT

    def at(
        self, step: int, cursor: Mapping[str, int], workers: int, metrics: Mapping[str, float]
    ) -> Manifest:
        """The same manifest for a later moment of the run."""
        return replace(self, step=step, cursor=cursor, workers=workers, metrics=metrics)


def write_checkpoint(
    folder: Path, manifest: Manifest, *, vocab: Vocab, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write manifest, vocabulary and weights; the manifest, last, marks the folder whole."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab.save(folder / _VOCAB)
    torch.save(dict(weights), folder / _WEIGHTS)
    partial = folder / f"{_MANIFEST}.partial"
    partial.write_text(json.dumps(asdict(manifest), indent=1))
    os.replace(partial, folder / _MANIFEST)


def _model_folder(path: str | Path) -> Path:
    """The checkpoint folder itself, or the exported model of a run directory."""
    inner = Path(path) / "model"
    return inner if (inner / _MANIFEST).is_file() else Path(path)


def read_manifest(path: str | Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: there is no checkpoint at ``path``, or not one of this format.
    """
    folder = _model_folder(path)
    file = folder / _MANIFEST
    if not folder.is_dir():
        near = [p.name for p in folder.parent.glob("*")] if folder.parent.is_dir() else []
        raise CheckpointError(f"no checkpoint at '{path}'.{did_you_mean(folder.name, near)}")
    if not file.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"'{path}' is not a cellray checkpoint: it has no {_MANIFEST} (it holds {inside}); "
            "give the 'model' folder of a finished run"
        )
    try:
        raw = json.loads(file.read_text())
        if raw.get("format") != FORMAT:
            raise CheckpointError(f"'{path}' has format {raw.get('format')!r}, not '{FORMAT}'")
        return Manifest(**raw)
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the manifest of '{path}' cannot be read: {error}") from error


def read_checkpoint(path: str | Path) -> tuple[Manifest, Vocab, dict[str, torch.Tensor]]:
    """Read a checkpoint whole.

    Raises:
        CheckpointError: it is missing, torn, or its vocabulary is not the one it was trained with.
    """
    manifest = read_manifest(path)
    folder = _model_folder(path)
    try:
        vocab = Vocab.load(folder / _VOCAB)
        weights = torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True)
    except (DataError, OSError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
        raise CheckpointError(f"checkpoint '{path}' is torn: {error}") from error
    if vocab.fingerprint != manifest.vocab_fingerprint:
        raise CheckpointError(
            f"checkpoint '{path}' holds a vocabulary ({len(vocab)} genes, "
            f"{vocab.fingerprint[:12]}) other than the one it was trained with "
            f"({manifest.vocab_fingerprint[:12]}); the folder was changed after training"
        )
    return manifest, vocab, weights


def model_of(manifest: Manifest, vocab: Vocab) -> CellModel:
    """Build the (untrained) model that a manifest describes."""
    config = build_section(family(manifest.family).config, manifest.model)
    context = BuildContext(
        vocab=vocab,
        covariates={name: len(levels) for name, levels in manifest.covariates.items()},
        max_tokens=int(manifest.tokenizer.get("max_tokens", 2048)),
        tokenizer=manifest.tokenizer,
    )
    return build_model(
        manifest.family,
        config,
        context,
        num_classes=len(manifest.classes),
        classes_of=manifest.classes_of,
    )


def export_model(source: Path, target: Path) -> None:
    """Copy a checkpoint without its engine state; replaces ``target`` at once when complete."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in (_VOCAB, _WEIGHTS, _MANIFEST):
        shutil.copyfile(source / name, partial / name)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
