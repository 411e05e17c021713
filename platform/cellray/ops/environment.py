"""What a local Ray wants in its environment, and two small questions about this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

__all__ = ["fetch", "has_gpu", "local_ray_environment"]

_LOCAL = {
    # No report of usage to the network.
    "RAY_USAGE_STATS_ENABLED": "0",
    # From 2.59 on Ray writes a token file under the home folder for a cluster that only this
    # process uses, and every later cluster then asks for it. Set 'token' to have it.
    "RAY_AUTH_MODE": "disabled",
    # Our own progress lines speak for the stream; Ray Data's bars would overwrite them.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # A local Ray runs many small actors on few cores; by default it warns of more than 4 x cores.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Tasks without a GPU keep CUDA_VISIBLE_DEVICES as it is, and Ray does not warn about that.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def has_gpu(environment: Mapping[str, str] | None = None, *, devices: Path = Path("/dev")) -> bool:
    """Whether a process may use an NVIDIA GPU here; looks without importing torch.

    Args:
        environment: variables to read ``CUDA_VISIBLE_DEVICES`` from; this process's by default.
        devices: folder of the device files.
    """
    variables = os.environ if environment is None else environment
    if variables.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    return any(devices.glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def local_ray_environment(
    environment: Mapping[str, str] | None = None, *, gpu: bool | None = None
) -> dict[str, str]:
    """Variables to set before ``ray.init()`` starts a Ray of its own on this machine.

    Not for a process that joins a running cluster: its operator decides there. A variable that is
    set already keeps its value.

    - ``RAY_USAGE_STATS_ENABLED=0``: nothing is sent to the network.
    - ``RAY_AUTH_MODE=disabled``: no token file for a cluster that only this process uses.
    - ``RAY_DATA_DISABLE_PROGRESS_BARS=1``: cellray's own progress lines stay readable.
    - ``RAY_worker_maximum_startup_concurrency=16``: quiet about many small actors on few cores.
    - ``RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0``: quiet about tasks that reserve no GPU.
    - ``DS_ACCELERATOR=cpu``, without a GPU: DeepSpeed does not guess, and does not log its guess.

    Args:
        environment: variables that are set already; this process's by default.
        gpu: whether there is a GPU; None looks (:func:`has_gpu`).
    """
    variables = os.environ if environment is None else environment
    wanted = dict(_LOCAL)
    if not (has_gpu(variables) if gpu is None else gpu):
        wanted["DS_ACCELERATOR"] = "cpu"
    return {name: variables.get(name, value) for name, value in wanted.items()}


def fetch(url: str, *, timeout_s: float) -> tuple[int, str]:
    """GET ``url``.

    Returns:
        HTTP status and body; status 0 and the reason where nothing answered.
    """
    try:
        with urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except HTTPError as error:
        return error.code, str(error)
    except (OSError, HTTPException, ValueError) as error:
        return 0, str(getattr(error, "reason", error))
