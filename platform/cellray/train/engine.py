"""One optimizer step behind one interface, and the plain-torch engine.

An engine owns the module and its optimizer. A step takes the rank's micro-batches of one global
batch; losses travel as (sum, count), the count is summed over ranks and micro-batches first, so
that every target weighs the same wherever it was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from cellray.core.batch import CellBatch
from cellray.core.errors import CheckpointError
from cellray.objectives.base import Loss, Objective
from cellray.train.config import OptimSection
from cellray.train.optim import build_adamw, set_learning_rate
from cellray.train.statistics import share_statistics

__all__ = [
    "Engine",
    "StepStats",
    "TorchEngine",
    "autocast",
    "build_engine",
    "evaluate_batches",
    "global_sum",
    "world_size",
]


@dataclass(frozen=True)
class StepStats:
    """What a step or an evaluation counted, over all ranks.

    Attributes:
        loss: summed loss divided by ``num_targets``.
        num_targets: targets the loss was summed over.
        parts: named sums of the objective, divided by ``num_targets`` too.
    """

    loss: float
    num_targets: int
    parts: Mapping[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """Steps, evaluates, saves and loads; save and load are collective."""

    module: nn.Module

    def step(self, batches: Sequence[CellBatch], *, lr: float) -> StepStats:
        """Accumulate the gradients of the micro-batches and take one optimizer step."""
        ...

    def evaluate(self, batches: Iterable[CellBatch], *, counted: int | None = None) -> StepStats:
        """The loss over batches without training; every rank must call it.

        Args:
            batches: this rank's; every rank needs equally many.
            counted: how many of them count, the first ones; the others only keep step with the
                other ranks. None counts all.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's share of the training state into ``folder``."""
        ...

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote with the same number of workers."""
        ...

    def weights(self) -> dict[str, torch.Tensor]:
        """The whole module's float32 weights on the CPU; collective, the same on every rank."""
        ...


def world_size() -> int:
    """Ranks of the process group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def global_sum(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks, in float64."""
    if world_size() == 1:
        return [float(v) for v in values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(v) for v in tensor.tolist()]


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast on ``device``, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _stats(losses: Sequence[Loss]) -> StepStats:
    """Reduce the losses of this rank's micro-batches over all ranks; one all-reduce."""
    names = list(losses[0].parts) if losses else []
    sums = [sum(float(x.total.detach()) for x in losses), sum(x.num_targets for x in losses)]
    sums += [sum(float(x.parts[name]) for x in losses) for name in names]
    total, count, *parts = global_sum(sums)
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
    """The objective's mean loss over all ranks' batches, in eval mode, without gradients."""
    share_statistics(module)
    device = next(module.parameters()).device
    was_training = module.training
    module.eval()
    losses = []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            on_device = batch.to(device)
            with autocast(device, precision):
                output = module(on_device)
            loss = objective.loss(output, on_device)
            losses.append(loss if counted is None or number < counted else _uncounted(loss))
    module.train(was_training)
    return _stats(losses)


def step_losses(
    engine_module: Any,
    objective: Objective,
    batches: Sequence[CellBatch],
    *,
    device: torch.device,
    precision: str,
    backward: Any,
    scale: float,
) -> StepStats:
    """Forward and backward over the micro-batches of one step.

    Args:
        engine_module: callable on a batch.
        objective: counts the loss.
        batches: this rank's micro-batches.
        device: where the module is.
        precision: ``fp32`` or ``bf16``.
        backward: called with (scaled loss, whether it is the last micro-batch).
        scale: factor that undoes what the engine's own averaging will divide by.
    """
    (count,) = global_sum([sum(batch.num_targets for batch in batches)])
    losses = []
    for i, batch in enumerate(batches):
        on_device = batch.to(device)
        with autocast(device, precision):
            output = engine_module(on_device)
        loss = objective.loss(output, on_device)
        backward(loss.total * (scale / max(count, 1.0)), i == len(batches) - 1)
        detached = {name: part.detach() for name, part in loss.parts.items()}
        losses.append(Loss(loss.total.detach(), loss.num_targets, detached))
    return _stats(losses)


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

    def step(self, batches: Sequence[CellBatch], *, lr: float) -> StepStats:
        """See :class:`Engine`."""
        set_learning_rate(self._optimizer, lr)
        self._optimizer.zero_grad(set_to_none=True)
        stats = step_losses(
            self.module,
            self._objective,
            batches,
            device=self._device,
            precision=self._precision,
            backward=lambda loss, last: loss.backward(),
            scale=1.0,
        )
        self._reduce_gradients()
        if self._optim.clip_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._optim.clip_norm)
        self._optimizer.step()
        return stats

    def _reduce_gradients(self) -> None:
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        if world_size() == 1 or not trainable:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable]
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

    def save(self, folder: Path) -> None:
        """See :class:`Engine`; rank 0 writes, all ranks hold the same."""
        share_statistics(self.module)
        if not dist.is_initialized() or dist.get_rank() == 0:
            state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(state, folder / "torch_engine.pt")

    def load(self, folder: Path) -> None:
        """See :class:`Engine`; any number of workers will do.

        Raises:
            CheckpointError: the folder holds no state of this engine.
        """
        file = folder / "torch_engine.pt"
        if not file.is_file():
            raise CheckpointError(
                f"no torch engine state in '{folder}'; it was saved by another engine: set "
                "engine.name to the one that wrote it"
            )
        state = torch.load(file, map_location=self._device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])

    def weights(self) -> dict[str, torch.Tensor]:
        """See :class:`Engine`."""
        share_statistics(self.module)
        return {
            name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)
            for name, value in self.module.state_dict().items()
        }


def build_engine(
    module: nn.Module,
    objective: Objective,
    *,
    name: str,
    zero_stage: int,
    optim: OptimSection,
    precision: str,
    cells_micro: int,
    accumulation: int,
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
        cells_micro=cells_micro,
        accumulation=accumulation,
    )
