"""Writing blocks of a synthetic atlas: one at a time here, or many at a time as Ray tasks.

A block is a range of joinids and becomes one fragment of X. Fragments have unique names, so that
any number of processes may write into one array at a time.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray
import tiledbsoma

from cellray.core.errors import DataError
from cellray.data.digest import hash64
from cellray.data.storage import context
from cellray.data.synthetic_biology import Biology, biology
from cellray.data.synthetic_cells import cell_facts, draw_counts
from cellray.data.synthetic_config import SynthesizeConfig
from cellray.data.synthetic_kernels import hash_cells
from cellray.data.writer import write_block, x_path

__all__ = ["BlockDone", "BlockJob", "write_blocks"]

I64 = npt.NDArray[np.int64]
Range = tuple[int, int]


@dataclass(frozen=True)
class BlockJob:
    """What every block of an atlas needs to know.

    Attributes:
        config: of the atlas.
        place: where the store is being built.
        library_size: median library size.
    """

    config: SynthesizeConfig
    place: str
    library_size: float


@dataclass(frozen=True)
class BlockDone:
    """What is kept of a block of N cells that was written.

    Attributes:
        first: joinid of its first cell.
        sums: (N,) counts of each cell.
        nonzero: (N,) detected genes of each.
        hashes: (N,) content hash of each.
        gene_cells: (V,) cells that express each gene.
    """

    first: int
    sums: npt.NDArray[np.float64]
    nonzero: I64
    hashes: npt.NDArray[np.uint64]
    gene_cells: I64


@lru_cache(maxsize=1)
def _atlas(config: str) -> tuple[Biology, npt.NDArray[np.uint64]]:
    """The biology and the hashes of its genes, once a process."""
    atlas = biology(SynthesizeConfig.model_validate_json(config))
    return atlas, hash64(list(atlas.gene_ids))


def _write(job: BlockJob, first: int, last: int) -> BlockDone:
    """Make cells ``first .. last`` (exclusive) and write their counts."""
    atlas, gene_hashes = _atlas(job.config.model_dump_json())
    facts = cell_facts(atlas, np.arange(first, last, dtype=np.int64))
    block = draw_counts(atlas, facts, job.library_size)
    with tiledbsoma.open(str(x_path(Path(job.place))), "w", context=context()) as x:
        write_block(x, block, first, job.config.num_genes)
    total = np.concatenate([[0.0], np.cumsum(block.data, dtype=np.float64)])
    return BlockDone(
        first=first,
        sums=np.diff(total[block.indptr]),
        nonzero=np.diff(block.indptr).astype(np.int64),
        hashes=hash_cells(block.indptr, block.indices, block.data.view(np.uint32), gene_hashes),
        gene_cells=np.bincount(block.indices, minlength=job.config.num_genes),
    )


def _in_tasks(
    job: BlockJob, ranges: Sequence[Range], workers: int
) -> Generator[BlockDone, None, None]:
    # not retried by Ray: a task that died behind its last write would write its cells twice
    task = ray.remote(num_cpus=1, max_retries=0)(_write)
    waiting = iter(ranges)
    running = []
    try:
        for first, last in waiting:
            running.append(task.remote(job, first, last))
            if len(running) >= workers:
                done, running = ray.wait(running, num_returns=1)
                yield ray.get(done[0])
        while running:
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        raise DataError(f"making the atlas failed in a worker: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise DataError(
            f"a worker that makes the atlas died: {str(error).splitlines()[0]}. If memory ran out, "
            "lower workers or cells_per_block"
        ) from error
    finally:
        for one in running:
            ray.cancel(one)
        if running:  # nothing may write any more when the staging folder is removed
            ray.wait(running, num_returns=len(running), timeout=60)


def write_blocks(job: BlockJob, *, workers: int) -> Generator[BlockDone, None, None]:
    """Write all cells of an atlas into the X that is there, in any order.

    Args:
        job: what is written, and where to.
        workers: Ray tasks at a time; 0 takes all CPUs of the cluster, 1 works in this process
            without Ray.

    Raises:
        DataError: a worker failed or died.
    """
    step, total = job.config.cells_per_block, job.config.num_cells
    ranges = [(first, min(first + step, total)) for first in range(0, total, step)]
    if workers == 1:
        yield from (_write(job, first, last) for first, last in ranges)
        return
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="error")
    wanted = workers or int(ray.cluster_resources().get("CPU", 1))
    yield from _in_tasks(job, ranges, wanted)
