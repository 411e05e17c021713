"""One optimizer step behind one interface, and the plain-torch engine.

An engine owns the module and its optimizer. A step takes the rank's micro-batches of one global
batch; losses travel as (sum, count), the count is summed over ranks and micro-batches first, so
that every target weighs the same wherever it was computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from cellray.core.batch import CellBatch
from cellray.objectives.base import Loss, Objective, Tallies
from cellray.train.config import OptimSection
from cellray.train.optim import build_adamw, set_learning_rate
from cellray.train.shards import Shards, pieces_state, restore_pieces, whole_parameters
from cellray.train.statistics import KeptStatistics, share_statistics

__all__ = [
    "Engine",
    "Snapshot",
    "StepStats",
    "TorchEngine",
    "autocast",
    "build_engine",
    "clip_gradients",
    "evaluate_batches",
    "global_max",
    "global_sum",
    "host_copy",
    "step_losses",
    "world_size",
]


@dataclass(frozen=True)
class StepStats:
    """What a step or an evaluation counted, over all ranks.

    Attributes:
        loss: summed loss divided by ``num_targets``.
        num_targets: targets the loss was summed over.
        parts: named sums of the objective, divided by ``num_targets`` too.
        gradient_norm: of the step's gradient before clipping; 0 for an evaluation.
        taken: False if the step was left out: its loss or gradient was not finite, or the loss
            above the limit.
        votes: sum of what the ranks voted.
        losses: (micro-batches,) this rank's summed losses.
    """

    loss: float
    num_targets: int
    parts: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    taken: bool = True
    votes: float = 0.0
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class Snapshot:
    """The training state of one moment, copied to the host.

    Attributes:
        optimizer: this rank's pieces, see :mod:`cellray.train.shards`.
        weights: the whole module's float32 state dict on rank 0, empty on the others.
    """

    optimizer: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]


class Engine(Protocol):
    """Steps, evaluates, gives and takes its state; all of these are collective."""

    module: nn.Module

    def step(
        self,
        batches: Sequence[CellBatch],
        *,
        lr: float,
        limit: float = math.inf,
        vote: float = 0.0,
    ) -> StepStats:
        """Accumulate the gradients of the micro-batches and take one optimizer step.

        Args:
            batches: this rank's micro-batches, at least one; ranks may have unlike numbers.
            lr: learning rate.
            limit: a mean loss above it, or one that is not finite, leaves the step out: weights,
                running statistics and optimizer stay as they are, on all ranks.
            vote: is summed over ranks, for whatever the caller has to agree on.
        """
        ...

    def evaluate(self, batches: Iterable[CellBatch], *, counted: int | None = None) -> StepStats:
        """The loss over batches without training; every rank must call it.

        Args:
            batches: this rank's; every rank needs equally many.
            counted: how many of them count, the first ones; the others only keep step with the
                other ranks. None counts all.
        """
        ...

    def snapshot(self) -> Snapshot:
        """Copy the whole training state to the host; every rank must call it."""
        ...

    def load(self, folder: Path) -> None:
        """Take up the optimizer state of a checkpoint's engine folder.

        The module must have held the checkpoint's weights when the engine was built. Any number
        of workers, ZeRO stage and engine may have written it.
        """
        ...

    def weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The whole module's float32 weights in host memory; every rank must call it.

        Args:
            keep: False gives {} (a rank that only helps to gather).
        """
        ...


def world_size() -> int:
    """Ranks of the process group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def global_sum(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks, in float64."""
    if world_size() == 1:
        return [float(v) for v in values]
    tensor = torch.tensor(list(values), dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return [float(v) for v in tensor.tolist()]


def global_max(value: float) -> float:
    """The largest value of any rank."""
    if world_size() == 1:
        return float(value)
    tensor = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor)


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast on ``device``, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _agree(batches: Sequence[CellBatch], vote: float) -> tuple[int, int, float]:
    """Targets of all ranks, the most micro-batches that any has, and the sum of votes."""
    targets = sum(batch.num_targets for batch in batches)
    if world_size() == 1:
        return targets, len(batches), vote
    mine = torch.tensor(
        [float(targets), float(len(batches)), vote], dtype=torch.float64, device=_device()
    )
    every = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(every, mine)
    table = torch.stack(every).cpu()
    return int(table[:, 0].sum()), int(table[:, 1].max()), float(table[:, 2].sum())


def _device() -> str:
    """Where tensors must be for the process group."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def _summed(losses: Sequence[Loss]) -> tuple[list[str], torch.Tensor]:
    """Names, and (2 + parts,) float64: loss, targets and parts summed over batches and ranks."""
    names = list(losses[0].parts) if losses else []
    device = losses[0].total.device if losses else torch.device("cpu")
    columns = [torch.stack([x.total.detach().double() for x in losses]).sum()] if losses else []
    count = float(sum(x.num_targets for x in losses))
    columns.append(torch.full((), count, dtype=torch.float64, device=device))
    columns += [torch.stack([x.parts[n].double() for x in losses]).sum() for n in names]
    sums = torch.stack(columns) if losses else torch.zeros(2, dtype=torch.float64)
    if world_size() > 1:
        sums = sums.to(_device())
        dist.all_reduce(sums)
    return names, sums


def _stats(names: Sequence[str], sums: torch.Tensor) -> StepStats:
    total, count, *parts = sums.tolist()
    share = 1 / max(count, 1.0)
    shared = {n: v * share for n, v in zip(names, parts, strict=True)}
    return StepStats(total * share, int(count), shared)


def _uncounted(loss: Loss) -> Loss:
    """The same names, nothing in them."""
    nothing = {name: torch.zeros_like(part) for name, part in loss.parts.items()}
    return Loss(torch.zeros_like(loss.total), 0, nothing)


def evaluate_batches(
    module: nn.Module,
    objective: Objective,
    batches: Iterable[CellBatch],
    *,
    precision: str,
    counted: int | None = None,
) -> StepStats:
    """The objective's mean loss over all ranks' batches, in eval mode, without gradients.

    What an objective tallies besides is summed over batches and ranks, and joins the parts.
    """
    share_statistics(module)
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    losses, tally = [], torch.zeros(())
    with torch.no_grad():
        for number, batch in enumerate(batches):
            on_device = batch.to(device)
            with autocast(device, precision):
                output = module(on_device)
            loss = objective.loss(output, on_device)
            counts = counted is None or number < counted
            losses.append(loss if counts else _uncounted(loss))
            if isinstance(objective, Tallies):
                tally = tally + counts * objective.tally(output, on_device).double().cpu()
    module.train(was_training)
    stats = _stats(*_summed(losses))
    if not losses or not isinstance(objective, Tallies):
        return stats
    if world_size() > 1:
        tally = tally.to(_device())
        dist.all_reduce(tally)
    return replace(stats, parts={**stats.parts, **objective.judged(tally.cpu())})


# Called with (scaled loss, whether it is the step's last).
Backward = Callable[[torch.Tensor, bool], None]


def step_losses(
    engine_module: Any,
    objective: Objective,
    batches: Sequence[CellBatch],
    *,
    device: torch.device,
    precision: str,
    backward: Backward,
    scale: float,
    limit: float,
    vote: float,
) -> StepStats:
    """Forward and backward over the micro-batches of one step.

    Ranks take equally many passes: one with fewer micro-batches passes its first again, uncounted.
    A step that is to be left out gets a gradient that is no number, which every engine leaves out
    by itself; so the host need not wait for the loss between forward and backward.

    Args:
        engine_module: callable on a batch.
        objective: counts the loss.
        batches: this rank's micro-batches.
        device: where the module is.
        precision: ``fp32`` or ``bf16``.
        backward: takes a loss back.
        scale: factor that undoes what the engine's own averaging will divide by.
        limit: see :meth:`Engine.step`.
        vote: likewise.
    """
    count, passes, votes = _agree(batches, vote)
    losses: list[Loss] = []
    names, sums = list[str](), torch.zeros(2, dtype=torch.float64)
    for i in range(passes):
        on_device = batches[i if i < len(batches) else 0].to(device)
        with autocast(device, precision):
            output = engine_module(on_device)
        loss = objective.loss(output, on_device)
        total = loss.total if i < len(batches) else loss.total * 0.0
        detached = {name: part.detach() for name, part in loss.parts.items()}
        kept = Loss(total.detach(), loss.num_targets, detached)
        losses.append(kept if i < len(batches) else _uncounted(kept))
        if i == passes - 1:
            names, sums = _summed(losses)
            mean = sums[0] / max(count, 1)
            bad = ~torch.isfinite(mean) | (mean > limit)
            total = total * torch.where(bad, math.nan, 1.0).to(total.device, total.dtype)
        backward(total * (scale / max(count, 1)), i == passes - 1)
    stats = _stats(names, sums)
    mine = tuple(torch.stack([loss.total for loss in losses[: len(batches)]]).tolist())
    taken = math.isfinite(stats.loss) and stats.loss <= limit
    return replace(stats, votes=votes, losses=mine, taken=taken)


class TorchEngine:
    """Plain AdamW; gradients are summed over ranks once per step.

    Args:
        module: the model, already on its device.
        objective: counts the loss.
        optim: optimizer section.
        precision: ``fp32`` or ``bf16`` (autocast; weights stay float32).
    """

    def __init__(
        self, module: nn.Module, objective: Objective, *, optim: OptimSection, precision: str
    ) -> None:
        self.module = module.train()
        self._objective = objective
        self._optim = optim
        self._precision = precision
        self._optimizer = build_adamw(module, optim)
        self._device = next(module.parameters()).device

    def step(
        self,
        batches: Sequence[CellBatch],
        *,
        lr: float,
        limit: float = math.inf,
        vote: float = 0.0,
    ) -> StepStats:
        """See :class:`Engine`."""
        set_learning_rate(self._optimizer, lr)
        self._optimizer.zero_grad(set_to_none=True)
        statistics = KeptStatistics(self.module)
        stats = step_losses(
            self.module,
            self._objective,
            batches,
            device=self._device,
            precision=self._precision,
            backward=lambda loss, last: loss.backward(),  # type: ignore[no-untyped-call]
            scale=1.0,
            limit=limit,
            vote=vote,
        )
        self._reduce_gradients()
        norm = float(clip_gradients(self.module.parameters(), self._optim.clip_norm))
        taken = stats.taken and math.isfinite(norm)
        if taken:
            self._optimizer.step()
        else:
            self._optimizer.zero_grad(set_to_none=True)
            statistics.put_back()
        return replace(stats, gradient_norm=norm, taken=taken)

    def _reduce_gradients(self) -> None:
        """Sum over ranks; a parameter that this step did not reach has a gradient of zeros."""
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        for p in trainable:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if world_size() == 1 or not trainable:
            return
        grads = [p.grad for p in trainable if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        offset = 0
        for p in trainable:
            p.grad = flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()

    def evaluate(self, batches: Iterable[CellBatch], *, counted: int | None = None) -> StepStats:
        """See :class:`Engine`."""
        return evaluate_batches(
            self.module, self._objective, batches, precision=self._precision, counted=counted
        )

    def snapshot(self) -> Snapshot:
        """See :class:`Engine`; ranks hold the same, and each gives its share."""
        rank = dist.get_rank() if world_size() > 1 else 0
        pieces = whole_parameters(dict(self.module.named_parameters()))[rank :: world_size()]
        return Snapshot(pieces_state(self._optimizer, pieces), self.weights(keep=rank == 0))

    def load(self, folder: Path) -> None:
        """See :class:`Engine`."""
        with Shards(folder) as saved:
            pieces = whole_parameters(dict(self.module.named_parameters()))
            restore_pieces(self._optimizer, pieces, saved)

    def weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """See :class:`Engine`."""
        share_statistics(self.module)
        if not keep:
            return {}
        return {name: host_copy(value) for name, value in self.module.state_dict().items()}


def host_copy(value: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, floating numbers as float32."""
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True)


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> torch.Tensor:
    """The gradients' norm; they are scaled down to ``clip_norm``, unless that is 0."""
    held = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
    if clip_norm:
        nn.utils.clip_grads_with_norm_(held, clip_norm, norm)
    return norm


def build_engine(
    module: nn.Module,
    objective: Objective,
    *,
    name: str,
    zero_stage: int,
    optim: OptimSection,
    precision: str,
    offload: str = "none",
) -> Engine:
    """The engine that ``[engine]`` names; DeepSpeed is imported only when it is asked for."""
    if name == "torch":
        return TorchEngine(module, objective, optim=optim, precision=precision)
    from cellray.train.deepspeed import DeepSpeedEngine  # heavy, and only here

    return DeepSpeedEngine(
        module,
        objective,
        zero_stage=zero_stage,
        optim=optim,
        precision=precision,
        offload=offload,
    )
