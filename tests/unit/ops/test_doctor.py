"""The doctor: each check alone, on made-up machines, and the whole on this one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cellray.ops import doctor as d

GIB = 2**30


@pytest.fixture
def server() -> Iterator[str]:
    """Answers like Ray's dashboard and an MLflow server."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            pages = {"/api/version": json.dumps({"ray_version": "2.60.0"}), "/health": "OK"}
            text = pages.get(self.path)
            self.send_response(200 if text else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def test_python_outside_the_declared_range() -> None:
    assert d.check_python("3.12.1", ">=3.11").status == "ok"
    old = d.check_python("3.9.2", ">=3.11")
    assert (old.status, old.what) == ("missing", "Python 3.9.2, cellray needs >=3.11")
    assert "virtual environment" in old.advice


def test_packages_name_what_is_absent_and_what_is_out_of_range() -> None:
    versions = {"ray": "2.61.0", "torch": "2.13.0+cpu", "mlflow": "2.9.0"}
    wanted = [
        "ray[data]<3,>=2.59",
        "torch>=2.6",
        "mlflow>=3.1",
        "scipy>=1.13",
        'ruff; extra == "dev"',
    ]
    found = d.check_packages(wanted, versions.get)
    assert [f.status for f in found] == ["ok", "missing", "missing"]
    assert found[0].what == "ray 2.61.0, torch 2.13.0+cpu"
    assert found[1].what == "mlflow 2.9.0 is outside >=3.1"
    assert found[2] == d.Finding("missing", "scipy is not installed", "pip install 'scipy>=1.13'")


def test_a_package_that_is_not_installed_is_said_and_the_rest_goes_on() -> None:
    [finding] = d.check_installation("no-such-package-as-this", "3.11.0")
    assert finding.status == "missing"
    assert finding.advice == "in the repository: pip install -e ."


def test_platform_init_file_is_found(tmp_path: Path) -> None:
    assert d.check_platform_folder(tmp_path).status == "ok"
    (tmp_path / "platform").mkdir()
    assert d.check_platform_folder(tmp_path).status == "ok"
    (tmp_path / "platform" / "__init__.py").touch()
    found = d.check_platform_folder(tmp_path)
    assert found.status == "missing"
    assert found.advice == f"remove it: rm {tmp_path / 'platform' / '__init__.py'}"


@pytest.mark.parametrize(
    ("finding", "status", "words"),
    [
        (d.check_compiler("/usr/bin/g++"), "ok", "/usr/bin/g++"),
        (d.check_compiler(None), "warning", "no C++ compiler"),
        (d.check_cpus(2), "ok", "2 logical CPUs"),
        (d.check_cpus(1), "warning", "1 logical CPU:"),
        (d.check_memory(24 * GIB), "ok", "24.0 GiB memory"),
        (d.check_memory(2 * GIB), "warning", "2.0 GiB memory; two workers"),
        (d.check_disk(80 * GIB, Path("/x")), "ok", "80 GiB disk free at /x"),
        (d.check_disk(GIB, Path("/x")), "warning", "1.0 GiB disk free at /x"),
        (d.check_shared_memory(None, 10 * GIB), "ok", "no /dev/shm"),
        (
            d.check_shared_memory(3 * GIB, 10 * GIB),
            "ok",
            "3.0 GiB free, Ray's object store wants 3.0",
        ),
        (d.check_shared_memory(64 * 2**20, 10 * GIB), "warning", "slow"),
        (d.check_gpu(False, "", lambda: False), "ok", "training runs on CPU"),
        (d.check_gpu(False, "13.0", lambda: False), "warning", "built for CUDA 13.0"),
        (d.check_gpu(True, "", lambda: False), "warning", "torch is a CPU build"),
        (d.check_gpu(True, "13.0", lambda: True), "ok", "GPU usable"),
        (d.check_gpu(True, "13.0", lambda: False), "warning", "torch cannot use it"),
        (d.check_gpu(False, None, lambda: False), "missing", "torch is not installed"),
    ],
)
def test_thresholds(finding: d.Finding, status: str, words: str) -> None:
    assert finding.status == status
    assert words in finding.what
    assert bool(finding.advice) == (status != "ok")


def test_small_shared_memory_says_the_size_to_ask_for() -> None:
    assert "--shm-size=3g" in d.check_shared_memory(64 * 2**20, 10 * GIB).advice


def test_torch_build_is_read_without_importing_torch() -> None:
    from torch import version

    assert d.torch_cuda_build() == (version.cuda or "")


def test_only_locks_older_than_ten_minutes_are_stale(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1000.0, 1000.0))
    assert d.check_torch_extensions(tmp_path, now_s=1000.0 + 599).status == "ok"
    found = d.check_torch_extensions(tmp_path, now_s=1000.0 + 601)
    assert found.status == "warning"
    assert found.advice == f"if nothing compiles just now: rm {lock}"
    assert d.check_torch_extensions(tmp_path / "none").status == "ok"


def test_a_port_is_free_ours_or_taken(server: str) -> None:
    port = int(server.rpartition(":")[2])
    assert d.check_port(port, "Ray's dashboard", "/api/version", "ray_version").status == "ok"
    other = d.check_port(port, "Ray's dashboard", "/health", "ray_version")
    assert other.status == "warning"
    assert "taken by another program" in other.what
    assert d.check_port(1, "Ray's dashboard", "/", "x").what == "port 1 is free for Ray's dashboard"


def test_ray_address(server: str) -> None:
    host_port = server.removeprefix("http://")
    for good in ("", "local", "auto", server, server + "/", host_port, f"ray://{host_port}"):
        assert d.check_ray_address({"RAY_ADDRESS": good}).status == "ok", good
    for bad in ("http://127.0.0.1:1", "127.0.0.1:1", "nonsense"):
        found = d.check_ray_address({"RAY_ADDRESS": bad})
        assert found.status == "missing", bad
        assert "unset RAY_ADDRESS" in found.advice


def test_mlflow(server: str) -> None:
    assert d.check_mlflow("").what == "MLflow writes to a SQLite file beside the runs"
    assert d.check_mlflow("sqlite:///runs/mlflow.db").status == "ok"
    assert d.check_mlflow(server).what == f"the MLflow server at {server} answers"
    silent = d.check_mlflow("http://127.0.0.1:1")
    assert silent.status == "missing"
    assert "does not answer" in silent.what
    assert "mlflow server --port 5000" in silent.advice
    assert "(HTTP 404)" in d.check_mlflow(server + "/elsewhere").what


def test_exit_code_is_1_only_if_something_is_missing() -> None:
    fine, poor, bad = (d.Finding(s, "x") for s in ("ok", "warning", "missing"))
    assert d.exit_code([fine, poor]) == 0
    assert d.exit_code([fine, bad]) == 1


def test_this_machine_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    findings = d.doctor(folder=tmp_path)
    assert d.exit_code(findings) == 0
    assert any("ray 2." in f.what and f.status == "ok" for f in findings)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert d.exit_code(d.doctor(folder=tmp_path)) == 1
