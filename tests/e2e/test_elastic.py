"""A node is killed under an elastic run and another joins; the cells are those of the plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1000)]

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scale.py"


def test_an_elastic_run_goes_on_without_a_lost_node_and_takes_a_new_one(small_store, tmp_path):
    """Two Ray nodes on this machine, ZeRO 2 on four workers, then two or three, then four."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_ADDRESS")}
    done = subprocess.run(
        [
            sys.executable, str(SCRIPT), small_store, str(tmp_path), "--kill", "--steps", "400",
            "--save-every", "20", "--cells-global", "16",
        ],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "scale.json").read_text())["kill"]
    assert found["steps"] == found["stopped_at_step"] == 400
    assert found["cells"] == 400 * 16
    workers = found["workers"]
    assert workers[0] == 4
    assert workers[1] < 4
    assert workers[-1] == 4
