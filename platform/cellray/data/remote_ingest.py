"""Ingest into an object store: built in a local scratch folder, then copied, visible when complete.

The scratch folder is named after the command (its configuration and the files' sizes and times), so
that the same command, run again after an interruption, goes on where it was: in building, or in
copying.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cellray.core.section import to_dict
from cellray.data.copying import publish_to, refuse_taken
from cellray.data.ingest_config import IngestConfig
from cellray.data.ingest_report import FileReport, IngestReport
from cellray.data.soma import open_store
from cellray.data.sources import list_files

__all__ = ["ingest_remote"]

Progress = Callable[[str], None]


def _scratch(config: IngestConfig) -> Path:
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    for name in list_files(config):
        if os.path.exists(name):
            found = os.stat(name)
            digest.update(f"{name}:{found.st_size}:{found.st_mtime_ns}".encode())
    folder = Path(config.scratch).expanduser() if config.scratch else Path(tempfile.gettempdir())
    return folder.resolve() / f"cellray-ingest-{digest.hexdigest()[:16]}"


def ingest_remote(
    config: IngestConfig,
    build: Callable[[IngestConfig], IngestReport],
    *,
    progress: Progress,
) -> IngestReport:
    """Build a new store locally and put it at ``config.uri``.

    Args:
        config: the ``[ingest]`` table, with an object store's address as uri.
        build: ingests into a local folder.
        progress: is told how far the work is.

    Raises:
        DataError: there is a store at the address already (an object store is not appended to), or
            the files or the storage cannot be used.
    """
    refuse_taken(config.uri, tiledb=config.tiledb)
    folder = _scratch(config)
    place = folder / "store"
    local = config.model_copy(update={"uri": str(place)})
    if place.exists():
        progress(f"the store was built already, in '{place}'")
        store = open_store(str(place))
        report = IngestReport(
            uri=config.uri,
            num_cells=store.num_cells,
            num_genes=store.num_genes,
            files=tuple(map(FileReport.of, store.ledger)),
            seconds=0.0,
            cells_per_s=0.0,
        )
    else:
        report = build(local)
    publish_to(config.uri, place, tiledb=config.tiledb, progress=progress)
    shutil.rmtree(folder, ignore_errors=True)
    return replace(report, uri=config.uri)
