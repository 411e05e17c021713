"""The demo: real cells in, a compared and tracked model out (``make demo``)."""

import os
import sys
import time
from pathlib import Path

from cellray.cli import say
from cellray.core.errors import CellrayError
from cellray.runs import load_run, run_job

STEPS = [
    ("ingest", "demo.toml"),
    ("pretrain", "demo_scgpt.toml"),
    ("pretrain", "demo_geneformer.toml"),
    ("benchmark", "demo.toml"),
]

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent.parent)
    started = time.monotonic()
    try:
        for job, file in STEPS:
            if job == "ingest" and Path("runs/demo/store").is_dir():
                continue  # a second demo starts from the store it has
            say(f"== {job} {file}")
            result = run_job(load_run(job, f"jobs/configs/{job}/{file}"), say)
        say("\n".join([*result.lines(), f"done in {time.monotonic() - started:.0f} s"]))
    except CellrayError as error:
        sys.exit(f"cellray: {error}")
