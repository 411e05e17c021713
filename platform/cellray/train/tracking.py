"""MLflow: experiments, runs, flat parameters, metrics by step, tables and registered models."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import urlopen

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from cellray.core.errors import TrackingError, did_you_mean
from cellray.train.config import TrackingSection

__all__ = [
    "Tracker",
    "check_tracking",
    "code_version",
    "open_command",
    "tracking_uri",
]

_PARAM_CHARS = 6000  # MLflow's limit on a parameter's value
_NOTE_CHARS = 8000  # MLflow's limit on a tag's value
_PAGE_RUNS = 1000  # of one answer of the tracking store
_BATCH = 100  # MLflow's limit on parameters in one call
_STEP_KEYS = frozenset({"step", "epoch"})


def tracking_uri(section: TrackingSection, runs_dir: str) -> str:
    """The tracking store of a run: what the section says, else SQLite beside the runs."""
    if section.mlflow_uri:
        return section.mlflow_uri
    return f"sqlite:///{Path(runs_dir).resolve() / 'mlflow.db'}"


def open_command(uri: str) -> str:
    """The one command that opens the tracking pages of ``uri``."""
    if uri.startswith("http"):
        return f"open {uri} in a browser"
    path = uri.removeprefix("sqlite:///")
    relative = Path(path)
    if relative.is_absolute() and relative.is_relative_to(Path.cwd()):
        path = str(relative.relative_to(Path.cwd()))
    return f"mlflow ui --backend-store-uri sqlite:///{path}"


def check_tracking(uri: str, *, make: bool = True, timeout_s: float = 5.0) -> None:
    """See that the tracking store answers, before any work starts.

    Args:
        uri: of the tracking store.
        make: make the folder of a local database; otherwise only see that it could be made.
        timeout_s: how long a server has for its answer.

    Raises:
        TrackingError: a server that does not answer, or a scheme that is not supported.
    """
    parts = urlparse(uri)
    if parts.scheme in ("http", "https"):
        _check_server(uri, timeout_s)
        return
    if parts.scheme == "sqlite":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            else:
                _refuse_unmakeable(folder)
        except OSError as error:
            raise TrackingError(
                f"'{folder}' for the MLflow database cannot be made: {error}; set "
                "checkpoint.dir or tracking.mlflow_uri to a place you can write to"
            ) from error
        return
    if parts.scheme not in ("postgresql", "mysql", "mssql", "databricks"):
        raise TrackingError(
            f"tracking.mlflow_uri = '{uri}' is not supported; give a server "
            "('http://host:5000') or a database ('sqlite:///runs/mlflow.db')"
        )


def _refuse_unmakeable(folder: Path) -> None:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"'{there}' is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"'{there}' is not writable")


def _check_server(uri: str, timeout_s: float) -> None:
    advice = (
        "start it ('mlflow server --port 5000'), correct tracking.mlflow_uri, or leave it empty "
        "for a local SQLite file"
    )
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s) as answer:
            answer.read()
    except HTTPError as error:
        if error.code == HTTPStatus.NOT_FOUND or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise TrackingError(
                f"{uri} answers, but not as an MLflow server (HTTP {error.code}); {advice}"
            ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise TrackingError(
            f"the MLflow server at {uri} does not answer ({error}); {advice}"
        ) from error


def code_version() -> dict[str, str]:
    """The version of cellray, the git commit it runs from and whether the tree has changes."""
    from cellray import __version__

    def git(*words: str) -> str:
        where = Path(__file__).parent
        try:
            done = subprocess.run(
                ["git", *words], cwd=where, capture_output=True, text=True, timeout=10, check=False
            )
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    dirty = bool(git("status", "--porcelain", "--untracked-files=no")) if commit else False
    return {
        "cellray_version": __version__,
        "git_commit": commit or "unknown",
        "git_dirty": str(dirty).lower() if commit else "unknown",
    }


class Tracker:
    """One MLflow run, from the driver or (by id) from another process.

    Args:
        uri: tracking store.
        run_id: the run to write to.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = MlflowClient(tracking_uri=uri)

    @classmethod
    def start(
        cls,
        uri: str,
        *,
        experiment: str,
        name: str,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Tracker:
        """Create a run; ``parent`` makes it a child of that run.

        Raises:
            TrackingError: the store refuses.
        """
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # its migrations
        client = MlflowClient(tracking_uri=uri)
        try:
            found = client.get_experiment_by_name(experiment)
            if found is None:
                folder = _artifact_root(uri)
                where = f"{folder}/{experiment}" if folder else None
                experiment_id = client.create_experiment(experiment, artifact_location=where)
            else:
                experiment_id = found.experiment_id
            labels = {"mlflow.runName": name, **code_version(), **(tags or {})}
            if parent:
                labels["mlflow.parentRunId"] = parent
            run = client.create_run(experiment_id, run_name=name, tags=labels)
        except mlflow.MlflowException as error:
            raise TrackingError(f"MLflow at {uri} refused the run '{name}': {error}") from error
        return cls(uri, run.info.run_id)

    def params(self, flat: Mapping[str, Any]) -> None:
        """Log flat parameters; values beyond MLflow's length limit are cut."""
        items = [Param(key, str(value)[:_PARAM_CHARS]) for key, value in flat.items()]
        known = self._client.get_run(self.run_id).data.params
        new = [p for p in items if p.key not in known]
        for start in range(0, len(new), _BATCH):
            self._client.log_batch(self.run_id, params=new[start : start + _BATCH])

    def metrics(self, values: Mapping[str, float], *, step: int = 0) -> None:
        """Log metrics of one step."""
        now = int(time.time() * 1000)
        items = [
            Metric(key, float(value), now, step)
            for key, value in values.items()
            if key not in _STEP_KEYS
        ]
        self._client.log_batch(self.run_id, metrics=items)

    def table(self, frame: pd.DataFrame, name: str) -> None:
        """Log a table artifact that ``mlflow.load_table`` reads back."""
        self._client.log_table(self.run_id, frame, name)

    def text(self, text: str, name: str) -> None:
        """Log a text artifact."""
        self._client.log_text(self.run_id, text, name)

    def note(self, markdown: str) -> None:
        """Set the run's description, in whole lines up to what MLflow keeps of one."""
        if len(markdown) > _NOTE_CHARS:
            kept = markdown[: _NOTE_CHARS - 80].rsplit("\n", 1)[0]
            left = len(markdown[len(kept) :].strip().splitlines())
            markdown = f"{kept}\n\n(further lines, in the artifacts: {left})" if left else kept
        self._client.set_tag(self.run_id, "mlflow.note.content", markdown)

    def tag(self, key: str, value: str) -> None:
        """Set one tag."""
        self._client.set_tag(self.run_id, key, value)

    def untag(self, key: str) -> None:
        """Take a tag away, if it is there."""
        if key in self._client.get_run(self.run_id).data.tags:
            self._client.delete_tag(self.run_id, key)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file or a folder."""
        if Path(path).is_dir():
            self._client.log_artifacts(self.run_id, str(path), folder)
        else:
            self._client.log_artifact(self.run_id, str(path), folder)

    def end(self, status: str = "FINISHED") -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.run_id, status)

    def restart(self) -> None:
        """Mark the run as running again (a resumed job)."""
        try:
            self._client.update_run(self.run_id, status="RUNNING")
        except mlflow.MlflowException as error:
            raise TrackingError(
                f"the tracking store {self.uri} has no run {self.run_id} to go on with ({error}); "
                "bring the store back, or begin anew under another name"
            ) from error

    def children(self, tags: Mapping[str, str] | None = None) -> Sequence[Any]:
        """The runs whose parent is this one, with all these tags, newest first."""
        wanted = {"mlflow.parentRunId": self.run_id, **(tags or {})}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
        experiment = self._client.get_run(self.run_id).info.experiment_id
        found: list[Any] = []
        token: str | None = None
        while token != "":
            page = self._client.search_runs(
                [experiment], query, max_results=_PAGE_RUNS, page_token=token
            )
            found += page
            token = page.token or ""
        return found

    def run(self) -> Any:
        """The run as it stands: its tags, parameters and last metrics.

        Raises:
            TrackingError: the store has no such run.
        """
        try:
            return self._client.get_run(self.run_id)
        except mlflow.MlflowException as error:
            raise TrackingError(
                f"MLflow at {self.uri} has no run '{self.run_id}': {error}"
            ) from error

    def fetch(self, folder: str, target: str | Path, *, suffixes: Sequence[str]) -> list[Path]:
        """Copy the files of an artifact folder.

        Args:
            folder: of the run's artifacts.
            target: an existing folder; the files keep their names.
            suffixes: only of these kinds, e.g. ``.png``.

        Returns:
            Where the files are now, sorted; empty if the run has no such folder.
        """
        listed = self._client.list_artifacts(self.run_id, folder)
        there = [a.path for a in listed if not a.is_dir and a.path.endswith(tuple(suffixes))]
        with _no_progress_bars():
            found = [self._client.download_artifacts(self.run_id, p, str(target)) for p in there]
        return sorted(Path(path) for path in found)

    @classmethod
    def find_parents(
        cls, uri: str, *, experiment: str = "", tags: Mapping[str, str] | None = None
    ) -> Sequence[Any]:
        """Runs that are nobody's child, newest first.

        Args:
            uri: tracking store.
            experiment: only of this one; "" looks in all.
            tags: what they must carry; "" as a value takes any.

        Raises:
            TrackingError: there is no such experiment, or the store refuses.
        """
        client = MlflowClient(tracking_uri=uri)
        try:
            known = {e.name: e.experiment_id for e in client.search_experiments()}
            if experiment and experiment not in known:
                raise TrackingError(
                    f"MLflow at {uri} has no experiment '{experiment}'."
                    f"{did_you_mean(experiment, known)} It has: {', '.join(sorted(known))}"
                )
            wanted = [
                f"tags.`{key}` = '{value}'" if value else f"tags.`{key}` LIKE '%'"
                for key, value in (tags or {}).items()
            ]
            found = client.search_runs(
                [known[experiment]] if experiment else list(known.values()),
                " and ".join(wanted),
                max_results=1000,
                order_by=["attributes.start_time DESC"],
            )
        except mlflow.MlflowException as error:
            raise TrackingError(f"MLflow at {uri} refused the query: {error}") from error
        return [run for run in found if "mlflow.parentRunId" not in run.data.tags]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """MLflow draws one for every file it fetches, unless a variable says no."""
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _artifact_root(uri: str) -> str | None:
    """Artifacts of a local SQLite store lie beside it; servers have their own place."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()
