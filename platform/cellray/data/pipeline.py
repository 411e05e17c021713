"""The stream of tokenised cells of one rank: Ray Data windows through tokenisation actors.

Tokenisation actors read what they tokenise: each holds an open store handle and a compiled
tokenizer, and does read, gene lookup and tokenising in one call. Windows arrive in the plan's
order, whatever actor finished first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from cellray.core.blocks import TokenBlock
from cellray.data.datasource import WindowSource
from cellray.data.plan import EpochPlan
from cellray.data.tokens import TokenSource, make_tokenizer

__all__ = ["StepTokens", "token_stream"]

I64 = npt.NDArray[np.int64]


class _TokenizeWindow:
    """The actor: windows in, one table of tokens a window out."""

    def __init__(self, source: Any, plan: Any, rank: int, world: int) -> None:
        self._source: TokenSource = ray.get(source)
        self._plan: EpochPlan = ray.get(plan)
        self._tokenizer = make_tokenizer(self._source.tokenizer, self._source.vocab)
        self._rank, self._world = rank, world

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for window in batch.to_pylist():
            yield self._table(window["epoch"], window["first"], window["last"])

    def _table(self, epoch: int, first: int, last: int) -> pa.Table:
        rows = self._plan.rows(epoch, first, last, rank=self._rank, world=self._world)
        joinids = rows.reshape(-1)
        block = self._source.tokens(joinids, epoch=epoch, tokenizer=self._tokenizer)
        start = epoch * self._plan.batches_per_epoch + first
        steps = np.repeat(np.arange(start, start + len(rows)), rows.shape[1])
        table = block.to_arrow().append_column("step", pa.array(steps))
        for name, codes in self._source.covariates(joinids).items():
            table = table.append_column(f"covariate:{name}", pa.array(codes))
        return table


@dataclass(frozen=True)
class StepTokens:
    """What one rank trains on in one step.

    Attributes:
        step: global step, counted over all epochs.
        epoch: the pass over the data the step belongs to.
        block: the rank's ``cells_global / world`` cells of this step.
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
    plan: EpochPlan,
    *,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world: int = 1,
    actors: int = 1,
    cpus_per_actor: float = 0.5,
) -> Iterator[StepTokens]:
    """Stream one rank's cells of steps ``first_step .. last_step`` (exclusive), in order.

    Args:
        source: store, vocabulary and tokenizer.
        plan: the order of cells.
        first_step: where to start, e.g. the step of a checkpoint.
        last_step: one past the last step.
        rank: this worker.
        world: number of workers; divides ``plan.lanes``.
        actors: tokenisation actors of this rank.
        cpus_per_actor: logical CPUs each of them reserves.

    Yields:
        One :class:`StepTokens` a step; an epoch delivers every cell of the plan at most once, and
        all of them but the plan's declared remainder.
    """
    if first_step >= last_step:
        return
    windows = WindowSource(plan, first_step=first_step, last_step=last_step)
    dataset = ray.data.read_datasource(windows, override_num_blocks=windows.num_windows)
    dataset = dataset.map_batches(
        _TokenizeWindow,
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, windows.num_windows)),
        num_cpus=cpus_per_actor,
        fn_constructor_args=(ray.put(source), ray.put(plan), rank, world),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    share = plan.cells_global // world
    expected = first_step
    rest: pa.Table | None = None
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        table = table if rest is None else pa.concat_tables([rest, table])
        whole = len(table) // share
        for i in range(whole):
            part = table.slice(i * share, share)
            steps = part.column("step")
            assert steps[0].as_py() == steps[share - 1].as_py() == expected, "stream out of order"
            yield _step(part, expected, plan.cursor(expected).epoch)
            expected += 1
        rest = table.slice(whole * share) if len(table) > whole * share else None
    assert expected == last_step, f"stream ended at step {expected} of {last_step}"
