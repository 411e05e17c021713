"""Helpers for tests and users: process groups on this machine, small cells, small runs."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from cellray.core.blocks import CellBlock

__all__ = ["assert_same_cells", "random_block", "run_distributed"]


def _enter(rank: int, world: int, folder: str, task: Callable[..., Any], args: tuple[Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), DS_ACCELERATOR="cpu"
    )
    init = f"file://{folder}/group"
    try:
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
        result = task(*args)
        torch.save(result, f"{folder}/result{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        raise


def run_distributed(task: Callable[..., Any], *, world: int, args: Sequence[Any] = ()) -> list[Any]:
    """Run ``task(*args)`` on ``world`` fresh gloo processes; return every rank's result.

    Args:
        task: a module-level function (the processes are spawned).
        world: number of processes.
        args: its arguments, picklable.

    Raises:
        RuntimeError: a rank failed; the message holds its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            arguments = (world, folder, task, tuple(args))
            spawn(_enter, args=arguments, nprocs=world)  # type: ignore[no-untyped-call]
        except (ProcessRaisedException, ProcessExitedException) as error:
            told = [p.read_text() for p in sorted(Path(folder).glob("error*"))]
            raise RuntimeError("a rank failed:\n" + "\n".join(told or [str(error)])) from error
        return [torch.load(f"{folder}/result{rank}", weights_only=False) for rank in range(world)]


def assert_same_cells(delivered: Sequence[np.ndarray[Any, Any]], expected: Any) -> None:
    """Assert that the multiset of joinids over all parts equals ``expected``."""
    got = np.sort(np.concatenate([np.asarray(part).reshape(-1) for part in delivered]))
    want = np.sort(np.asarray(expected).reshape(-1))
    assert np.array_equal(got, want), (
        f"{len(got)} cells delivered ({len(np.unique(got))} distinct), {len(want)} expected"
    )


def random_block(num_cells: int, *, num_genes: int, genes_per_cell: int, seed: int) -> CellBlock:
    """A block of random counts over ``num_genes`` vocabulary genes, joinids from 0."""
    rng = np.random.default_rng(seed)
    dense = rng.random((num_cells, num_genes)).argsort(axis=1)[:, :genes_per_cell]
    genes = np.sort(dense, axis=1).astype(np.int32)
    counts = rng.geometric(0.3, size=genes.shape).astype(np.float32)
    return CellBlock(
        joinids=np.arange(num_cells, dtype=np.int64),
        indptr=np.arange(num_cells + 1, dtype=np.int64) * genes_per_cell,
        genes=genes.reshape(-1),
        counts=counts.reshape(-1),
        library_sizes=counts.sum(axis=1),
    )
