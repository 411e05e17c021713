"""The cluster files: a RayJob of known fields, a batch script that holds, a fitting image."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from cellray.runs import JOBS, PretrainRun, load_run

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
BATCH = CLUSTER / "slurm" / "pretrain.sbatch"

# Fields of ray.io/v1 and of the core objects inside it that this project uses or may use, by place.
# A '*' stands for any key (labels, resources ...); a list for the items of a list.
CONTAINER: dict[str, Any] = {
    "name": str,
    "image": str,
    "workingDir": str,
    "imagePullPolicy": str,
    "env": [{"name": str, "value": str}],
    "ports": [{"name": str, "containerPort": int}],
    "resources": {"requests": {"*": str}, "limits": {"*": str}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
TEMPLATE: dict[str, Any] = {
    "metadata": {"labels": {"*": str}, "annotations": {"*": str}},
    "spec": {
        "containers": [CONTAINER],
        "tolerations": [{"key": str, "operator": str, "effect": str}],
        "volumes": [
            {
                "name": str,
                "persistentVolumeClaim": {"claimName": str},
                "emptyDir": {"medium": str, "sizeLimit": str},
            }
        ],
    },
}
RAYJOB: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": {"*": str}},
    "spec": {
        "entrypoint": str,
        "submissionMode": str,
        "suspend": bool,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "runtimeEnvYAML": str,
        "rayClusterSpec": {
            "rayVersion": str,
            "headGroupSpec": {"rayStartParams": {"*": str}, "template": TEMPLATE},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": {"*": str},
                    "template": TEMPLATE,
                }
            ],
        },
    },
}


def _problems(value: Any, allowed: Any, where: str = "") -> list[str]:
    """Unknown keys and wrong types of ``value``, with their places."""
    if isinstance(allowed, dict) and isinstance(value, dict):
        found = []
        for key, item in value.items():
            place = f"{where}.{key}".lstrip(".")
            kind = allowed.get(key, allowed.get("*"))
            found += [f"unknown key {place}"] if kind is None else _problems(item, kind, place)
        return found
    if isinstance(allowed, list) and isinstance(value, list):
        return [p for i, v in enumerate(value) for p in _problems(v, allowed[0], f"{where}[{i}]")]
    if isinstance(allowed, type) and type(value) is allowed:
        return []
    return [f"wrong type at {where}: {value!r}"]


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay" / "rayjob.yaml").read_text()))


@pytest.fixture(scope="module")
def spec(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = objects[0]["spec"]
    return found


def test_rayjob_has_known_fields_of_the_right_type(objects: list[dict[str, Any]]) -> None:
    assert (objects[0]["apiVersion"], objects[0]["kind"]) == ("ray.io/v1", "RayJob")
    assert _problems(objects[0], RAYJOB) == []


def test_the_check_of_fields_refuses(objects: list[dict[str, Any]]) -> None:
    bad = yaml.safe_load(yaml.safe_dump(objects[0]))
    bad["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    bad["spec"]["ttlSecondsAfterFinished"] = "3600"
    bad["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert sorted(_problems(bad, RAYJOB)) == [
        "unknown key spec.rayClusterSpec.workerGroupSpecs[0].minReplica",
        "wrong type at spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus: 0",
        "wrong type at spec.ttlSecondsAfterFinished: '3600'",
    ]


def test_rayjob_gives_back_what_it_takes(spec: dict[str, Any]) -> None:
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["suspend"] is False


def test_rayjob_runs_a_configuration_that_exists_and_is_valid(spec: dict[str, Any]) -> None:
    python, script, config, *overrides = shlex.split(spec["entrypoint"])
    assert (python, script) == ("python", "jobs/pretrain.py")
    assert (ROOT / script).is_file()
    run = load_run("pretrain", ROOT / config, overrides)
    assert isinstance(run, PretrainRun)
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [worker] = group["template"]["spec"]["containers"]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert run.scale.workers * run.scale.gpus_per_worker == group["replicas"] * gpus
    reserved = run.scale.cpus_per_worker * run.scale.workers
    assert reserved < group["replicas"] * int(worker["resources"]["limits"]["cpu"])
    assert run.checkpoint.dir == "/runs"


def test_pods_mount_runs_and_shared_memory(spec: dict[str, Any]) -> None:
    cluster = spec["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        [container] = pod["containers"]
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
        assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] == "cellray-runs"
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        shm = int(mounts["/dev/shm"]["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
        assert shm < memory / 2
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]


def test_the_volume_can_be_mounted_by_all_pods(objects: list[dict[str, Any]]) -> None:
    claim = objects[1]
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == "cellray-runs"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_versions_agree(spec: dict[str, Any]) -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert spec["rayClusterSpec"]["rayVersion"] == pins["ray"]
    cluster = spec["rayClusterSpec"]
    pods = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    images = {c["image"] for p in pods for c in p["template"]["spec"]["containers"]}
    assert images == {f"cellray:{metadata.version('cellray')}"}


def test_the_image_installs_the_tested_versions_and_the_folder_the_job_runs_in(
    spec: dict[str, Any],
) -> None:
    text = (CLUSTER / "images" / "Dockerfile").read_text()
    installs = re.findall(r"pip install (?:[^\n\\]|\\\n)*", text)
    assert len(installs) == 2
    assert all("--constraint" in line for line in installs)
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert f"WORKDIR {head['workingDir']}" in text
    for name in re.findall(r"^COPY ((?:[\w.]+ )+)", text, re.MULTILINE):
        for file in name.split():
            assert file == "." or file == "README.md" or (ROOT / file).exists(), file
    ignored = (CLUSTER / "images" / "Dockerfile.dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
    assert "data" not in ignored


# The batch script, against commands that only write down how they were called.

FAKE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$(basename "$0") $*" in
scontrol*) printf 'n1\\nn2\\n' ;;
*get_node_ip_address*) echo 10.0.0.1 ;;
"python -"*) cat >/dev/null; exit "${FAKE_JOIN:-0}" ;;
"python jobs/"*) echo "job sees $RAY_ADDRESS"; ${FAKE_RUN:-exit 0} ;;
*"ray health-check"* | "ray health-check"*) exit "${FAKE_HEALTH:-0}" ;;
srun*"ray start"*) exec sleep "${FAKE_SLEEP:-60}" ;;
esac
"""


def _batch(tmp_path: Path, *words: str, **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, output and calls of the script, run with made-up Slurm, Ray and Python."""
    commands, project = tmp_path / "commands", tmp_path / "project"
    calls = tmp_path / "calls"
    for folder in (commands, project / "jobs", project / ".venv" / "bin"):
        folder.mkdir(parents=True)
    for name in ("srun", "scontrol", "ray", "python"):
        (commands / name).write_text(FAKE)
        (commands / name).chmod(0o700 | stat.S_IXUSR)
    (project / "jobs" / "pretrain.py").touch()
    (project / "jobs" / "tune.py").touch()
    (project / "x.toml").touch()
    (project / ".venv" / "bin" / "activate").write_text(f"PATH={commands}:$PATH\n")
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "4",
        **variables,
    }
    environment = {k: v for k, v in environment.items() if v}
    done = subprocess.run(
        ["bash", str(BATCH), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, done.stdout + done.stderr, told


def test_batch_script_is_clean() -> None:
    subprocess.run(["bash", "-n", str(BATCH)], check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", str(BATCH)], capture_output=True, text=True, check=False
        )
        assert done.stdout == ""


def test_batch_starts_head_and_workers_then_the_job(tmp_path: Path) -> None:
    code, output, calls = _batch(tmp_path, "x.toml", "seed=3", SLURM_GPUS_ON_NODE="2")
    assert code == 0, output
    port = 20000 + os.getpid() % 10000
    assert f"job sees 10.0.0.1:{port}" in output
    starts = [c for c in calls if "ray start" in c]
    assert len(starts) == 2
    head = next(c for c in starts if "--head" in c)
    worker = next(c for c in starts if "--head" not in c)
    for call, node in ((head, "n1"), (worker, "n2")):
        assert call.startswith("srun --overlap --nodes=1 --ntasks=1 --cpus-per-task=4")
        assert f"--nodelist={node} " in call
        assert "--block" in call
        assert "--num-cpus=4 --num-gpus=2" in call
    assert f"--node-ip-address=10.0.0.1 --port={port}" in head
    assert f"--address=10.0.0.1:{port}" in worker
    assert "python - 2 300" in calls  # waits for both nodes
    assert "python jobs/pretrain.py x.toml seed=3" in calls


def test_batch_exit_code_is_the_jobs(tmp_path: Path) -> None:
    code, output, _ = _batch(tmp_path, "x.toml", FAKE_RUN="exit 7")
    assert code == 7
    assert "cellray: ended with exit code 7" in output


def test_batch_can_run_another_job(tmp_path: Path) -> None:
    _, _, calls = _batch(tmp_path, "x.toml", CELLRAY_JOB="tune")
    assert "python jobs/tune.py x.toml" in calls
    assert "tune" in JOBS


def test_batch_refuses_what_is_not_there(tmp_path: Path) -> None:
    code, output, calls = _batch(tmp_path, "y.toml")
    assert (code, calls) == (2, [])
    assert "'y.toml', 'jobs/pretrain.py' and '.venv/bin/activate' must exist" in output


def test_batch_without_words_says_how(tmp_path: Path) -> None:
    code, output, calls = _batch(tmp_path)
    assert (code, calls) == (2, [])
    assert output.startswith("usage: sbatch cluster/slurm/pretrain.sbatch FILE.toml")


def test_batch_outside_slurm_says_so(tmp_path: Path) -> None:
    code, output, _ = _batch(tmp_path, "x.toml", SLURM_SUBMIT_DIR="")
    assert code != 0
    assert "submit this script with sbatch" in output


def test_batch_ends_if_the_head_does_not_start(tmp_path: Path) -> None:
    code, output, calls = _batch(tmp_path, "x.toml", FAKE_HEALTH="1", FAKE_SLEEP="0")
    assert code == 1
    assert "the head did not start" in output
    assert not any(c.startswith("python jobs/") for c in calls)


def test_batch_ends_if_nodes_do_not_join(tmp_path: Path) -> None:
    code, _, calls = _batch(tmp_path, "x.toml", FAKE_JOIN="1")
    assert code == 1
    assert not any(c.startswith("python jobs/") for c in calls)


def test_readme_names_every_way_and_only_real_files() -> None:
    text = (CLUSTER / "README.md").read_text()
    for file in re.findall(r"cluster/[\w./-]+\.(?:yaml|sbatch)|cluster/images/Dockerfile", text):
        assert (ROOT / file).is_file(), file
