"""``cellray show PATH``: what a store, a checkpoint or a run holds, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cellray.core.errors import DataError, did_you_mean
from cellray.data.census import is_census
from cellray.data.corpus import read_corpus
from cellray.data.existing import stored_library_sizes
from cellray.data.ingest_report import sum_lines
from cellray.data.soma import open_store
from cellray.train.checkpoint import Manifest, read_checkpoint

__all__ = ["show"]


def _store(path: str, tiledb: Mapping[str, str] | None) -> list[str]:
    facts = open_store(path, tiledb=tiledb).describe()
    lines = [
        f"SOMA experiment {facts['uri']}",
        f"  cells: {facts['cells']}",
        f"  genes: {facts['genes']}",
        f"  layer: {facts['layer']} of {', '.join(facts['layers'])} ({facts['measurement']})",
        f"  measurements: {', '.join(facts['measurements'])}",
    ]
    if facts["bytes_on_disk"] is not None:
        lines.append(f"  size: {facts['bytes_on_disk'] / 1e6:.1f} MB")
    lines.append("  obs columns:")
    for name, kind in facts["obs_columns"].items():
        values = f", {kind['distinct']} values" if kind.get("distinct") is not None else ""
        lines.append(f"    {name}: {kind['type']}{values}")
    if facts["files"]:
        lines.append("  ingested from:")
    lines += [
        f"    {file['file']}: {file['cells']} cells x {file['genes']} genes as dataset "
        f"'{file['dataset_id']}', counts from {file['layer']}, content "
        f"{file['content_sha256'][:12]}"
        for file in facts["files"]
    ]
    lines += [f"    in all: {line}" for line in sum_lines(facts["files"])]
    sizes = stored_library_sizes(path, measurement=facts["measurement"], tiledb=tiledb)
    if sizes:
        told = ", ".join(f"{q:g}: {size:.0f}" for q, size in sizes.items())
        lines.append(f"  library sizes, quantiles: {told}")
    return lines


def _checkpoint(path: Path) -> list[str]:
    manifest: Manifest
    manifest, vocab, weights = read_checkpoint(path)
    parameters = sum(w.numel() for w in weights.values())
    origin = manifest.run.get("imported_from", "")
    lines = [
        f"checkpoint {path}",
        f"  family: {manifest.family}, {parameters:,} values in {len(weights)} tensors",
        f"  model: {json.dumps(dict(manifest.model))}",
        f"  tokenizer: {json.dumps(dict(manifest.tokenizer))}",
        f"  vocabulary: {len(vocab):,} genes ({', '.join(vocab.gene_ids[:3])}, ...), "
        f"specials {sorted(vocab.specials)}",
        *([f"  imported from: {origin}"] if origin else []),
        f"  trained: {manifest.step} steps by {manifest.workers} workers, cursor "
        f"{json.dumps(dict(manifest.cursor))}",
        f"  data: {manifest.data_fingerprint[:16]}",
        f"  code: {manifest.code_version}",
    ]
    seen = read_corpus(path)
    lines += [f"  {line}" for line in (seen.lines() if seen else ["seen in training: unknown"])]
    if manifest.classes:
        lines.append(f"  classes: {', '.join(manifest.classes)}")
    lines += [f"  {name}: {value:.5g}" for name, value in sorted(manifest.metrics.items())]
    return lines


def _run(path: Path) -> list[str]:
    lines = [f"run {path}"]
    progress = path / "metrics.jsonl"
    if progress.is_file():
        rows = [json.loads(line) for line in progress.read_text().splitlines() if line]
        if rows:
            last = rows[-1]
            lines.append(f"  last report: step {int(last['step'])}, loss {last['train/loss']:.4f}")
    finished = (path / "result.json").is_file()
    lines.append(f"  state: {'finished' if finished else 'not finished; run it again to go on'}")
    if (path / "model").is_dir():
        lines += [f"  {line}" for line in _checkpoint(path / "model")]
    config = path / "config.toml"
    if config.is_file():
        lines += ["  configuration:", *[f"    {x}" for x in config.read_text().splitlines() if x]]
    return lines


def show(path: str, *, tiledb: Mapping[str, str] | None = None) -> list[str]:
    """Describe what lies at ``path``.

    Args:
        path: a checkpoint, a run, or a store, also one in an object store or of the Census.
        tiledb: TileDB settings to reach a store with.

    Raises:
        DataError: nothing is there, or nothing that cellray knows.
    """
    place = Path(path)
    if "://" in path or is_census(path):
        return _store(path, tiledb)
    if not place.exists():
        near = [p.name for p in place.parent.glob("*")] if place.parent.is_dir() else []
        raise DataError(f"nothing at '{path}'.{did_you_mean(place.name, near)}")
    if (place / "manifest.json").is_file():
        return _checkpoint(place)
    if (place / "run.json").is_file():
        return _run(place)
    return _store(path, tiledb)
