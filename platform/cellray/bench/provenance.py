"""Where and by what a row of a table was made: code, packages, hardware."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from cellray.train.tracking import code_version

__all__ = ["hardware", "packages_sha256", "provenance"]


def _cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def hardware() -> str:
    """GPUs if torch sees some, and the processor with its logical cores, e.g. ``2 x AMD EPYC``."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join([*found, f"{os.cpu_count()} x {_cpu()}"])


@cache
def packages_sha256() -> str:
    """SHA-256 over the names and versions of all installed packages, sorted."""
    names = sorted(f"{d.metadata['Name']}=={d.version}".lower() for d in distributions())
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@cache
def provenance() -> dict[str, Any]:
    """The fields of a result row that say by what it was made."""
    version = code_version()
    return {
        "git_commit": version["git_commit"],
        "git_dirty": version["git_dirty"],
        "package_lock_sha256": packages_sha256(),
        "image_digest": os.environ.get("CELLRAY_IMAGE_DIGEST", ""),
        "hardware": hardware(),
    }
