"""What a checkpoint folder holds, how it is read back, and how it is known to be whole.

Layout of a checkpoint folder
    manifest.json        format, family, model/tokenizer/objective configuration, step, cursor,
                         random state, vocabulary and data fingerprints, names, code version
    vocab.json.gz        the gene space
    weights.safetensors  the whole model's float32 state dict, whatever engine and ZeRO stage
                         wrote it (older folders have weights.pt); low-rank factors of a run that
                         trains them lie beside the weights they belong to, and are multiplied out
                         into them in exported models
    corpus.*             what the weights have seen, see :mod:`cellray.data.corpus`; in exported
                         models of our own only
    engine/              the optimizer's state, see :mod:`cellray.train.shards`, and for each rank
                         a seal: sizes and checksums of what it wrote; absent from exported models
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cellray.core.errors import CheckpointError, DataError, did_you_mean
from cellray.core.section import build_section
from cellray.data.corpus import bring
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, CellModel, build_model, family
from cellray.nn.lora import has_factors, merge_factors

__all__ = [
    "ENGINE_DIR",
    "Manifest",
    "export_model",
    "model_of",
    "read_checkpoint",
    "read_manifest",
    "read_weights",
    "seal",
    "verify",
    "write_checkpoint",
    "write_manifest",
    "write_tensors",
]

FORMAT = "cellray.checkpoint.v1"
ENGINE_DIR = "engine"
_MANIFEST, _VOCAB, _WEIGHTS = "manifest.json", "vocab.json.gz", "weights.safetensors"
_OLD_WEIGHTS = "weights.pt"
MODEL_FILES = (_VOCAB, _WEIGHTS, _MANIFEST)
_CHUNK_BYTES = 8 << 20


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
        random_state: what random draws of later steps follow from.
        loop: what the training loop remembers of past steps (recent losses).
        run: the run's whole resolved configuration.
        metrics: the last validation's numbers.
        refuse_below: a cell whose best class has a lower probability is not annotated; None takes
            the family's own cutoff.
        code_version: cellray's version and git commit.
        chosen_genes: the gene space is a choice of variable genes, here or in a run before.
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
    random_state: Mapping[str, Any] = field(default_factory=dict)
    loop: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    refuse_below: float | None = None
    code_version: str = ""
    chosen_genes: bool = False
    format: str = FORMAT

    @property
    def genes_chosen(self) -> bool:
        """Whether the genes are a choice of variable ones, so that others are left out on purpose.

        Manifests of older versions say so in their configuration alone.
        """
        return self.chosen_genes or bool(self.run.get("data", {}).get("vocab_genes"))

    def at(
        self,
        step: int,
        cursor: Mapping[str, int],
        workers: int,
        metrics: Mapping[str, float],
        *,
        random_state: Mapping[str, Any] | None = None,
        loop: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """The same manifest for a later moment of the run."""
        return replace(
            self,
            step=step,
            cursor=cursor,
            workers=workers,
            metrics=metrics,
            random_state=random_state or {},
            loop=loop or {},
        )


def write_checkpoint(
    folder: Path, manifest: Manifest, *, vocab: Vocab, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write manifest, vocabulary and weights; the manifest, last, marks the folder whole."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab.save(folder / _VOCAB)
    write_tensors(folder / _WEIGHTS, weights)
    write_manifest(folder, manifest)


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, at once; tied ones are written each by itself."""
    partial = file.with_name(file.name + ".partial")
    seen: set[int] = set()
    apart = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        place = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if place in seen else value
        seen.add(place)
    try:
        save_file(apart, str(partial))
        os.replace(partial, file)
    except SafetensorError as error:
        raise OSError(f"cannot write '{file}': {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _facts(file: Path) -> dict[str, int]:
    """Size and checksum of a file as it lies on the disk."""
    size = check = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            size += len(chunk)
            check = zlib.crc32(chunk, check)
    return {"bytes": size, "crc32": check}


def _seal_name(rank: int, world: int) -> str:
    return f"seal-{rank:05d}-of-{world:05d}.json"


def seal(folder: Path, files: Iterable[str], *, rank: int, world: int) -> None:
    """Say of what a rank wrote how long it is and what is in it; the last thing a rank writes."""
    facts = {name: _facts(folder / name) for name in files}
    target = folder / ENGINE_DIR / _seal_name(rank, world)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(facts))
    os.replace(partial, target)


def verify(folder: str | Path) -> Manifest:
    """Check that a checkpoint of a run is whole: every rank's seal, and every file it names.

    Raises:
        CheckpointError: something is missing, cut short or changed; the message says what.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    sealed: set[Path] = set()
    for rank in range(manifest.workers):
        name = _seal_name(rank, manifest.workers)
        try:
            facts = json.loads((path / ENGINE_DIR / name).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"checkpoint '{path}' is torn: rank {rank} of {manifest.workers} did not finish "
                f"it ({error})"
            ) from error
        for file, expected in facts.items():
            if not (path / file).is_file() or _facts(path / file) != expected:
                raise CheckpointError(
                    f"checkpoint '{path}' is torn: '{file}' is not what rank {rank} wrote"
                )
        sealed |= {path / file for file in facts}
    others = sorted(str(f) for f in set((path / ENGINE_DIR).glob("*.safetensors")) - sealed)
    if others:
        raise CheckpointError(
            f"checkpoint '{path}' is mixed with another: no rank sealed {', '.join(others[:3])}"
        )
    return manifest


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
    """Read a checkpoint whole; low-rank factors are multiplied out into the weights.

    Raises:
        CheckpointError: it is missing, torn, or its vocabulary is not the one it was trained with.
    """
    manifest = read_manifest(path)
    folder = _model_folder(path)
    try:
        vocab = Vocab.load(folder / _VOCAB)
        weights = merge_factors(read_weights(folder))
    except (DataError, OSError, EOFError, KeyError) as error:
        raise CheckpointError(f"checkpoint '{path}' is torn: {error}") from error
    if vocab.fingerprint != manifest.vocab_fingerprint:
        raise CheckpointError(
            f"checkpoint '{path}' holds a vocabulary ({len(vocab)} genes, "
            f"{vocab.fingerprint[:12]}) other than the one it was trained with "
            f"({manifest.vocab_fingerprint[:12]}); the folder was changed after training"
        )
    return manifest, vocab, weights


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 state dict of a checkpoint folder.

    Raises:
        CheckpointError: the file is missing or torn.
    """
    try:
        if (folder / _WEIGHTS).is_file() or not (folder / _OLD_WEIGHTS).is_file():
            return dict(load_file(str(folder / _WEIGHTS)))
        loaded = torch.load(folder / _OLD_WEIGHTS, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CheckpointError(f"checkpoint '{folder}' is torn: {error}") from error
    return dict(loaded)


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


def export_model(source: Path, target: Path, *, beside: Iterable[Path] = ()) -> None:
    """Copy a checkpoint without its engine state; replaces ``target`` at once when complete.

    Low-rank factors are multiplied out: what is exported is an ordinary model.

    Args:
        source: the checkpoint folder.
        target: the model's folder.
        beside: further files that go with the model; they may be linked, not copied.
    """
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in MODEL_FILES:
        if name == _WEIGHTS and _factors_lie_in(source / name):
            write_tensors(partial / name, merge_factors(read_weights(source)))
        else:
            shutil.copyfile(source / name, partial / name)
    for file in beside:
        bring(file, partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def _factors_lie_in(file: Path) -> bool:
    with safe_open(str(file), framework="pt") as opened:
        return has_factors(opened.keys())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a checkpoint's manifest, at once."""
    partial = folder / f"{_MANIFEST}.partial"
    partial.write_text(json.dumps(asdict(manifest), indent=1))
    os.replace(partial, folder / _MANIFEST)
