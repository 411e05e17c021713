"""From h5ad files to one SOMA experiment: checked, joined on genes, written, published whole.

How a file becomes cells of a store
    1. Every file is opened and looked at before anything is written: layer, genes, cell ids,
       names of datasets, whether its cells are in the store already.
    2. The genes of all files and of the store are joined; new genes are appended to var.
    3. Where rules choose cells by their counts, the files are read once to apply them. Then every
       cell has its joinid, in the order of the files.
    4. The files are cut into parts of some blocks. Parts are read, checked (finite, not negative,
       whole numbers), moved to the joined genes, hashed and written, side by side if there are
       workers; a part that an interrupted ingest had finished is taken over.
    5. The fragments of all parts become X, obs and var are written whole, the ledger is noted, and
       the store takes its place by a rename (see :mod:`cellray.data.staging`). An append shares
       the old store's X fragments.

Nothing of a file's counts is held but a block for each worker; ids and obs of all files are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiledbsoma

from cellray.core.errors import DataError
from cellray.data import parts, quality, schema, sources
from cellray.data.assembly import Assembly, Channel
from cellray.data.clock import Clock, Progress, introduce
from cellray.data.digest import content_digest
from cellray.data.existing import read_existing
from cellray.data.ingest_config import IngestConfig, MeasurementConfig
from cellray.data.ingest_report import FileReport, IngestReport
from cellray.data.ingest_tasks import num_workers, run_jobs
from cellray.data.joining import (
    Existing,
    OldVar,
    join,
    refuse_overlap,
    refuse_same_content,
)
from cellray.data.locate import local_target
from cellray.data.measurements import check_measurements, join_cells, look_measurement
from cellray.data.parts import PART_BLOCKS, Part, Spool
from cellray.data.quality import CellFigures
from cellray.data.remote_ingest import ingest_remote
from cellray.data.sources import Source
from cellray.data.staging import parts_of, staging

__all__ = ["FileReport", "IngestConfig", "IngestReport", "MeasurementConfig", "ingest", "look_all"]


I64 = npt.NDArray[np.int64]


def look_all(config: IngestConfig) -> list[dict[str, Source | None]]:
    """Look at every file: for each, its main source under ``RNA`` and the other measurements'.

    Raises:
        ConfigError: no files, or lists of other lengths.
        DataError: a file cannot be used.
    """
    names = sources.list_files(config)
    check_measurements(config, len(names))
    given = config.dataset_ids or [""] * len(names)
    found: list[dict[str, Source | None]] = []
    for number, (name, dataset) in enumerate(zip(names, given, strict=True)):
        main = sources.look(config, name, dataset_id=dataset)
        if config.primary_only:
            _ = main.primary  # refuses here what it does not understand
        looked: dict[str, Source | None] = {schema.MEASUREMENT: main}
        for other in config.measurements:
            looked[other] = look_measurement(config, other, main, number)
        found.append(looked)
    return found


class _Ingest:
    """The steps of one ingest, in order."""

    def __init__(
        self,
        config: IngestConfig,
        existing: Existing,
        files: Sequence[dict[str, Source | None]],
        folder: Path,
        progress: Progress,
    ) -> None:
        self.config, self.existing, self.folder, self.progress = config, existing, folder, progress
        self.main = [_main(looked) for looked in files]
        self.num_cells = sum(s.num_cells for s in self.main)
        self.workers = num_workers(config.workers, self.num_cells)
        self.keys: set[str] = set()
        self.parts_taken_over = 0
        names = dict.fromkeys([schema.MEASUREMENT, *existing.var, *config.measurements])
        self.channels: dict[str, Channel] = {}
        for name in names:
            own = [looked.get(name) for looked in files]
            old = existing.var.get(name, OldVar())
            genes = join(old, [s for s in own if s is not None])
            self.channels[name] = Channel(name, old, genes, own)

    def run(self) -> Assembly:
        """Read and write everything but obs, var and the groups."""
        config, main = self.config, self.channels[schema.MEASUREMENT]
        quality.refuse_idle(config, main.genes.mito)
        refuse_overlap(self.existing, self.main, main.genes, config.cells_per_block)
        parts.prepare(self.folder)
        self._spool()
        parts.give_back()
        scanned = self._scan(main)
        old = self.existing.obs
        old_hashes = (
            np.zeros(0, np.uint64) if old is None else old.column(schema.CELL_HASH).to_numpy()
        )
        everything = [np.ones(s.num_cells, dtype=bool) for s in self.main]
        primary = [s.primary for s in self.main] if config.primary_only else everything
        kept, dropped = quality.choose(config, scanned, primary, old_hashes)
        total = self.existing.num_cells + sum(int(k.sum()) for k in kept)
        if total == 0:
            quality.refuse_nothing(config, dropped, self.num_cells)
        joinids, following = [], self.existing.num_cells
        for mask in kept:
            joinids.append(np.where(mask, following + np.cumsum(mask) - 1, -1))
            following += int(mask.sum())
        for channel in self.channels.values():
            for source, home, ids in zip(channel.sources, self.main, joinids, strict=True):
                channel.joinids.append(_joinids(source, home, ids))
        self._write(scanned)
        figures = [self._figures(main.parts[i]) if s is None else s for i, s in enumerate(scanned)]
        contents = self._contents(figures)
        parts.give_back()
        return Assembly(
            config=config,
            existing=self.existing,
            main=self.main,
            channels=self.channels,
            figures=figures,
            kept=kept,
            dropped=dropped,
            contents=contents,
            folder=self.folder,
            num_cells=total,
        )

    def _contents(self, figures: Sequence[CellFigures]) -> list[str]:
        """Content digest of each file; refuses one that is there already."""
        found: list[str] = []
        entries = list(self.existing.ledger)
        for source, cells in zip(self.main, figures, strict=True):
            content = content_digest(source.id_hashes, cells.hashes)
            for entry in entries:
                refuse_same_content(source, content, entry)
            found.append(content)
            entries.append(
                {
                    "file": source.path,
                    "dataset_id": source.dataset_id,
                    "content_sha256": content,
                }
            )
        return found

    def _spool_of(self, source: Source) -> Spool:
        size = self.config.cells_per_block
        return Spool(source.path, source.layer, source.stamp, source.num_cells, size)

    def _spool(self) -> None:
        """Turn what is stored by columns into rows."""
        found = [s for c in self.channels.values() for s in c.sources if s is not None]
        jobs = {j.key: j for j in (self._spool_of(s) for s in found if s.by_columns)}
        self.keys |= set(jobs)
        waiting = [j for key, j in jobs.items() if not (self.folder / key).exists()]
        for job in waiting:
            self.progress(
                f"{job.path} layer {job.layer} is stored by columns: turning it into rows on disk"
            )
        run_jobs(waiting, self.folder, workers=self.workers, tick=lambda job, count: None)

    def _cut(self, channel: Channel, number: int, *, measured: bool, write: bool) -> list[Part]:
        """The parts of file ``number`` (from 0)."""
        source = channel.sources[number]
        if source is None:
            return []
        size = self.config.cells_per_block
        counts = source.counts(self.folder / self._spool_of(source).key)
        return [
            Part(
                number=number + 1,
                counts=counts,
                stamp=source.stamp,
                rows=(first, min(first + size * PART_BLOCKS, source.num_cells)),
                cells_per_block=size,
                gene_hashes=channel.genes.hashes,
                mito=channel.genes.mito,
                measured=measured,
                joinids=channel.joinids[number][first : first + size * PART_BLOCKS]
                if write
                else None,
            )
            for first in range(0, source.num_cells, size * PART_BLOCKS)
        ]

    def _run(self, jobs: Sequence[Part], what: str) -> None:
        """Do the parts that are not done."""
        keys = {part.key for part in jobs}
        self.keys |= keys
        waiting = [part for part in jobs if not (self.folder / part.key).exists()]
        clock = Clock(self.progress, what, len(self.main), sum(p.num_cells for p in jobs))
        if len(waiting) < len(jobs):
            done = clock.total - sum(p.num_cells for p in waiting)
            self.parts_taken_over += len(jobs) - len(waiting)
            clock.taken_over(len(jobs) - len(waiting), len(jobs), done)
        last = {part.number: part.rows[1] for part in jobs}
        done_of = dict.fromkeys(last, 0)

        def tick(part: Part, count: int) -> None:
            done_of[part.number] += count
            clock.cells(part.number, count, last=clock.done + count == clock.total)

        run_jobs(waiting, self.folder, workers=self.workers, tick=tick)

    def _scan(self, main: Channel) -> list[CellFigures | None]:
        """Figures of the files that must be read before cells can be chosen."""
        needed = quality.needs_scan(self.config)
        cut = [
            self._cut(main, i, measured=True, write=False) if needed and s.cells is None else []
            for i, s in enumerate(self.main)
        ]
        jobs = [part for own in cut for part in own]
        if jobs:
            self.progress("the rules choose cells by their counts: reading the files first")
            self._run(jobs, "looked through")
        found: list[CellFigures | None] = []
        for source, own in zip(self.main, cut, strict=True):
            if source.cells is not None:
                found.append(CellFigures(**source.cells.joined()))  # type: ignore[arg-type]
            else:
                found.append(self._figures(own) if own else None)
        return found

    def _write(self, scanned: Sequence[CellFigures | None]) -> None:
        for number, source in enumerate(self.main, start=1):
            introduce(self.progress, number, len(self.main), source)
        for channel in self.channels.values():
            home = channel.name == schema.MEASUREMENT
            for i in range(len(self.main)):
                measured = not home or scanned[i] is None
                channel.parts.append(self._cut(channel, i, measured=measured, write=True))
        jobs = [part for c in self.channels.values() for own in c.parts for part in own]
        self.keys |= {part.key for part in jobs}
        discarded = parts.discard_others(self.folder, self.keys)
        if discarded:
            self.progress(f"{discarded:,} parts of another, interrupted ingest are discarded")
        self._run(jobs, "written")

    def _figures(self, own: Sequence[Part]) -> CellFigures:
        found = [parts.figures(self.folder, part) for part in own]
        return CellFigures(**{n: np.concatenate([f[n] for f in found]) for n in found[0]})


def _main(looked: dict[str, Source | None]) -> Source:
    source = looked[schema.MEASUREMENT]
    assert source is not None, "every file has a main source"
    return source


def _joinids(source: Source | None, home: Source, ids: I64) -> I64:
    """Where the cells of a source go: the main one's have ``ids``, others are joined to them."""
    if source is None:
        return np.zeros(0, np.int64)
    return ids if source is home else join_cells(home, ids, source)


def ingest(config: IngestConfig, *, progress: Progress = lambda _: None) -> IngestReport:
    """Read h5ad files into a SOMA experiment, making it or adding to it.

    The store at ``config.uri`` changes at once or not at all: an ingest that fails or is killed
    leaves it as it was, and can be run again; it goes on where it was. The store's content is the
    same for any number of workers.

    Args:
        config: the ``[ingest]`` table.
        progress: is told how far the work is, a line at a time.

    Raises:
        ConfigError: no files, or not one dataset id a file.
        DataError: a file cannot be used (missing, damaged, no raw counts, ids that repeat), its
            cells are in the store already, or the store cannot be written.
    """
    started = time.monotonic()
    target = local_target(config.uri)
    if target is None:
        return ingest_remote(
            config, lambda local: ingest(local, progress=progress), progress=progress
        )
    files = look_all(config)
    parts.give_back()
    with staging(target) as place:
        try:
            existing = read_existing(config, target)
            work = _Ingest(config, existing, files, parts_of(target), progress)
            assembly = work.run()
            reports = assembly.build(target, place)
        except (tiledbsoma.SOMAError, OSError) as error:
            raise DataError(f"writing '{target}' failed: {error}") from error
    seconds = time.monotonic() - started
    return IngestReport(
        uri=str(target),
        num_cells=assembly.num_cells,
        num_genes=len(work.channels[schema.MEASUREMENT].genes.ids),
        files=tuple(reports),
        seconds=seconds,
        cells_per_s=work.num_cells / max(seconds, 1e-9),
        workers=work.workers,
        parts_taken_over=work.parts_taken_over,
        duplicate_cells=config.duplicate_cells,
    )
