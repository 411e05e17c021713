"""How many tokens of a forward pass fit into a worker's memory (``batch.tokens_micro = "auto"``).

On a GPU trial passes are measured by the allocator's peak. On a CPU, whose allocator tells no
peak, what autograd keeps for the backward pass is counted, and twice that stands for the pass.
The number is found once: it is written to the run's directory, and every later group of workers of
the run, and every checkpoint, keeps to it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn

from cellray.core.batch import CellBatch
from cellray.core.blocks import TokenBlock
from cellray.models.base import CellModel
from cellray.train.engine import autocast
from cellray.train.job import TrainJob
from cellray.train.microbatch import Collator, most_tokens

__all__ = ["saved_bytes", "tokens_that_fit"]

_LOG = logging.getLogger(__name__)
_FILE = "tokens_micro.json"
_SHARE = 0.85  # of the memory that is free; the rest is for buffers of the engine
_TRIAL_CELLS = 256
_PEAK_OVER_SAVED = 2.0


def tokens_that_fit(
    job: TrainJob,
    collator: Collator,
    model: CellModel,
    *,
    rank: int,
    world: int,
    local_workers: int,
) -> Collator:
    """The collator with its limit of tokens: the section's, the run's, or a measured one.

    Args:
        job: the run.
        collator: without a limit.
        model: on its device, before an engine has it; its gradients are cleared.
        rank: of this worker.
        world: number of workers; all get the smallest of what each measures.
        local_workers: workers on this machine, which share its memory (CPU only).
    """
    wanted = job.batch.tokens_micro
    if wanted != "auto":
        return replace(collator, tokens_micro=int(wanted))
    file = Path(job.run_dir) / _FILE
    if file.is_file():
        return replace(collator, tokens_micro=int(json.loads(file.read_text())["tokens_micro"]))
    budget = _budget(job, model, local_workers)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = _search(job, collator, model, budget)
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what is reported is the run's
    for name, buffer in model.named_buffers():  # batch norms have taken note of the trials
        buffer.copy_(before[name])
    if world > 1:
        every: list[Any] = [None] * world
        dist.all_gather_object(every, found)
        found = min(every)
    if rank == 0:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps({"tokens_micro": found, "budget_bytes": budget}))
        os.replace(partial, file)
        _LOG.info("%s: batch.tokens_micro = %d, in %.2f GB a pass", job.name, found, budget / 1e9)
    return replace(collator, tokens_micro=found)


def _budget(job: TrainJob, model: CellModel, local_workers: int) -> float:
    """Bytes of a pass: what is free now, less gradients, masters and moments yet to come."""
    values = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    to_come = values * 16.0
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(max(_SHARE * free - to_come, 0.05 * free))
    available = float(psutil.virtual_memory().available) / local_workers
    return max(_SHARE * available - to_come, 0.05 * available)


def _search(job: TrainJob, collator: Collator, model: CellModel, budget: float) -> int:
    """Trial passes over the longest of the first cells of the run's order."""
    share = job.data.plan.cells_global // job.scale.workers
    ids = job.data.plan.joinids[: min(_TRIAL_CELLS, len(job.data.plan.joinids))]
    block = job.data.source.tokens(ids, epoch=0)
    codes = job.data.source.covariates(ids)
    lengths = np.maximum(np.diff(block.indptr), 1)
    longest = int(np.argmax(lengths))
    per_cell = model.fixed_length or int(lengths[longest])

    def measure(tokens: int) -> float:
        rows = np.full(max(tokens // per_cell, 1), longest)
        repeated = _alone(block, rows)
        part = {name: code[rows] for name, code in codes.items()}
        trial = replace(collator, cells_micro=len(rows))
        (batch,) = trial(repeated, part, epoch=0)
        return _peak_bytes(job, collator, model, batch)

    most = per_cell * max(1, min(share, job.batch.cells_micro))
    return most_tokens(measure, budget, first=per_cell, most=max(most, per_cell))


def _alone(block: TokenBlock, rows: Any) -> TokenBlock:
    """Cells taken several times, under ids of their own: draws are by cell."""
    taken = block.take(rows)
    return replace(taken, joinids=np.arange(len(rows), dtype=np.int64))


def _peak_bytes(job: TrainJob, collator: Collator, model: CellModel, batch: CellBatch) -> float:
    device = next(model.parameters()).device
    try:
        return _pass(job, collator, model.train(), batch.to(device))
    except torch.cuda.OutOfMemoryError:
        return float("inf")
    finally:
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _pass(job: TrainJob, collator: Collator, model: CellModel, batch: CellBatch) -> float:
    device = batch.token_ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with saved_bytes(model) as kept, autocast(device, job.train.precision):
        output = model(batch)
    loss = collator.objective.loss(output, batch)
    loss.total.backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device) - before)
    return _PEAK_OVER_SAVED * kept.bytes


class saved_bytes:  # noqa: N801  reads as a verb in a with statement
    """Counts what autograd keeps for the backward pass of what runs in the ``with`` block.

    Args:
        model: its parameters are not counted.

    Attributes:
        bytes: of distinct memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._seen: dict[int, int] = {}
        self._own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __enter__(self) -> saved_bytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *exc: object) -> None:
        self._hooks.__exit__(*exc)
        self.bytes = sum(self._seen.values())
