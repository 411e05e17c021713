"""Which cells a run trained on at every step, by rank: written as it goes, read back as sets.

A line of ``cells/rank-RRRRR.jsonl`` is one step of one rank. Steps that were trained again after a
failure stand there twice; a reader takes what the last process group did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

__all__ = ["CellLog", "read_cell_log"]

I64 = npt.NDArray[np.int64]


class CellLog:
    """Appends the cells of steps; a line is on its way to the disk before the next step begins.

    Args:
        run_dir: the run's directory.
        rank: of this worker.
        world: number of workers.
        session: orders process groups in time (seconds since 1970).
    """

    def __init__(self, run_dir: str | Path, *, rank: int, world: int, session: float) -> None:
        folder = Path(run_dir) / "cells"
        folder.mkdir(parents=True, exist_ok=True)
        self._facts = {"rank": rank, "world": world, "session": session}
        file = folder / f"rank-{rank:05d}.jsonl"
        torn = file.is_file() and not file.read_bytes().endswith(b"\n") and file.stat().st_size
        self._file: TextIO = open(file, "a", encoding="utf-8")
        if torn:  # by a kill; what follows is a line of its own
            self._file.write("\n")

    def write(self, step: int, epoch: int, cell_ids: I64, *, taken: bool) -> None:
        """Log one step."""
        row = {**self._facts, "step": step, "epoch": epoch, "taken": taken}
        self._file.write(json.dumps({**row, "cells": cell_ids.tolist()}) + "\n")
        self._file.flush()


def read_cell_log(run_dir: str | Path) -> dict[int, dict[str, Any]]:
    """What was trained on at each step, as the last process group that reached the step did it.

    Returns:
        step -> ``{"epoch", "world", "session", "taken", "cells": {rank: (n,) ids}}``. A line that
        was cut short by a kill is left out.
    """
    steps: dict[int, dict[str, Any]] = {}
    for file in sorted((Path(run_dir) / "cells").glob("rank-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            entry = steps.get(row["step"])
            if entry is None or row["session"] > entry["session"]:
                entry = {k: row[k] for k in ("epoch", "world", "session", "taken")}
                steps[row["step"]] = {**entry, "cells": {}}
            if row["session"] == steps[row["step"]]["session"]:
                ids = np.asarray(row["cells"], dtype=np.int64)
                steps[row["step"]]["cells"][row["rank"]] = ids
    return dict(sorted(steps.items()))
