"""A run's progress: noted by Ray Train's controller, said by the driver."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.train.v2.api.callback import UserCallback

from cellray.train.rundir import drop_after
from cellray.train.saving import NOTES, prune
from cellray.train.tracking import Tracker

__all__ = ["ReportCallback", "progress_line", "watch"]

Say = Callable[[str], None]


class ReportCallback(UserCallback):  # type: ignore[misc]
    """On the controller: every report goes to the run's progress file and to MLflow.

    Args:
        progress: path of ``metrics.jsonl``; committed checkpoints are noted beside it.
        uri: MLflow tracking store, "" for none.
        run_id: the MLflow run.
        keep_last: checkpoints kept, beside the best.
    """

    def __init__(self, progress: str, uri: str, run_id: str, *, keep_last: int) -> None:
        self._progress, self._uri, self._run_id = Path(progress), uri, run_id
        self._keep_last = keep_last
        self._tracker: Tracker | None = None
        self._last_step = 0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Note rank 0's metrics (they are sums over all ranks already)."""
        row = {**metrics[0], "time": time.time()}
        reported = row.pop("reported", False)
        step = int(row["step"])
        if not reported:
            if step <= self._last_step:  # a group of workers that began again
                drop_after(self._progress, step - 1)
            self._last_step = step
            self._append(self._progress, row)
            self._track(metrics[0], step)
        if checkpoint is not None:
            name = Path(checkpoint.path).name
            self._append(self._progress.with_name(NOTES), {**row, "name": name})
            prune(self._progress.parent, keep_last=self._keep_last)

    def _append(self, file: Path, row: Mapping[str, Any]) -> None:
        with open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")

    def _track(self, metrics: Mapping[str, Any], step: int) -> None:
        if self._uri:
            self._tracker = self._tracker or Tracker(self._uri, self._run_id)
            kept = {k: v for k, v in metrics.items() if k != "reported"}
            self._tracker.metrics(kept, step=step)


def progress_line(name: str, row: Mapping[str, float], total: int) -> str:
    """One report in words."""
    parts = [
        f"{name} step {int(row['step'])}/{total}",
        f"loss {row['train/loss']:.4f}",
        *([f"validation {row['validation/loss']:.4f}"] if "validation/loss" in row else []),
        f"{row['cells_per_s']:.0f} cells/s",
        f"{row['tokens_per_s']:.0f} tokens/s",
        *([f"MFU {row['mfu']:.1%}"] if "mfu" in row else []),
        *([f"{int(row['bad_steps'])} steps left out"] if row.get("bad_steps") else []),
        f"ETA {row['eta_s']:.0f} s",
    ]
    return "  ".join(parts)


def _new_rows(file: Path, after: float) -> list[dict[str, Any]]:
    """Whole rows later than a time."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["time"] > after]


@contextmanager
def watch(file: Path, name: str, total: int, say: Say) -> Iterator[None]:
    """Say every new row of a progress file, and every checkpoint, while the body runs."""
    stop = threading.Event()
    notes = file.with_name(NOTES)

    def follow() -> None:
        said = noted = time.time()
        size = (-1, -1)
        while True:
            last = stop.is_set()
            now = tuple(f.stat().st_size if f.is_file() else 0 for f in (file, notes))
            if now != size:
                size = (now[0], now[1])
                for row in _new_rows(file, said):
                    said = row["time"]
                    say(progress_line(name, row, total))
                for row in _new_rows(notes, noted):
                    noted = row["time"]
                    say(f"{name} checkpoint of step {int(row['step'])} is written")
            if last:
                return
            stop.wait(1.0)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
