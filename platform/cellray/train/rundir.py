"""The directory of a training run: configuration, progress, checkpoints, the exported model."""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellray.core.errors import CheckpointError, ConfigError
from cellray.core.jsonfile import read_table
from cellray.core.section import flatten, to_toml
from cellray.train.saving import NOTES

__all__ = ["RunDirectory", "drop_after"]

# What may change between two starts of a run: none of it changes the losses.
_FREE_KEYS = (
    "scale.",
    "tracking.",
    "checkpoint.",
    "engine.",
    "plan.",
    "data.allow_gene_loss",
    "data.corpus_hashes",
    "train.log_every_steps",
    "train.eval_cells",
    "train.log_cells",
    "train.profile_steps",
    "train.activation_checkpointing",
    "train.compile",
    "train.bad_steps",
    "train.explosion_factor",
    "train.max_bad_steps",
    # of a benchmark: more may be asked of it later
    "concurrent",
    "seeds",
    "methods.",
    "baselines",
    "bootstrap_draws",
    "task.refuse.",
    "register_as",
)


def _step_of(row: str) -> float:
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):  # damaged: kept nowhere
        return math.inf


def drop_after(file: Path, step: int) -> None:
    """Keep the whole rows of a JSON-lines file whose step is not after ``step``."""
    if not file.is_file():
        return
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for row in rows if row.endswith("\n") and _step_of(row) <= step]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, file)


class RunDirectory:
    """``<checkpoint.dir>/<name>``: configuration, progress, checkpoints and the exported model.

    Args:
        root: ``checkpoint.dir``.
        name: the run's name.
    """

    def __init__(self, root: str, name: str) -> None:
        self.path = Path(root).resolve() / name
        self.model = self.path / "model"
        self.progress = self.path / "metrics.jsonl"

    @classmethod
    def at(cls, path: str | Path) -> RunDirectory:
        """The run directory that a path names."""
        return cls(str(Path(path).parent), Path(path).name)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; {} if it is not there.

        Raises:
            DataError: it is damaged.
        """
        file = self.path / name
        if not file.is_file():
            return {}
        cure = "restore it from a copy, or give the run another name"
        keys = ("config",) if name == "run.json" else ()
        return read_table(file, *keys, what="file of a run", cure=cure)

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, at once."""
        partial = self.path / f"{name}.partial"
        partial.write_text(json.dumps(value, indent=1, default=str))
        os.replace(partial, self.path / name)

    def rewind(self, step: int) -> None:
        """Drop what was noted after ``step``: its steps are trained again."""
        for file in (self.progress, self.path / NOTES):
            drop_after(file, step)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only process that trains in this directory, also across machines.

        The lock goes with the process however it ends. A file system that has no locks is
        trusted.

        Raises:
            CheckpointError: another process holds it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f".{self.path.name}.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise CheckpointError(
                    f"run '{self.path.name}' in {self.path.parent} is being trained by "
                    f"{file.read() or 'another process'}; wait for it, stop it, or give this run "
                    "another name"
                ) from error
            except OSError:
                pass
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def enter(self, config: Mapping[str, Any], fingerprints: Mapping[str, str], mode: str) -> bool:
        """Begin or continue the run; True if it had begun before.

        Args:
            config: the resolved configuration.
            fingerprints: of vocabulary and data.
            mode: ``checkpoint.resume``.

        Raises:
            ConfigError: another configuration was begun under this name.
            CheckpointError: the vocabulary or the data changed since.
        """
        if mode == "never" and self.path.exists():
            aside = next(
                p
                for i in range(1, 10_000)
                if not (p := self.path.with_name(f"{self.path.name}.old{i}")).exists()
            )
            self.path.rename(aside)
        began = self.read("run.json")
        if not began:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.toml").write_text(to_toml(config) + "\n")
            self.write("run.json", {"config": config, **fingerprints})
            return False
        self._same_config(began["config"], config)
        for kind, value in fingerprints.items():
            if began[kind] != value:
                raise CheckpointError(
                    f"run '{self.path.name}' was begun with another {kind}: {began[kind][:12]}, "
                    f"now {value[:12]}; its checkpoints do not fit. Restore the data, give the "
                    "run another name, or set checkpoint.resume = 'never' to start anew"
                )
        return True

    def _same_config(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        old, new = flatten(before), flatten(now)
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key) and not key.startswith(_FREE_KEYS)
        ]
        if changed:
            raise ConfigError(
                f"a run named '{self.path.name}' exists in {self.path.parent} with another "
                f"configuration ({'; '.join(changed[:6])}); give this run another name, or set "
                "checkpoint.resume = 'never' to move the old one aside"
            )
