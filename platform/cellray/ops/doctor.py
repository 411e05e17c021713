"""What this machine has for cellray, what is missing and what to do; every check stands alone."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cellray.ops.environment import fetch, has_gpu

__all__ = ["Finding", "doctor", "exit_code"]

_GIB = 2**30
_TIMEOUT_S = 3.0
_STALE_S = 600.0  # the longest compilation seen took 6 minutes
_OBJECT_STORE_FRACTION = 0.3  # of memory: Ray's default object store


@dataclass(frozen=True)
class Finding:
    """One thing the doctor looked at.

    Attributes:
        status: ``ok``; ``warning``: runs work, but slower, smaller or with a trap ahead;
            ``missing``: runs fail until the advice is followed.
        what: what was found, with numbers.
        advice: what to do; "" for ``ok``.
    """

    status: Literal["ok", "warning", "missing"]
    what: str
    advice: str = ""


def doctor(*, folder: Path | None = None, mlflow_uri: str = "") -> list[Finding]:
    """Look at this machine.

    Args:
        folder: where runs would be written and the repository may be; here by default.
        mlflow_uri: tracking server to ask; "" takes MLFLOW_TRACKING_URI.

    Returns:
        Findings, from the interpreter outwards.
    """
    where = (folder or Path.cwd()).resolve()
    variables = os.environ
    memory_bytes = psutil.virtual_memory().total
    extensions = variables.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    return [
        *check_installation("cellray", platform.python_version()),
        check_platform_folder(where),
        check_compiler(next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)),
        check_cpus(os.cpu_count() or 1),
        check_memory(memory_bytes),
        check_shared_memory(_free_bytes(Path("/dev/shm")), memory_bytes),
        check_disk(_free_bytes(where), where),
        check_gpu(has_gpu(), torch_cuda_build(), _cuda_works),
        check_torch_extensions(Path(extensions).expanduser()),
        check_port(8265, "Ray's dashboard", "/api/version", "ray_version"),
        check_ray_address(variables),
        check_mlflow(mlflow_uri or variables.get("MLFLOW_TRACKING_URI", "")),
    ]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if anything is missing, else 0."""
    return int(any(finding.status == "missing" for finding in findings))


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _free_bytes(folder: Path) -> int | None:
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def check_installation(name: str, python: str) -> list[Finding]:
    """Python and every package against what the installed ``name`` declares."""
    try:
        declared = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        what = f"{name} is not installed here, so the packages it needs are not known"
        return [Finding("missing", what, "in the repository: pip install -e .")]
    supported = declared["Requires-Python"] if "Requires-Python" in declared else ""
    return [
        check_python(python, supported),
        *check_packages(metadata.requires(name) or [], _installed),
    ]


def check_python(version: str, supported: str) -> Finding:
    """The interpreter against the range that the package declares, e.g. ``>=3.11``."""
    if version in SpecifierSet(supported):
        return Finding("ok", f"Python {version}")
    return Finding(
        "missing",
        f"Python {version}, cellray needs {supported}",
        "make a virtual environment with a newer Python: python3.11 -m venv .venv",
    )


def check_packages(
    requirements: Sequence[str], installed: Callable[[str], str | None]
) -> list[Finding]:
    """Every required package against its supported range; those in range share one finding.

    Args:
        requirements: as in the package's metadata; optional extras are left out.
        installed: version of a package, None where it is not installed.
    """
    good, bad = [], []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        if version is None:
            what = f"{requirement.name} is not installed"
        elif not requirement.specifier.contains(version, prereleases=True):
            what = f"{requirement.name} {version} is outside {requirement.specifier}"
        else:
            good.append(f"{requirement.name} {version}")
            continue
        bad.append(Finding("missing", what, f"pip install '{requirement}'"))
    return [*([Finding("ok", ", ".join(good))] if good else []), *bad]


def check_platform_folder(folder: Path) -> Finding:
    """No ``platform/__init__.py``: it would hide Python's own ``platform`` module."""
    file = folder / "platform" / "__init__.py"
    if not file.exists():
        return Finding("ok", "Python's own module 'platform' is not hidden")
    return Finding(
        "missing",
        f"{file} hides Python's own module 'platform': pytest, pip and Ray workers break",
        f"remove it: rm {file}",
    )


def check_compiler(path: str | None) -> Finding:
    """A C++ compiler, for the packages and DeepSpeed operators that are built here."""
    if path is not None:
        return Finding("ok", f"C++ compiler {path}")
    return Finding(
        "warning",
        "no C++ compiler: DeepSpeed cannot build its operators (offloading, fused Adam)",
        "apt install g++, or the same of your system (gcc-c++, clang)",
    )


def check_cpus(cpus: int) -> Finding:
    """Two logical CPUs: a worker and the stream that feeds it."""
    if cpus >= 2:
        return Finding("ok", f"{cpus} logical CPUs")
    return Finding(
        "warning",
        "1 logical CPU: workers and the token stream share it",
        "set scale.workers=1 and scale.cpus_per_worker=0.5, or use a larger machine",
    )


def check_memory(memory_bytes: int, *, least_gib: float = 6.0) -> Finding:
    """Memory for two debug workers, the stream and Ray itself."""
    gib = memory_bytes / _GIB
    if gib >= least_gib:
        return Finding("ok", f"{gib:.1f} GiB memory")
    return Finding(
        "warning",
        f"{gib:.1f} GiB memory; two workers, the stream and Ray want {least_gib:.0f}",
        "set scale.workers=1 and a smaller batch.cells_micro, or use a larger machine",
    )


def check_shared_memory(free_bytes: int | None, memory_bytes: int) -> Finding:
    """/dev/shm against the object store that Ray makes by default (30 % of memory)."""
    if free_bytes is None:
        return Finding("ok", "no /dev/shm here: Ray keeps its object store elsewhere")
    wanted = _OBJECT_STORE_FRACTION * memory_bytes
    what = f"/dev/shm has {free_bytes / _GIB:.1f} GiB free, Ray's object store wants"
    if free_bytes >= wanted:
        return Finding("ok", f"{what} {wanted / _GIB:.1f}")
    return Finding(
        "warning",
        f"{what} {wanted / _GIB:.1f}: it falls back to files on disk, which is slow",
        f"start the container with --shm-size={wanted / _GIB:.0f}g (Kubernetes: an emptyDir with "
        "medium Memory on /dev/shm)",
    )


def check_disk(free_bytes: int | None, folder: Path, *, least_gib: float = 5.0) -> Finding:
    """Room for stores, checkpoints and Ray's spilled objects."""
    gib = (free_bytes or 0) / _GIB
    if gib >= least_gib:
        return Finding("ok", f"{gib:.0f} GiB disk free at {folder}")
    return Finding(
        "warning",
        f"{gib:.1f} GiB disk free at {folder}; checkpoints and spilled objects want "
        f"{least_gib:.0f}",
        "free some, or set checkpoint.dir to another disk",
    )


def torch_cuda_build() -> str | None:
    """The CUDA version torch was built for, "" for a CPU build, None without torch.

    Read from torch's ``version.py`` without importing it.
    """
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "version.py"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match.group(1) if match else ""


def _cuda_works() -> bool:
    import torch

    return torch.cuda.is_available()


def check_gpu(gpu: bool, build: str | None, works: Callable[[], bool]) -> Finding:
    """The GPU and the build of torch fit each other.

    Args:
        gpu: whether a driver shows one.
        build: from :func:`torch_cuda_build`.
        works: imports torch and asks; called only where both are there.
    """
    if build is None:
        return Finding("missing", "torch is not installed", "pip install torch")
    if not gpu:
        if not build:
            return Finding("ok", "no GPU; torch is a CPU build: training runs on CPU")
        return Finding(
            "warning",
            f"no GPU, but torch is built for CUDA {build} (gigabytes that are never used)",
            "for a smaller installation: pip install torch from PyTorch's CPU index",
        )
    if not build:
        return Finding(
            "warning",
            "there is a GPU, but torch is a CPU build and will not use it",
            "install the CUDA build of torch that fits the driver (nvidia-smi shows its version)",
        )
    if works():
        return Finding("ok", f"GPU usable, torch built for CUDA {build}")
    return Finding(
        "warning",
        f"there is a GPU and torch is built for CUDA {build}, but torch cannot use it",
        "the driver may be older than that CUDA: update it, or install torch for an older CUDA",
    )


def check_torch_extensions(folder: Path, *, now_s: float | None = None) -> Finding:
    """No lock left by a killed compilation: every later one waits on it for ever."""
    now = time.time() if now_s is None else now_s
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    stale = [lock for lock in locks if now - lock.stat().st_mtime > _STALE_S]
    if not stale:
        return Finding("ok", f"no stale lock in {folder}")
    names = " ".join(str(lock) for lock in stale)
    return Finding(
        "warning",
        f"{len(stale)} lock(s) of a compilation that was killed: later runs that need the same "
        "DeepSpeed operator hang",
        f"if nothing compiles just now: rm {names}",
    )


def _accepts(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT_S):
            return True
    except OSError:
        return False


def check_port(port: int, use: str, path: str, mark: str) -> Finding:
    """A port that a service of ours wants is free, or that service holds it already.

    Args:
        port: on this machine.
        use: the service in words.
        path: a page of it ...
        mark: ... and a word in the page's text.
    """
    if not _accepts("127.0.0.1", port):
        return Finding("ok", f"port {port} is free for {use}")
    status, body = fetch(f"http://127.0.0.1:{port}{path}", timeout_s=_TIMEOUT_S)
    if (status == 200 and mark in body) or status in (401, 403):
        return Finding("ok", f"{use} answers on port {port}")
    return Finding(
        "warning",
        f"port {port}, wanted by {use}, is taken by another program",
        "find it with: ss -ltnp; or start Ray with --dashboard-port=PORT",
    )


def check_ray_address(variables: Mapping[str, str]) -> Finding:
    """The cluster that RAY_ADDRESS names answers."""
    address = variables.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return Finding("ok", "RAY_ADDRESS is not set: runs start a Ray of their own")
    if address == "auto":
        return Finding("ok", "RAY_ADDRESS=auto: runs join the Ray of this machine")
    if address.startswith(("http://", "https://")):
        status, body = fetch(f"{address.rstrip('/')}/api/version", timeout_s=_TIMEOUT_S)
        answers = (status == 200 and "ray_version" in body) or status in (401, 403)
    else:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        answers = port.isdigit() and _accepts(host, int(port))
    if answers:
        return Finding("ok", f"the Ray cluster at RAY_ADDRESS={address} answers")
    return Finding(
        "missing",
        f"RAY_ADDRESS={address} does not answer, and every run would try to join it",
        "start it ('ray start --head'), correct the address, or: unset RAY_ADDRESS",
    )


def check_mlflow(uri: str) -> Finding:
    """The tracking server answers; files need none."""
    if not uri.startswith(("http://", "https://")):
        return Finding("ok", f"MLflow writes to {uri or 'a SQLite file beside the runs'}")
    status, reason = fetch(f"{uri.rstrip('/')}/health", timeout_s=_TIMEOUT_S)
    if status == 200 or status in (401, 403):
        return Finding("ok", f"the MLflow server at {uri} answers")
    return Finding(
        "missing",
        f"the MLflow server at {uri} does not answer ({f'HTTP {status}' if status else reason})",
        "start it ('mlflow server --port 5000'), correct the address, or: unset "
        "MLFLOW_TRACKING_URI for a local SQLite file",
    )
