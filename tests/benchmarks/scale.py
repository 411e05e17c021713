"""Scale without a cluster: pseudo-nodes, a node killed and replaced, growing numbers of workers.

Run: ``python tests/benchmarks/scale.py STORE OUT [--steps 60] [--cells-global 512] [--kill]
[--scaling]``. STORE has a million cells for the figures that are kept (``cellray synthesize
uri=STORE num_cells=1000000 num_genes=2000 mean_genes_per_cell=120``).

``--kill``: an elastic run of four workers on two pseudo-nodes (Ray nodes on this machine), ZeRO 2,
streaming, checkpoints. Once a checkpoint is written, one node is killed with all that runs on it;
the run goes on with what is left; a new node joins and is taken in. At the end the cells of every
step are compared with the plan.

``--scaling``: the same work a worker on 1, 2 and 4 workers: CPU-seconds a thousand cells of the
data path and of training, and what driver, controller and Ray's own processes take. All workers
share this machine's cores, so that wall time says nothing and CPU time does.

Writes ``OUT/scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from _common import Meter, hardware
from ray.cluster_utils import Cluster

from cellray.ops.environment import local_ray_environment
from cellray.runs import build_run, run_job
from cellray.train.cell_log import read_cell_log
from cellray.train.pretrain import prepare_pretrain
from cellray.train.saving import committed

NODE_CPUS = 3  # room for two workers of 1.25 and their actors of 0.25


def configuration(args: argparse.Namespace, folder: Path, workers: int, **train: Any) -> Any:
    """A small scGPT on the store."""
    return build_run(
        "pretrain",
        {
            "name": f"scale-{workers}",
            "data": {"uri": args.store, "split": {"validation_fraction": 0.0}},
            "tokenizer": {"max_tokens": 64},
            "model": {
                "family": "scgpt", "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16,
                "dropout": 0.0,
            },
            "batch": {"cells_global": args.cells_global, "cells_micro": 64, "packing": "packed"},
            "train": {"steps": args.steps, "log_every_steps": 1, "log_cells": True, **train},
            "engine": {"zero_stage": 2},
            "scale": {
                "workers": workers, "cpus_per_worker": 1.25, "cpus_per_actor": 0.25,
                "threads_per_worker": 1, "max_failures": 5,
            },
            "checkpoint": {"dir": str(folder), "every_steps": args.save_every},
            "tracking": {"enabled": False},
        },
    )  # fmt: skip


def join(address: str) -> subprocess.Popen[bytes]:
    """Start a pseudo-node and wait for it; its processes are children of the one returned."""
    command = Path(sys.executable).parent / "ray"
    before = alive()
    node = subprocess.Popen(
        [str(command), "start", "--address", address, "--num-cpus", str(NODE_CPUS), "--block"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while alive() <= before:
        if node.poll() is not None or time.monotonic() > deadline:
            said = node.stderr.read().decode() if node.stderr and node.poll() is not None else ""
            raise RuntimeError(f"a pseudo-node did not join in 120 s: {said[-2000:]}")
        time.sleep(0.2)
    return node


def alive() -> int:
    """Nodes of the cluster that are alive."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Kill a node with all that runs on it, at once."""
    every = psutil.Process(node.pid).children(recursive=True)
    for process in [*every, psutil.Process(node.pid)]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    node.wait()


def check_cells(run: Any, run_dir: Path) -> dict[str, Any]:
    """Every step's cells are those of the plan, whoever trained on them."""
    plan = prepare_pretrain(run).job.data.plan
    log = read_cell_log(run_dir)
    assert list(log) == list(range(run.train.steps)), "steps are missing"
    delivered = []
    for step, entry in log.items():
        cursor = plan.cursor(step)
        planned = plan.rows(cursor.epoch, cursor.position, cursor.position + 1)[0]
        assert sorted(entry["cells"]) == list(range(entry["world"])), f"ranks of step {step}"
        seen = np.concatenate(list(entry["cells"].values()))
        assert np.array_equal(np.sort(seen), np.sort(planned)), f"cells of step {step}"
        delivered.append(seen)
    within = np.concatenate(delivered[: plan.batches_per_epoch])
    assert len(np.unique(within)) == len(within), "a cell was seen twice in an epoch"
    groups: list[dict[str, Any]] = []
    for step, entry in log.items():
        if not groups or groups[-1]["began"] != entry["session"]:
            groups.append(
                {"began": entry["session"], "workers": entry["world"], "first_step": step}
            )
        groups[-1]["last_step"] = step
    return {"steps": len(log), "cells": int(sum(map(len, delivered))), "groups": groups}


def kill_and_replace(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The elastic run; see the module."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes: list[subprocess.Popen[bytes]] = []
    os.environ["RAY_ADDRESS"] = cluster.address
    times: dict[str, float] = {}
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        nodes += [join(cluster.address) for _ in range(2)]  # one after the other
        run = configuration(args, folder, 4)
        raw = run.scale.model_copy(update={"min_workers": 2, "resize_interval_s": 5.0})
        run = run.model_copy(update={"scale": raw})

        def act(line: str) -> None:
            print(line, flush=True)
            noted = {int(n["step"]) for n in committed(folder / run.name)}
            if "killed" not in times and noted:
                times["killed"] = time.time()
                kill_node(nodes[1])
            elif "killed" in times and "joined" not in times:
                log = read_cell_log(folder / run.name)
                latest = max((e["session"] for e in log.values()), default=0.0)
                if latest > times["killed"] and max(noted) > args.save_every:
                    times["joined"] = time.time()
                    nodes.append(join(cluster.address))

        started = time.time()
        result = run_job(run, act)
        found = check_cells(run, folder / run.name)
        groups = found["groups"]
        return {
            **found,
            "stopped_at_step": result.step,
            "seconds": time.time() - started,
            "seconds_from_kill_to_training": groups[1]["began"] - times["killed"],
            "seconds_from_join_to_training": (
                groups[2]["began"] - times["joined"] if len(groups) > 2 else None
            ),
            "workers": [g["workers"] for g in groups],
        }
    finally:
        ray.shutdown()
        for node in nodes:
            if node.poll() is None:
                kill_node(node)
        cluster.shutdown()
        os.environ.pop("RAY_ADDRESS", None)


def cpu_by_kind() -> dict[str, float]:
    """CPU-seconds of this process tree, by what a process is for."""
    kinds = {
        "workers": ("RayTrainWorker",),
        "tokenisation": ("TokenizeWindow", "MapWorker", "_TokenizeWindow"),
        "Ray Data": ("StatsActor", "DatasetManager", "AutoscalingRequester", "SplitCoordinator"),
        "controller": ("TrainController", "SynchronizationActor"),
        "Ray": ("raylet", "gcs_server", "dashboard", "monitor", "log_monitor", "runtime_env"),
    }
    found: dict[str, float] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words = " ".join(process.cmdline())
            times = process.cpu_times()
        except psutil.Error:
            continue
        kind = next((k for k, parts in kinds.items() if any(p in words for p in parts)), "other")
        found[kind] = found.get(kind, 0.0) + times.user + times.system
    own = psutil.Process().cpu_times()
    found["driver"] = own.user + own.system
    return found


def scaling(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Weak scaling: as many cells a worker, on more and more workers."""
    rows = []
    base = args.cells_global
    for workers in (1, 2, 4):
        os.environ.update(local_ray_environment())
        ray.init(
            address="local", num_cpus=2 + NODE_CPUS * workers, include_dashboard=False,
            log_to_driver=False, logging_level="error",
        )  # fmt: skip
        args.cells_global = base // 4 * workers
        run = configuration(args, folder / "scaling", workers)
        marks: list[tuple[float, dict[str, float], int]] = []

        def mark(line: str, marks: Any = marks) -> None:
            step = line.split(" step ")[-1].split("/")[0] if " step " in line else ""
            if step.isdigit():
                marks.append((time.time(), cpu_by_kind(), int(step)))

        with Meter(interval=0.5) as used:
            run_job(run, mark)
        marks = [m for m in marks if "workers" in m[1]]  # lines that came while they were there
        (t0, before, s0), (t1, after, s1) = marks[len(marks) // 4], marks[-1]
        thousands = (s1 - s0) * args.cells_global / 1000
        spent = {k: (v - before.get(k, 0.0)) / thousands for k, v in after.items()}
        rows.append(
            {
                "workers": workers,
                "cells_a_step": args.cells_global,
                "cells_per_s": (s1 - s0) * args.cells_global / max(t1 - t0, 1e-9),
                "cpu_s_per_1000_cells": {k: round(v, 3) for k, v in sorted(spent.items())},
                "peak_gb": used.peak_rss / 1e9,
            }
        )
        print(rows[-1], flush=True)
        ray.shutdown()
        shutil.rmtree(folder / "scaling", ignore_errors=True)
    args.cells_global = base
    return rows


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=8)
    parser.add_argument("--cells-global", type=int, default=512)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    args = parser.parse_args()
    args.store = str(Path(args.store).resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(local_ray_environment())
    found: dict[str, Any] = {"hardware": hardware()}
    if args.kill:
        found["kill"] = kill_and_replace(args, args.out.resolve() / "runs")
    if args.scaling:
        found["scaling"] = scaling(args, args.out.resolve())
    (args.out / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
