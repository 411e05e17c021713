"""Small whole runs on the three-type store of ``known_cells``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cellray.core.section import merge
from cellray.runs import build_run

SCGPT = {
    "family": "scgpt",
    "width": 16,
    "num_layers": 1,
    "num_heads": 2,
    "ffn_width": 16,
    "dropout": 0.0,
}


def pretrain_raw(uri: str, folder: Path, **over: Any) -> dict[str, Any]:
    raw = {
        "name": "pre",
        "seed": 3,
        "data": {"uri": uri, "split": {"validation_fraction": 0.1}},
        "tokenizer": {"max_tokens": 32},
        "model": SCGPT,
        "optim": {"lr": 5e-3, "warmup_steps": 2},
        "batch": {"cells_global": 12, "cells_micro": 3},
        "train": {"steps": 12, "log_every_steps": 2, "eval_every_steps": 6},
        "engine": {"name": "deepspeed", "zero_stage": 2},
        "scale": {"workers": 2, "threads_per_worker": 1},
        "checkpoint": {"dir": str(folder), "every_steps": 4},
    }
    return merge(raw, over)


def pretrain_run(uri: str, folder: Path, **over: Any) -> Any:
    return build_run("pretrain", pretrain_raw(uri, folder, **over))


def finetune_raw(uri: str, folder: Path, **over: Any) -> dict[str, Any]:
    raw = {
        "name": "fine",
        "seed": 1,
        "data": {"uri": uri},
        "task": {
            "name": "annotation",
            "label": "cell_type",
            "split": {"column": "donor", "test_values": ["d3"], "validation_fraction": 0.2},
        },
        "optim": {"lr": 1e-2},
        "batch": {"cells_global": 12, "cells_micro": 12},
        "train": {"steps": 120, "log_every_steps": 40, "eval_every_steps": 40},
        "engine": {"name": "torch"},
        "scale": {"workers": 1, "threads_per_worker": 1},
        "checkpoint": {"dir": str(folder), "every_steps": 40},
    }
    return merge(raw, over)


def finetune_run(uri: str, folder: Path, **over: Any) -> Any:
    return build_run("finetune", finetune_raw(uri, folder, **over))


def progress(run_dir: str | Path) -> list[dict[str, Any]]:
    """The reports of a run."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
