"""Sends a job to a running Ray cluster through Ray Jobs and follows its log to the exit code."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.job_submission import JobSubmissionClient

from cellray.core.errors import CellrayError, ConfigError
from cellray.core.section import flatten, read_toml, to_dict
from cellray.ops.environment import fetch

__all__ = ["INTERRUPTED", "MAX_FILE_BYTES", "submit"]

INTERRUPTED = 130  # exit code after Ctrl-C, as a shell gives it
MAX_FILE_BYTES = 32 * 2**20  # Ray keeps the upload in the head's memory and refuses 500 MiB

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# Never needed by a job; a leading slash means the root only. Ray applies the same patterns inside
# the cellray package, which is sent as a module: none may name one of its folders (so no /data/).
_EXCLUDES = (
    ".git/", ".venv/", "venv/", "__pycache__/", ".*_cache/", "*.egg-info/", "/runs/", "/mlruns/",
    "/shared/", "/store/", "/build/", "/dist/", "*.h5ad", "mlflow.db",
)  # fmt: skip
_PRUNED = frozenset({".git", ".venv", "venv", "__pycache__"})
_OF_A_BENCHMARK = re.compile(
    r"datasets\.[^.]+\.data\.uri|(datasets\.[^.]+\.)?methods\.[^.]+\.model"
)
_PATH_KEYS = (
    "checkpoint.dir", "data.uri", "data.cache", "reference.folder", "reference.data.uri",
    "query.data.uri", "query.h5ad",
)  # fmt: skip
_PATIENCE_S = 120.0  # how long a cluster may not answer while a log is followed

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Upload:
    """What a cluster is sent: a folder, what of it stays here, the command to run, modules."""

    folder: Path
    excludes: tuple[str, ...]
    entrypoint: str
    modules: tuple[Path, ...] = ()


def submit(
    job: str,
    path: str | Path,
    overrides: Sequence[str] = (),
    address: str = "",
    *,
    wait: bool = True,
    progress: Say,
) -> int:
    """Run one of the jobs on a running Ray cluster.

    The configuration is validated here first. From inside the repository the working tree goes
    along, so that the cluster runs this code; from elsewhere only the configuration does, and the
    cluster runs the cellray that is installed there.

    Args:
        job: one of :data:`cellray.runs.JOBS`.
        path: the run's TOML file.
        overrides: ``section.key=value`` items.
        address: the cluster's dashboard, ``http://host:8265``; "" takes RAY_API_SERVER_ADDRESS,
            else port 8265 of this machine.
        wait: follow the log to the end; False returns once the job is accepted.
        progress: receives the log, line by line.

    Returns:
        0 if the job succeeded (or was accepted, without ``wait``), 1 if it failed or was stopped,
        130 (:data:`INTERRUPTED`) after Ctrl-C, which leaves the job running.

    Raises:
        ConfigError: unknown job, missing or invalid configuration, a configuration outside the
            repository it is sent from, or a cluster that does not answer.
        CellrayError: the cluster stopped answering while the log was followed.
    """
    from cellray.runs import load_run

    run = load_run(job, path, overrides)
    url = _dashboard(address)
    for warning in _local_paths(flatten(to_dict(run))):
        progress(warning)
    with tempfile.TemporaryDirectory(prefix="cellray-submit-") as spare:
        upload = _prepare(job, Path(path), overrides, spare=Path(spare), progress=progress)
        client = _connect(url)
        job_id = _start(client, upload, metadata={"cellray_job": job, "config": Path(path).name})
    progress(f"job {job_id} accepted by {url}: {upload.entrypoint}")
    if not wait:
        progress(_how_to(job_id, url))
        return 0
    return _follow(client, job_id, url=url, progress=progress)


def _dashboard(address: str) -> str:
    """The dashboard's URL, once it has answered."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS", "") or _DEFAULT_ADDRESS
    url = (given if "://" in given else f"http://{given}").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"address '{given}' is not a dashboard; jobs are sent over HTTP: give "
            "'http://HEAD:8265' (the page that 'ray start --head' prints)"
        )
    status, body = fetch(f"{url}/api/version", timeout_s=5.0)
    if status in (401, 403):  # token authentication: the client sends the token and tells more
        return url
    if status != 200 or "ray_version" not in body:
        what = (
            f"answers, but not as a Ray dashboard (HTTP {status})" if status else "does not answer"
        )
        reason = "" if status else f" ({body})"
        raise ConfigError(
            f"the Ray cluster at {url} {what}{reason}. Check that it runs ('ray start --head' on "
            "its head), that the address has the dashboard's port (8265 unless it was changed; "
            "6379 is another one), that 'ray[default]' is installed there (it brings the "
            "dashboard and Ray Jobs) and that no firewall is between"
        )
    return url


@contextmanager
def _only_this_address() -> Iterator[None]:
    """Hide the variables that would silently win over an address given to Ray's client."""
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _connect(url: str) -> Any:
    try:
        with _only_this_address():
            return JobSubmissionClient(url)
    except (RayError, RuntimeError, OSError) as error:
        raise ConfigError(f"the Ray cluster at {url} refused: {error}") from error


def _local_paths(flat: dict[str, Any]) -> list[str]:
    """Warn of folders that would be looked up inside the job's temporary working folder."""
    given = [(key, flat.get(key)) for key in _PATH_KEYS]
    given += [(key, value) for key, value in flat.items() if _OF_A_BENCHMARK.fullmatch(key)]
    items = [(k, i) for k, v in given for i in (v if isinstance(v, list) else [v]) if i]
    return [
        f"warning: {key} = '{item}' is relative: on the cluster it lies in the job's working "
        "folder, which Ray deletes. Give a shared folder ('/mnt/...') or a bucket ('s3://...')"
        for key, item in items
        if "://" not in item and not item.startswith("/")
    ]


def _repository(start: Path) -> Path | None:
    """The nearest folder above ``start`` that holds this project, or None."""
    for folder in (start, *start.parents):
        if (folder / "jobs").is_dir() and (folder / "platform" / "cellray").is_dir():
            return folder
    return None


def _prepare(
    job: str, path: Path, overrides: Sequence[str], *, spare: Path, progress: Say
) -> _Upload:
    config = path.resolve()
    root = _repository(Path.cwd().resolve())
    if root is None:
        words = ["python", "-m", "cellray.cli", job, str(_stage(config, spare)), *overrides]
        return _Upload(spare, (), shlex.join(words))
    if not config.is_relative_to(root):
        raise ConfigError(
            f"'{path}' lies outside {root}, which is what the cluster is sent; put it below "
            "jobs/configs/, or submit from a folder outside the repository to use the cellray "
            "that is installed on the cluster"
        )
    script = f"jobs/{job}.py"
    start = (
        ["python", script] if (root / script).is_file() else ["python", "-m", "cellray.cli", job]
    )
    words = [*start, str(config.relative_to(root)), *overrides]
    large = _large_files(root)
    for name in large:
        progress(f"not sent, over {MAX_FILE_BYTES // 2**20} MiB: {name}")
    excludes = (*_EXCLUDES, *(f"/{name}" for name in large))
    # A module goes before what is installed: the cluster runs the submitted code, not its own.
    return _Upload(root, excludes, shlex.join(words), (root / "platform" / "cellray",))


def _stage(config: Path, folder: Path) -> Path:
    """Copy a configuration and those it names into ``folder``; return its name there.

    A sweep names its base and a benchmark its methods by the path of a TOML file, from this
    folder or from the file's own; each keeps its place relative to the first one's.
    """
    here = Path.cwd().resolve()
    top = here if config.is_relative_to(here) else config.parent
    waiting, staged = [config], set()
    while waiting:
        file = waiting.pop()
        staged.add(file)
        target = folder / file.relative_to(top)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
        for name in flatten(read_toml(file)).values():
            if isinstance(name, str) and name.endswith(".toml"):
                places = [(place / name).resolve() for place in (here, file.parent)]
                found = [p for p in places if p.is_file() and p.is_relative_to(top)]
                waiting += [p for p in found[:1] if p not in staged]
    return config.relative_to(top)


def _large_files(root: Path, *, limit_bytes: int = MAX_FILE_BYTES) -> list[str]:
    """Files over the limit that no exclude catches by name, relative to ``root``, sorted."""
    skipped = {e.strip("/") for e in _EXCLUDES if e.startswith("/")}
    found = []
    for where, folders, names in os.walk(root):
        top = Path(where) == root
        folders[:] = [f for f in folders if f not in _PRUNED and not (top and f in skipped)]
        for name in names:
            file = Path(where, name)
            if not file.is_symlink() and file.stat().st_size > limit_bytes:
                found.append(file.relative_to(root).as_posix())
    return sorted(n for n in found if not n.endswith(".h5ad"))


def _start(client: Any, upload: _Upload, *, metadata: dict[str, str]) -> str:
    runtime: dict[str, Any] = {
        "working_dir": str(upload.folder),
        "excludes": list(upload.excludes),
        "env_vars": {"PYTHONUNBUFFERED": "1"},
    }
    if upload.modules:  # an empty list fails on the cluster
        runtime["py_modules"] = [str(module) for module in upload.modules]
    try:
        job_id: str = client.submit_job(
            entrypoint=upload.entrypoint, runtime_env=runtime, metadata=metadata
        )
    except (RayError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"the cluster did not accept the job: {error}") from error
    return job_id


def _how_to(job_id: str, url: str) -> str:
    return (
        f"follow it: ray job logs {job_id} --follow --address {url}\n"
        f"stop it:   ray job stop {job_id} --address {url}"
    )


class _Log:
    """Turns chunks of a log into lines; a log that starts over repeats nothing."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._told = 0
        self._place = 0
        self._rest = ""

    def start_over(self) -> None:
        """The next chunk is the log's beginning again."""
        self._place = 0

    def add(self, chunk: str) -> None:
        """Say the complete lines that ``chunk`` brings and that were not said yet."""
        new = chunk[max(self._told - self._place, 0) :]
        self._place += len(chunk)
        self._told = max(self._told, self._place)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in lines:
            self._say(line)

    def close(self) -> None:
        """Say a last line that has no line end."""
        if self._rest:
            self._say(self._rest)
        self._rest = ""


async def _tail(client: Any, job_id: str, log: _Log) -> None:
    log.start_over()
    async for chunk in client.tail_job_logs(job_id):
        log.add(chunk)


def _follow(client: Any, job_id: str, *, url: str, progress: Say) -> int:
    """Say the job's log to its end; the exit code is the job's."""
    import aiohttp

    log = _Log(progress)
    silent_since = None
    try:
        while True:
            try:
                asyncio.run(_tail(client, job_id, log))
                info = client.get_job_info(job_id)
                silent_since = None
            except (RayError, RuntimeError, OSError, aiohttp.ClientError) as error:
                silent_since = silent_since or time.monotonic()
                _lose_patience(silent_since, job_id, url, error)
                time.sleep(2.0)
                continue
            if info.status.is_terminal():
                break
            time.sleep(1.0)
    except KeyboardInterrupt:
        progress(f"job {job_id} goes on without this terminal\n{_how_to(job_id, url)}")
        return INTERRUPTED
    log.close()
    return _conclude(info, job_id, progress)


def _lose_patience(silent_since: float, job_id: str, url: str, error: Exception) -> None:
    waited_s = time.monotonic() - silent_since
    if waited_s > _PATIENCE_S:
        raise CellrayError(
            f"{url} has not answered for {waited_s:.0f} s ({error}); job {job_id} may still run. "
            f"When the cluster is back: ray job status {job_id} --address {url}"
        ) from error


def _conclude(info: Any, job_id: str, progress: Say) -> int:
    status = str(getattr(info.status, "value", info.status))
    if status == "SUCCEEDED":
        progress(f"job {job_id} succeeded")
        return 0
    code = getattr(info, "driver_exit_code", None)
    told = f" (exit code {code})" if code is not None else ""
    reason = (info.message or "").partition(", last available logs")[0]  # said already
    progress(f"job {job_id} {status.lower()}{told}: {reason.strip()}")
    return 1
