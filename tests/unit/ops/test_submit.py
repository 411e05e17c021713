"""Submission: what is sent, what is refused before, and the exit code of real jobs."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cellray.core.errors import CellrayError, ConfigError
from cellray.ops import submit as s

REPOSITORY = Path(__file__).resolve().parents[3]
RUN = """
name = "sweep"
base = "configs/base.toml"
[search]
"optim.lr" = [1e-4, 1e-3]
"""


def _quiet(line: str) -> None:
    del line


# What is refused before anything is sent.


def test_unknown_job_has_a_did_you_mean(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no job 'pretrian'\. Did you mean 'pretrain'\?"):
        s.submit("pretrian", tmp_path / "x.toml", progress=_quiet)


def test_missing_configuration(tmp_path: Path) -> None:
    (tmp_path / "blood.toml").touch()
    with pytest.raises(ConfigError, match=r"no configuration file .*Did you mean 'blood.toml'"):
        s.submit("tune", tmp_path / "bloood.toml", progress=_quiet)


def test_invalid_configuration_is_refused_here(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(RUN)
    with pytest.raises(ConfigError, match=r"unknown key 'trails'\. Did you mean 'trials'"):
        s.submit("tune", file, ["trails=3"], "http://127.0.0.1:1", progress=_quiet)


def test_silent_cluster_says_what_to_check(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(RUN)
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        s.submit("tune", file, [], "127.0.0.1:1", progress=_quiet)
    assert time.monotonic() - started < 10
    text = str(caught.value)
    assert text.startswith("the Ray cluster at http://127.0.0.1:1 does not answer")
    for hint in ("ray start --head", "8265", "ray[default]", "refused"):
        assert hint in text


def test_an_address_that_is_no_dashboard() -> None:
    with pytest.raises(
        ConfigError, match=r"'ray://head:10001' is not a dashboard.*http://HEAD:8265"
    ):
        s._dashboard("ray://head:10001")


def test_a_server_that_is_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "fetch", lambda url, *, timeout_s: (200, "welcome"))
    with pytest.raises(ConfigError, match=r"answers, but not as a Ray dashboard \(HTTP 200\)"):
        s._dashboard("http://head:5000")


def test_where_the_address_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "fetch", lambda url, *, timeout_s: (200, '{"ray_version": "2.60.0"}'))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert s._dashboard("") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265/")
    assert s._dashboard("") == "http://other:8265"
    assert s._dashboard("head:8265") == "http://head:8265"


def test_a_token_is_left_to_rays_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "fetch", lambda url, *, timeout_s: (401, "Unauthorized"))
    assert s._dashboard("http://head:8265") == "http://head:8265"


def test_refusal_of_the_client_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        raise RuntimeError("Version check returned 404.")

    monkeypatch.setattr(s, "JobSubmissionClient", refuse)
    with pytest.raises(ConfigError, match=r"http://head:8265 refused: Version check returned 404"):
        s._connect("http://head:8265")


def test_ray_address_does_not_win_over_the_address_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def client(url: str) -> str:
        seen.update({k: os.environ.get(k) for k in s._ADDRESS_VARIABLES})
        return url

    monkeypatch.setattr(s, "JobSubmissionClient", client)
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    assert s._connect("http://head:8265") == "http://head:8265"
    assert seen == {"RAY_API_SERVER_ADDRESS": None, "RAY_ADDRESS": None}
    assert os.environ["RAY_ADDRESS"] == "elsewhere:6379"


def test_relative_folders_are_warned_of() -> None:
    flat = {"checkpoint.dir": "runs", "data.uri": ["s3://atlas/x", "store"], "name": "x"}
    told = s._local_paths(flat)
    assert [line.partition(" is ")[0] for line in told] == [
        "warning: checkpoint.dir = 'runs'",
        "warning: data.uri = 'store'",
    ]
    assert s._local_paths({"checkpoint.dir": "/mnt/runs", "data.uri": "s3://x"}) == []
    flat = {"reference.folder": "ref", "query.data.uri": "/mnt/q", "query.h5ad": "new.h5ad"}
    told = s._local_paths(flat)
    assert [line.split()[1] for line in told] == ["reference.folder", "query.h5ad"]


# What is sent.


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("jobs/configs/tune", "platform/cellray/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "jobs" / "tune.py").touch()
    (tmp_path / "jobs" / "configs" / "tune" / "x.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path / "jobs")
    return tmp_path.resolve()


def test_from_the_repository_the_working_tree_goes_along(repository: Path) -> None:
    config = repository / "jobs" / "configs" / "tune" / "x.toml"
    upload = s._prepare("tune", config, ["trials=2"], spare=Path("/nowhere"), progress=_quiet)
    assert upload.folder == repository
    assert upload.entrypoint == "python jobs/tune.py jobs/configs/tune/x.toml trials=2"
    assert upload.modules == (repository / "platform" / "cellray",)
    assert {".git/", ".venv/", "/runs/", "/store/"} <= set(upload.excludes)


def test_no_exclude_names_a_folder_of_the_package() -> None:
    """Ray applies them inside platform/cellray too: '/data/' would leave out cellray.data."""
    names = {p.name for p in (REPOSITORY / "platform" / "cellray").iterdir() if p.is_dir()}
    assert {"data", "models", "train"} <= names
    assert not (names - {"__pycache__"}) & {e.strip("/") for e in s._EXCLUDES}


def test_without_the_job_script_the_module_is_run(repository: Path) -> None:
    config = repository / "jobs" / "configs" / "tune" / "x.toml"
    upload = s._prepare("embed", config, [], spare=Path("/nowhere"), progress=_quiet)
    assert upload.entrypoint == "python -m cellray.cli embed jobs/configs/tune/x.toml"


def test_overrides_are_quoted_for_the_shell(repository: Path) -> None:
    config = repository / "jobs" / "configs" / "tune" / "x.toml"
    override = "data.obs_filter=tissue == 'blood' and $(rm -rf x)"
    upload = s._prepare("tune", config, [override], spare=Path("/nowhere"), progress=_quiet)
    assert shlex.split(upload.entrypoint)[-1] == override


def test_a_configuration_outside_the_repository_is_refused(repository: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        with pytest.raises(ConfigError, match=r"lies outside .*put it below jobs/configs/"):
            s._prepare("tune", Path(file.name), [], spare=Path("/nowhere"), progress=_quiet)


def test_large_files_stay_here_and_are_named(repository: Path) -> None:
    for name in ("deep/fragment", "runs/weights", "deep/cells.h5ad", "platform/cellray/data/genes"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(b"x" * 600)
    (repository / "deep" / "small").write_bytes(b"x" * 400)
    found = s._large_files(repository, limit_bytes=500)
    assert found == ["deep/fragment", "platform/cellray/data/genes"]


def test_elsewhere_only_the_configuration_and_what_it_names_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, spare = tmp_path / "here", tmp_path / "spare"
    (here / "configs").mkdir(parents=True)
    (here / "sweep.toml").write_text(RUN)
    (here / "configs" / "base.toml").write_text('name = "base"\ninit_from = "other.toml"\n')
    (here / "configs" / "other.toml").write_text('base = "sweep.toml"\n')  # a circle ends
    (here / "big.h5ad").touch()
    monkeypatch.chdir(here)
    upload = s._prepare("tune", Path("sweep.toml"), ["trials=2"], spare=spare, progress=_quiet)
    assert upload == s._Upload(spare, (), "python -m cellray.cli tune sweep.toml trials=2")
    sent = sorted(p.relative_to(spare).as_posix() for p in spare.rglob("*") if p.is_file())
    assert sent == ["configs/base.toml", "configs/other.toml", "sweep.toml"]


# Following a log.


def test_a_log_that_starts_over_repeats_nothing() -> None:
    lines: list[str] = []
    log = s._Log(lines.append)
    log.start_over()
    for chunk in ("one\ntwo\nth", "ree\n"):
        log.add(chunk)
    log.start_over()
    for chunk in ("one\n", "two\nthree\nfo", "ur\n\nlast"):
        log.add(chunk)
    assert lines == ["one", "two", "three", "four", ""]
    log.close()
    assert lines[-1] == "last"


class _Client:
    """A cluster whose log breaks off ``breaks`` times."""

    def __init__(self, text: str, *, breaks: int, status: str = "SUCCEEDED") -> None:
        self.text, self.breaks, self.status = text, breaks, status

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self.breaks:
            self.breaks -= 1
            yield self.text[: len(self.text) // 2]
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield self.text

    def get_job_info(self, job_id: str) -> Any:
        status = SimpleNamespace(value=self.status, is_terminal=lambda: True)
        return SimpleNamespace(status=status, message="exit code 1", driver_exit_code=3)


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_sleep")
def test_a_broken_connection_is_taken_up_again() -> None:
    lines: list[str] = []
    client = _Client("a\nb\nc\nd\n", breaks=2)
    assert s._follow(client, "j1", url="http://head:8265", progress=lines.append) == 0
    assert lines == ["a", "b", "c", "d", "job j1 succeeded"]


@pytest.mark.usefixtures("no_sleep")
def test_a_cluster_that_is_gone_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s, "_PATIENCE_S", -1.0)
    with pytest.raises(CellrayError, match=r"job j1 may still run\. .*ray job status j1 --address"):
        s._follow(_Client("a\n", breaks=9), "j1", url="http://head:8265", progress=_quiet)


@pytest.mark.parametrize(("status", "code"), [("SUCCEEDED", 0), ("FAILED", 1), ("STOPPED", 1)])
def test_exit_code_is_the_jobs(status: str, code: int) -> None:
    lines: list[str] = []
    client = _Client("x\n", breaks=0, status=status)
    assert s._follow(client, "j1", url="http://head:8265", progress=lines.append) == code
    if code:
        assert lines[-1] == f"job j1 {status.lower()} (exit code 3): exit code 1"


def test_a_refused_submission_is_a_config_error() -> None:
    def refuse(**given: Any) -> str:
        raise RuntimeError("Request failed with status code 500: too large")

    upload = s._Upload(Path("/tmp"), (), "python x.py")
    with pytest.raises(ConfigError, match=r"did not accept the job: .*too large"):
        s._start(SimpleNamespace(submit_job=refuse), upload, metadata={})


# A real cluster.


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/api/version", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the test's Ray cluster did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A head node of its own; its URL. Ended by its process group, never by 'ray stop'."""
    environment = {k: v for k, v in os.environ.items() if k not in s._ADDRESS_VARIABLES}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    # A job's "python" is the one on the PATH of whoever started the cluster.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "start.log")
        ray = Path(sys.executable).with_name("ray")
        words = [ray, "start", "--head", "--block", "--num-cpus=2", f"--port={_free_port()}"]
        words += [f"--dashboard-port={port}", f"--temp-dir={folder}"]
        words += [f"--dashboard-agent-listen-port={_free_port()}"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                words, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        try:
            _wait_for(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()  # 'ray start --block' ends what it started
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _run(url: str, script: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Any, str]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "script.py").write_text(script)
    client = s._connect(url)
    upload = s._Upload(tmp_path, ("*.h5ad",), f"{sys.executable} script.py")
    return client, s._start(client, upload, metadata={"cellray_job": "test"})


@pytest.mark.ray
def test_a_job_that_succeeds(cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "left-out.h5ad").touch()
    script = """
import os, ray
ray.init(logging_level="ERROR")
print("sum", ray.get(ray.remote(lambda: sum(range(10))).remote()))
print(sorted(os.listdir()))
print("no line end", end="")
"""
    client, job_id = _run(cluster, script, monkeypatch, tmp_path)
    lines: list[str] = []
    assert s._follow(client, job_id, url=cluster, progress=lines.append) == 0
    assert [x for x in lines if x.startswith(("sum", "[", "no"))] == [
        "sum 45",
        "['script.py']",
        "no line end",
    ]
    assert lines[-1] == f"job {job_id} succeeded"


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_that_fails_passes_its_exit_code_through(
    cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client, job_id = _run(
        cluster, "print('so far', flush=True)\nraise SystemExit(7)\n", monkeypatch, tmp_path
    )
    lines: list[str] = []
    assert s._follow(client, job_id, url=cluster, progress=lines.append) == 1
    assert "so far" in lines
    reason = "Job entrypoint command failed with exit code 7"
    assert lines[-1] == f"job {job_id} failed (exit code 7): {reason}"


@pytest.fixture
def _ctrl_c_works() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, test runs as well."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.ray
@pytest.mark.usefixtures("_ctrl_c_works")
def test_ctrl_c_leaves_the_job_running(
    cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "import time\nprint('begun', flush=True)\ntime.sleep(300)\n"
    client, job_id = _run(cluster, script, monkeypatch, tmp_path)
    lines: list[str] = []

    def hear(line: str) -> None:
        lines.append(line)
        if line == "begun":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()

    assert s._follow(client, job_id, url=cluster, progress=hear) == s.INTERRUPTED
    assert client.get_job_status(job_id).value == "RUNNING"
    assert lines[-1].startswith(f"job {job_id} goes on without this terminal")
    assert f"ray job stop {job_id} --address {cluster}" in lines[-1]
    client.stop_job(job_id)


@pytest.mark.slow
@pytest.mark.ray
def test_the_submitted_code_is_what_runs(
    cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A whole submission from a made-up repository with a cellray of its own."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "left-out").touch()
    (tmp_path / "platform" / "cellray" / "data").mkdir(parents=True)
    (tmp_path / "platform" / "cellray" / "__init__.py").write_text("HERE = 'the submitted one'\n")
    (tmp_path / "platform" / "cellray" / "data" / "vocab.py").write_text("GENES = 'its genes'\n")
    (tmp_path / "jobs" / "tune.py").write_text(
        "import os, ray, sys, cellray, cellray.data.vocab, platform\n"
        "ray.init(logging_level='ERROR')\n"
        "def where():\n    import cellray\n    return cellray.HERE\n"
        "print('driver', cellray.HERE, platform.system())\n"
        "print('worker', ray.get(ray.remote(where).remote()))\n"
        "print('data', cellray.data.vocab.GENES, os.path.exists('runs'))\n"
        "print('words', sys.argv[1:])\n"
    )
    (tmp_path / "sweep.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    code = s.submit("tune", "sweep.toml", ["trials=2"], cluster, progress=lines.append)
    assert code == 0, "\n".join(lines)
    assert "driver the submitted one Linux" in lines
    assert "worker the submitted one" in lines
    assert "data its genes False" in lines
    assert "words ['sweep.toml', 'trials=2']" in lines
    assert s.submit("tune", "sweep.toml", [], cluster, wait=False, progress=lines.append) == 0
    assert lines[-1].startswith("follow it: ray job logs raysubmit_")
