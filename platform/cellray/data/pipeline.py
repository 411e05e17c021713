"""The stream of tokenised cells of one rank: Ray Data windows through tokenisation actors.

Tokenisation actors read what they tokenise: each holds an open store handle and a compiled
tokenizer, and does read, gene lookup and tokenising in one call. Windows arrive in the plan's
order, whatever actor finished first.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from cellray.core.blocks import TokenBlock
from cellray.core.errors import DataError
from cellray.core.memory import keep_freed_memory
from cellray.data.cache import TokenCache, cache_key, prepare_cache
from cellray.data.datasource import WindowSource, as_rows, windows
from cellray.data.plan import Plan
from cellray.data.tokens import TokenSource, make_tokenizer

__all__ = ["StepTokens", "cached_stream", "settle_helpers", "token_stream", "write_cache"]

I64 = npt.NDArray[np.int64]

_NAMING_CPUS = 0.05
_NAMING_TASKS = 2  # an actor's, at a time
_PIECE_BYTES = 32 << 20  # of a window, handed on at a time
_LEAST_AHEAD_BYTES = 128 << 20
_CACHED_CELLS = 1024  # gathered from a cache at a time


class _TokenizeWindow:
    """The actor: windows in, tables of tokens out, in the plan's order."""

    def __init__(self, source: Any, plan: Any, rank: int, world: int) -> None:
        keep_freed_memory()
        self._source: TokenSource = ray.get(source)
        self._plan: Plan = ray.get(plan)
        self._tokenizer = make_tokenizer(self._source.tokenizer, self._source.vocab)
        self._rank, self._world = rank, world

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for epoch, first, last in as_rows(batch):
            yield from self._tables(epoch, first, last)

    def _tables(self, epoch: int, first: int, last: int) -> Iterator[pa.Table]:
        rows = self._plan.rows(epoch, first, last, rank=self._rank, world=self._world)
        ids = rows.reshape(-1)
        block = self._source.tokens(ids, epoch=epoch, tokenizer=self._tokenizer)
        codes = self._source.covariates(ids)
        start = epoch * self._plan.batches_per_epoch + first
        share = rows.shape[1]
        for begin, end in _pieces(block, share):
            table = block.slice(begin, end).to_arrow()
            steps = start + np.arange(begin, end) // share
            table = table.append_column("step", pa.array(steps))
            for name, column in codes.items():
                table = table.append_column(f"covariate:{name}", pa.array(column[begin:end]))
            yield table


def _pieces(block: TokenBlock, share: int) -> Iterator[tuple[int, int]]:
    """Cut a window into whole steps of some megabytes: what the consumer holds at a time."""
    per_token = block.tokens.dtype.itemsize + block.values.dtype.itemsize
    size = int(block.indptr[-1]) * per_token
    steps = len(block) // share
    at_once = max(1, steps * _PIECE_BYTES // max(size, 1))
    for first in range(0, steps, at_once):
        yield first * share, min(first + at_once, steps) * share


@dataclass(frozen=True)
class StepTokens:
    """What one rank trains on in one step.

    Attributes:
        step: global step, counted over all epochs.
        epoch: the pass over the data the step belongs to.
        block: the rank's share of the cells of this step.
        covariates: name -> codes of these cells.
    """

    step: int
    epoch: int
    block: TokenBlock
    covariates: Mapping[str, I64]


def _step(table: pa.Table, step: int, epoch: int) -> StepTokens:
    covariates = {
        name.removeprefix("covariate:"): table.column(name).to_numpy()
        for name in table.column_names
        if name.startswith("covariate:")
    }
    return StepTokens(step, epoch, TokenBlock.from_arrow(table), covariates)


def token_stream(
    source: TokenSource,
    plan: Plan,
    *,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world: int = 1,
    actors: int = 1,
    cpus_per_actor: float = 0.5,
) -> Iterator[StepTokens]:
    """Stream one rank's cells of steps ``first_step .. last_step`` (exclusive), in order.

    With a token cache the rank reads the memory-mapped shards itself; otherwise windows go through
    Ray Data to actors that read the store and tokenise. The order is the same.

    Args:
        source: store, vocabulary and tokenizer.
        plan: the order of cells.
        first_step: where to start, e.g. the step of a checkpoint.
        last_step: one past the last step.
        rank: this worker.
        world: number of workers; at most the plan's lanes.
        actors: tokenisation actors of this rank.
        cpus_per_actor: logical CPUs each of them reserves.

    Yields:
        One :class:`StepTokens` a step; an epoch delivers every cell of the plan at most once, and
        all of them but the plan's declared remainder.
    """
    if first_step >= last_step:
        return
    if source.cache:
        yield from cached_stream(
            source, plan, first_step=first_step, last_step=last_step, rank=rank, world=world
        )
        return
    dataset = _dataset(source, plan, first_step, last_step, rank, world, actors, cpus_per_actor)
    share = plan.share(rank, world)
    expected = first_step
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        assert len(table) % share == 0, "a block holds whole steps"
        for i in range(len(table) // share):
            part = table.slice(i * share, share)
            steps = part.column("step")
            assert steps[0].as_py() == steps[share - 1].as_py() == expected, "stream out of order"
            yield _step(part, expected, plan.cursor(expected).epoch)
            expected += 1
    assert expected == last_step, f"stream ended at step {expected} of {last_step}"


# Ray Data's actors of which a cluster has one: module and function that makes it.
_HELPERS = (
    ("ray.data._internal.execution.node_trackers", "get_or_create_actor_location_tracker"),
    (
        "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator",
        "get_or_create_autoscaling_coordinator",
    ),
    ("ray.data._internal.stats", "get_or_create_stats_actor"),
    ("ray.data._internal.stats_summary_actor", "_get_or_create_stats_summary_actor"),
)


def settle_helpers() -> list[Any]:
    """Have Ray Data's cluster-wide actors live on this node; for a driver, before its workers.

    Each is pinned to the node that asks for it first. Our streams run in training workers, and with
    a worker's node one of them would be lost for good: all other streams of the cluster would wait
    for it for ever. Functions that a version of Ray lacks are passed over.

    Returns:
        Their handles.
    """
    found = []
    for module, function in _HELPERS:
        try:
            make = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError):
            continue
        found.append(make())
    return found


def _dataset(
    source: TokenSource,
    plan: Plan,
    first_step: int,
    last_step: int,
    rank: int,
    world: int,
    actors: int,
    cpus_per_actor: float,
) -> Any:
    """The Ray Data pipeline: windows -> tokenisation actors, in order, with bounded memory."""
    named = WindowSource(plan, first_step=first_step, last_step=last_step)
    size = min(actors, named.num_windows)
    # Naming windows is no work. A whole CPU for it may be free on no node though the cluster has
    # one left in pieces, and then the stream would wait for ever. With so little reserved Ray Data
    # would start as many of them as fit, each a process; a few keep the actors busy.
    dataset = ray.data.read_datasource(
        named,
        override_num_blocks=named.num_windows,
        concurrency=min(_NAMING_TASKS * size, named.num_windows),
        ray_remote_args={"num_cpus": _NAMING_CPUS},
    )
    dataset = dataset.map_batches(
        _TokenizeWindow,
        batch_size=None,
        batch_format="pyarrow",
        # one window in work and one waiting: more would only fill memory ahead of the model
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus_per_actor,
        fn_constructor_args=(ray.put(source), ray.put(plan), rank, world),
    )
    options = dataset.context.execution_options
    options.preserve_order = True
    # back-pressure: without a limit the actors run ahead until half of the object store is full
    options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=_ahead_bytes(source, plan, world, size)
    )
    dataset.context.enable_progress_bars = False
    return dataset


def _ahead_bytes(source: TokenSource, plan: Plan, world: int, actors: int) -> int:
    """What the actors of a rank may hold in the object store: two windows each, with room."""
    per_cell = plan.mean_length or float(source.tokenizer.get("max_tokens", 2048))
    per_token = source.token_dtype.itemsize + source.value_dtype.itemsize
    window = plan.window_batches * plan.share(0, world) * per_cell * per_token
    return int(max(_LEAST_AHEAD_BYTES, 2 * (actors + 1) * window))


def cached_stream(
    source: TokenSource,
    plan: Plan,
    *,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[StepTokens]:
    """Read one rank's cells from the source's token cache, in order, in this process.

    Arguments and yields as those of :func:`token_stream`; needs no Ray.
    """
    share = plan.share(rank, world)
    at_once = max(1, _CACHED_CELLS // share)
    for epoch, begin, end in windows(plan, first_step, last_step):
        rows = plan.rows(epoch, begin, end, rank=rank, world=world)
        start = epoch * plan.batches_per_epoch + begin
        for i in range(0, len(rows), at_once):
            ids = rows[i : i + at_once].reshape(-1)
            block = source.tokens(ids, epoch=epoch)
            codes = source.covariates(ids)
            for k in range(len(ids) // share):
                part = slice(k * share, (k + 1) * share)
                covariates = {name: column[part] for name, column in codes.items()}
                tokens = block.slice(part.start, part.stop)
                yield StepTokens(start + i + k, epoch, tokens, covariates)


def write_cache(
    source: TokenSource,
    *,
    cells: I64,
    fingerprint: str,
    folder: str,
    tasks: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> TokenSource:
    """Make sure that a whole token cache is in ``folder``: write what is missing, as Ray tasks.

    Shards that are there are kept, so an interrupted writing goes on where it was.

    Args:
        source: store, vocabulary and tokenizer.
        cells: (N,) ids of the cells, ascending.
        fingerprint: SHA-256 of the cells' ids and counts.
        folder: on a disk that all workers see.
        tasks: shards written at a time; 0 takes the cluster's CPUs.
        say: is told how far the writing is.

    Returns:
        The source, reading from the cache.

    Raises:
        DataError: the folder holds a cache of something else, or cannot be written.
    """
    place = Path(folder).expanduser().resolve()
    info = prepare_cache(place, cache_key(source, cells=cells, fingerprint=fingerprint), cells)
    cached = replace(source, cache=str(place))
    todo = TokenCache(place, cached).missing()
    if not todo:
        say(f"token cache: {info.num_cells:,} cells are there in '{place}'")
        return cached
    most = tasks or max(1, int(ray.cluster_resources().get("CPU", 1)))
    shipped = ray.put(cached)
    waiting, running = list(todo), list[Any]()
    started, done = time.monotonic(), 0
    total = sum(len(TokenCache(place, cached).cells(s)) for s in todo)
    while waiting or running:
        while waiting and len(running) < most:
            running.append(_write_shard.remote(shipped, waiting.pop(0)))
        ready, running = ray.wait(running, num_returns=1)
        try:
            done += sum(ray.get(ready))
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, DataError) else error from error
        rate = done / max(time.monotonic() - started, 1e-9)
        left = (total - done) / max(rate, 1e-9)
        say(f"token cache: {done:,} of {total:,} cells, {rate:,.0f} cells/s, ETA {left:,.0f} s")
    return cached


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def _write_shard(source: TokenSource, shard: int) -> int:
    keep_freed_memory()
    return TokenCache(Path(source.cache), source).write(shard)
