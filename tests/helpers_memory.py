"""What a step really takes: bytes that autograd saves, and growth of resident memory."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.nn.activations import Work
from cellray.train.config import OptimSection
from cellray.train.engine import Engine, autocast, build_engine
from cellray.train.sizing import saved_bytes
from helpers_models import Prepared, prepare

SMALL = {"width": 32, "num_layers": 1, "num_heads": 4, "ffn_width": 32, "dropout": 0.0,
         "head_width": 8, "decoder_width": 32, "decoder_layers": 1, "decoder_heads": 2,
         "decoder_head_width": 8, "decoder_ffn_width": 32, "value_bins": 7, "gene_sets": "",
         "max_sets": 6, "random_fraction": 0.3, "drop_path": 0.0}  # fmt: skip


def work_of(case: Prepared, *, precision: str = "fp32", bf16_weights: bool = False) -> Work:
    """The work that a prepared batch is."""
    batch = case.batch
    cells = len(batch)
    lengths = torch.bincount(batch.token_rows()[batch.attention_mask], minlength=cells).numpy()
    hidden = 0.0 if batch.unknown_mask is None else float(batch.unknown_mask.sum())
    return Work(
        lengths=np.asarray(lengths, dtype=np.int64),
        packed=batch.packing is not None,
        targets=float(batch.num_targets),
        hidden=hidden,
        bf16=precision == "bf16",
        bf16_weights=bf16_weights,
    )


def saved_by(case: Prepared, *, precision: str = "fp32") -> int:
    """Bytes that a training pass keeps for its backward pass."""
    model = case.model.train()
    with saved_bytes(model) as kept:
        with autocast(torch.device("cpu"), precision):
            output = model(case.batch)
        case.objective.loss(output, case.batch)
    return kept.bytes


def _resident(key: str) -> int:
    found = re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Growth:
    """Peak growth of this process's resident memory since the object was made."""

    def __init__(self) -> None:
        gc.collect()
        self._base = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew

    def peak(self) -> int:
        """Bytes."""
        return _resident("VmHWM") - self._base


def grown_by_steps(
    name: str, sizes: Mapping[str, Any], engine: Mapping[str, Any], passes: int, **batch: Any
) -> dict[str, float]:
    """Peak growth while a model is built and trained for three steps, in a fresh process.

    Everything that a first step loads is loaded by a small model's steps before.
    """

    def make(case: Prepared, settings: Mapping[str, Any]) -> Engine:
        return build_engine(case.model, case.objective, optim=OptimSection(), **settings)

    small = prepare(name, SMALL, genes_B=[20, 20], num_genes=60)
    # a second engine of stage 3 does not work in one process
    warm = {**engine, "zero_stage": min(engine["zero_stage"], 2), "offload": "none"}
    made = make(small, warm)
    made.step([small.batch] * passes, lr=1e-3)
    del made, small
    growth = Growth()
    case = prepare(name, sizes, **batch)
    values = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    made = make(case, engine)
    for _ in range(3):
        made.step([case.batch] * passes, lr=1e-3)
    bf16 = engine["precision"] == "bf16"
    work = work_of(
        case, precision=engine["precision"], bf16_weights=bf16 and engine["zero_stage"] > 0
    )
    acts = case.model.activations(work) if engine["zero_stage"] < 3 else None
    return {
        "peak": growth.peak(),
        "values": values,
        "saved": acts.saved if acts else 0.0,
        "passing": acts.passing if acts else 0.0,
    }


def in_fresh_process(arguments: Mapping[str, Any]) -> dict[str, float]:
    """:func:`grown_by_steps` in a process of its own that gives memory back at once."""
    code = (
        "import json, sys, torch\n"
        "from helpers_memory import grown_by_steps\n"
        "torch.set_num_threads(1)\n"
        "print('result', json.dumps(grown_by_steps(**json.loads(sys.argv[1]))))"
    )
    import json
    import os

    env = {**os.environ, **PLAIN_MALLOC, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, json.dumps(dict(arguments))],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("result")]
    found: dict[str, float] = json.loads(line.removeprefix("result "))
    return found


# Blocks above 64 KB go back to the system when they are freed, so that resident memory is what is
# alive.
PLAIN_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
