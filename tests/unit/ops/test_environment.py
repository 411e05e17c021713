"""The environment of a local Ray: what is set, and that the user's own values win."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellray.ops.environment import fetch, has_gpu, local_ray_environment


def test_without_a_gpu() -> None:
    assert local_ray_environment({}, gpu=False) == {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_worker_maximum_startup_concurrency": "16",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "DS_ACCELERATOR": "cpu",
    }


def test_with_a_gpu_deepspeed_chooses() -> None:
    assert "DS_ACCELERATOR" not in local_ray_environment({}, gpu=True)


def test_a_variable_that_is_set_keeps_its_value() -> None:
    given = {"RAY_AUTH_MODE": "token", "UNRELATED": "1"}
    made = local_ray_environment(given, gpu=True)
    assert made["RAY_AUTH_MODE"] == "token"
    assert "UNRELATED" not in made


def test_gpu_is_read_from_device_files_and_visibility(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert not has_gpu({}, devices=tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert not has_gpu({}, devices=tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_gpu({}, devices=tmp_path)
    assert has_gpu({"CUDA_VISIBLE_DEVICES": "0"}, devices=tmp_path)
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": ""}, devices=tmp_path)
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": "-1"}, devices=tmp_path)


def test_fetch_says_why_nothing_answered() -> None:
    status, reason = fetch("http://127.0.0.1:1/x", timeout_s=2.0)
    assert status == 0
    assert "refused" in reason
    assert fetch("not an address", timeout_s=1.0)[0] == 0
