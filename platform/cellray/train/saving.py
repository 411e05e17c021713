"""Checkpoints of a running group of workers: written beside training, committed together.

A save copies the state to the host, then each rank writes and seals its share in a thread. At every
step ranks vote whether they are done; when all are, the checkpoint is reported, and the driver
notes it in ``checkpoints.jsonl``. Only what is noted there counts: a folder without a note is half
of something. A rank that cannot write says so with its vote, and all stop together.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cellray.core.errors import CheckpointError, StoppedError
from cellray.data.vocab import Vocab
from cellray.train.checkpoint import (
    ENGINE_DIR,
    MODEL_FILES,
    Manifest,
    seal,
    verify,
    write_checkpoint,
    write_tensors,
)
from cellray.train.engine import Snapshot, global_sum, world_size
from cellray.train.shards import optimizer_file

__all__ = ["NOTES", "Saver", "committed", "newest_whole", "prune", "remove_uncommitted"]

NOTES = "checkpoints.jsonl"
_FOLDER = "checkpoints"
_TROUBLE = 1e6

# Called with the folder's name and the metrics of its step; collective.
Commit = Callable[[str, Mapping[str, float]], None]


@dataclass
class _Pending:
    """A checkpoint on its way to the disk."""

    name: str
    metrics: Mapping[str, float]
    thread: threading.Thread | None = None
    done: threading.Event = field(default_factory=threading.Event)
    error: str = ""


class Saver:
    """Writes this rank's share of checkpoints.

    Args:
        run_dir: the run's directory, on a disk that all workers see.
        rank: of this worker.
        vocab: written with every checkpoint.
        session: tells this group of workers from others that wrote the same step.
        commit: is called when every rank has written.
    """

    def __init__(
        self, run_dir: str | Path, *, rank: int, vocab: Vocab, session: str, commit: Commit
    ) -> None:
        self._folder = Path(run_dir) / _FOLDER
        self._rank, self._vocab, self._session = rank, vocab, session
        self._commit = commit
        self._pending: _Pending | None = None

    def save(
        self,
        snapshot: Callable[[], Snapshot],
        manifest: Manifest,
        metrics: Mapping[str, float],
        *,
        wait: bool,
    ) -> None:
        """Begin to write a checkpoint; collective.

        Args:
            snapshot: copies the state; called when the checkpoint before this one is written.
            manifest: of the moment.
            metrics: of the moment.
            wait: return when it is committed.

        Raises:
            StoppedError: a rank could not write.
        """
        self.finish()
        state = snapshot()
        name = f"step-{manifest.step:08d}-{self._session}"
        pending = _Pending(name, metrics)
        pending.thread = threading.Thread(
            target=self._write, args=(pending, state, manifest), daemon=True
        )
        self._pending = pending
        pending.thread.start()
        del state
        if wait:
            self.finish()

    def vote(self) -> float:
        """What this rank has to say at a step; see :meth:`settle`."""
        pending = self._pending
        if pending is None or not pending.done.is_set():
            return 0.0
        return _TROUBLE if pending.error else 1.0

    def settle(self, votes: float) -> None:
        """Act on the sum of all ranks' votes: commit, stop, or wait on.

        Raises:
            StoppedError: a rank could not write.
        """
        pending = self._pending
        if pending is None or votes < world_size():
            return
        if votes >= _TROUBLE:
            if pending.thread is not None:
                pending.thread.join()
            told: list[Any] = [pending.error]
            if world_size() > 1:
                told = [None] * world_size()
                dist.all_gather_object(told, pending.error)
            if self._rank == 0:
                shutil.rmtree(self._folder / pending.name, ignore_errors=True)
            raise StoppedError(next(text for text in told if text))
        self._pending = None
        self._commit(pending.name, pending.metrics)

    def finish(self) -> None:
        """Wait until nothing is being written, and commit it; collective."""
        if self._pending is None:
            return
        if self._pending.thread is not None:
            self._pending.thread.join()
        self.settle(global_sum([self.vote()])[0])

    def _write(self, pending: _Pending, state: Snapshot, manifest: Manifest) -> None:
        folder = self._folder / pending.name
        tensors = [*state.optimizer.values(), *state.weights.values()]
        needed = sum(t.numel() * t.element_size() for t in tensors)
        try:
            (folder / ENGINE_DIR).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise OSError(f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
            self._share(folder, state, manifest)
        except Exception as error:  # noqa: BLE001  told to all ranks by the vote
            pending.error = (
                f"rank {self._rank} cannot write the checkpoint of step {manifest.step} to "
                f"'{folder}': {error}. Earlier checkpoints are whole; make room there and give the "
                "same command again, or set checkpoint.dir to another disk"
            )
        finally:
            pending.done.set()

    def _share(self, folder: Path, state: Snapshot, manifest: Manifest) -> None:
        world = manifest.workers
        file = f"{ENGINE_DIR}/{optimizer_file(self._rank, world)}"
        write_tensors(folder / file, state.optimizer)
        files = [file]
        if self._rank == 0:
            write_checkpoint(folder, manifest, vocab=self._vocab, weights=state.weights)
            files += MODEL_FILES
        for name in files:
            with open(folder / name, "rb") as written:
                os.fsync(written.fileno())
        seal(folder, files, rank=self._rank, world=world)


def committed(run_dir: str | Path) -> list[dict[str, Any]]:
    """Notes of the checkpoints of a run, the oldest first; a line cut short is left out."""
    file = Path(run_dir) / NOTES
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def newest_whole(run_dir: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones that are not.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    torn = []
    for place, note in enumerate(reversed(committed(run_dir))):
        folder = Path(run_dir) / _FOLDER / str(note["name"])
        if not folder.is_dir():
            if place == 0:  # older ones have made room for newer ones; this one never would
                torn.append(f"checkpoint '{folder}' is noted, but gone")
            continue
        try:
            verify(folder)
        except CheckpointError as error:
            torn.append(str(error))
            continue
        return folder, torn
    if torn:
        raise CheckpointError(
            f"no checkpoint of '{run_dir}' is whole: {'; '.join(torn)}. Restore one from a copy, "
            "or set checkpoint.resume = 'never' to move the run aside and begin anew"
        )
    return None, []


def judged_loss(note: Mapping[str, Any]) -> float:
    """The validation loss of a noted checkpoint; inf where there is none, or it is no number."""
    loss = float(note.get("validation/loss", math.inf))
    return math.inf if math.isnan(loss) else loss


def prune(run_dir: str | Path, *, keep_last: int) -> None:
    """Delete all checkpoints but the newest ones and the best by validation loss."""
    there = [n for n in committed(run_dir) if (Path(run_dir) / _FOLDER / str(n["name"])).is_dir()]
    best = [min(there, key=judged_loss)] if there else []
    kept = {str(note["name"]) for note in [*there[-keep_last:], *best]}
    for note in there:
        if note["name"] not in kept:
            shutil.rmtree(Path(run_dir) / _FOLDER / str(note["name"]), ignore_errors=True)


def remove_uncommitted(run_dir: str | Path) -> None:
    """Delete what killed workers left half-written."""
    noted = {str(note["name"]) for note in committed(run_dir)}
    for folder in (Path(run_dir) / _FOLDER).glob("step-*"):
        if folder.name not in noted:
            shutil.rmtree(folder, ignore_errors=True)
