"""A profiler trace of some steps of rank 0, on request (``train.profile_steps``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["StepProfiler"]


class StepProfiler:
    """Records steps ``first .. last`` and writes a Chrome trace and a table of operators.

    Args:
        steps: (first, last) counted from 1; () records nothing.
        folder: receives ``steps-F-L.trace.json.gz`` (open it in Perfetto) and ``steps-F-L.txt``,
            named by the steps recorded: a run that goes on among them records the rest.
    """

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        self._steps = tuple(steps)
        self._folder = folder
        self._profiler: Any = None

    def step(self, done: int) -> None:
        """Tell that ``done`` steps are over, at the beginning and after every step."""
        if not self._steps:
            return
        first, last = self._steps
        if self._profiler is None and first - 1 <= done < last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()
            self._steps = (done + 1, last)
        elif self._profiler is not None and done >= last:
            self.close()

    def close(self) -> None:
        """Write what was recorded."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        first, last = self._steps
        self._steps = ()
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{first}-{last}"
        profiler.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=40)
        (self._folder / f"{name}.txt").write_text(table + "\n")
