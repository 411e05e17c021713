"""How far an ingest is: files, cells a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable

from cellray.data.sources import Source

__all__ = ["Clock", "Progress", "introduce"]

Progress = Callable[[str], None]

_EVERY_S = 2.0


def introduce(progress: Progress, number: int, num_files: int, source: Source) -> None:
    """Say what file ``number`` (from 1) of ``num_files`` is."""
    genes = source.genes
    whose = f"{genes.organism} genes" if genes.organism else "genes of no known organism"
    progress(
        f"file {number}/{num_files} {source.path}: {source.num_cells:,} cells from "
        f"{source.layer}, {whose}, {genes.num_ensembl:,} of {len(genes.feature_ids):,} with "
        "an Ensembl id"
    )
    if genes.merged:
        pairs = [f"{g} = {' + '.join(names)}" for g, names in list(genes.merged.items())[:3]]
        progress(
            f"  {len(genes.merged):,} genes are named by several rows, whose counts are "
            f"added up: {'; '.join(pairs)}"
        )


class Clock:
    """Says how far one reading of the files is.

    Args:
        progress: is told, a line at a time.
        what: begins each line, e.g. ``"written"``.
        num_files: files in all.
        num_cells: cells in all.
    """

    def __init__(self, progress: Progress, what: str, num_files: int, num_cells: int) -> None:
        self._progress, self._what = progress, what
        self._num_files, self.total = num_files, num_cells
        self._started = self._said = time.monotonic()
        self._taken_over = 0
        self.done = 0

    def taken_over(self, num_parts: int, of: int, num_cells: int) -> None:
        """Parts that an interrupted ingest had finished need no work."""
        self.done += num_cells
        self._taken_over += num_cells
        self._progress(
            f"{self._what}: {num_parts:,} of {of:,} parts ({num_cells:,} cells) taken over from "
            "an ingest that was interrupted"
        )

    def cells(self, number: int, count: int, *, last: bool = False) -> None:
        """``count`` more cells of file ``number`` are done; said every two seconds, and at last."""
        self.done += count
        now = time.monotonic()
        if last or now - self._said >= _EVERY_S:
            self._said = now
            rate = (self.done - self._taken_over) / max(now - self._started, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            self._progress(
                f"file {number}/{self._num_files}: {self.done:,} of {self.total:,} cells "
                f"{self._what}, {rate:,.0f} cells/s, ETA {left:,.0f} s"
            )
