"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the same interface as the plain-torch one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput
from cellray.objectives.base import Objective
from cellray.train.config import OptimSection
from cellray.train.engine import (
    Snapshot,
    StepStats,
    autocast,
    clip_gradients,
    evaluate_batches,
    host_copy,
    step_losses,
    world_size,
)
from cellray.train.optim import build_adamw, set_learning_rate
from cellray.train.shards import Piece, Shards, pieces_state, restore_pieces, whole_parameters
from cellray.train.statistics import KeptStatistics, share_statistics

__all__ = ["DeepSpeedEngine", "deepspeed_config"]

_MOST_BUCKET = 200_000_000  # values of a gradient bucket, at most
# DeepSpeed divides losses by it, and with offload it must know that gradients accumulate. The
# true number differs from step to step.
_ACCUMULATION = 2


def deepspeed_config(
    *, zero_stage: int, precision: str, clip_norm: float, offload: str, num_values: int, cuda: bool
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    The optimizer is ours (the same AdamW as the plain engine), micro-batches are ours too: every
    step says which is its last. bf16 at stage 0 is done by autocast over float32 weights, because
    DeepSpeed's own stage-0 bf16 optimizer drifts from the others.

    Args:
        zero_stage: 0 to 3.
        precision: ``fp32`` or ``bf16``.
        clip_norm: 0 does not clip.
        offload: ``none``, ``optimizer`` or ``parameters``.
        num_values: of all parameters; gradient buckets are no larger.
        cuda: host memory is pinned for a GPU.
    """
    bucket = min(num_values + num_values % 2, _MOST_BUCKET)  # DeepSpeed wants an even number
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": cuda,
    }
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": _ACCUMULATION,
        "gradient_clipping": clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16" and zero_stage > 0:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


class _Autocasting(nn.Module):
    """Enters autocast inside the engine: DeepSpeed switches off one entered around it."""

    def __init__(self, module: nn.Module, precision: str) -> None:
        super().__init__()
        self.inner = module
        self._precision = precision

    def forward(self, batch: CellBatch) -> ModelOutput:
        with autocast(batch.token_ids.device, self._precision):
            output: ModelOutput = self.inner(batch)
        return output


class DeepSpeedEngine:
    """DeepSpeed behind :class:`cellray.train.engine.Engine`.

    Args:
        module: the model, already on its device; the process group exists.
        objective: counts the loss.
        zero_stage: 0 to 3.
        optim: optimizer section.
        precision: ``fp32`` or ``bf16``.
        offload: ``none``, ``optimizer`` or ``parameters``: what is kept in the host's memory.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        *,
        zero_stage: int,
        optim: OptimSection,
        precision: str,
        offload: str = "none",
    ) -> None:
        self.module = module
        self._objective = objective
        self._stage = zero_stage
        self._device = next(module.parameters()).device
        cuda = self._device.type == "cuda"
        if not cuda:
            # Compiled on first use for minutes; a killed build leaves a lock that hangs later runs.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "nccl" if cuda else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        # DeepSpeed rounds all parameters to bf16, and makes its float32 masters from that.
        rounds = precision == "bf16" and zero_stage > 0
        exact, self._frozen = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for name, p in module.named_parameters(remove_duplicate=False) if rounds else ():
            (exact if p.requires_grad else self._frozen)[name] = host_copy(p)
        self._optimizer = build_adamw(module, optim)
        self._engine, *_ = deepspeed.initialize(
            model=_Autocasting(module, precision),
            optimizer=self._optimizer,
            config=deepspeed_config(
                zero_stage=zero_stage,
                precision=precision,
                clip_norm=optim.clip_norm,
                offload=offload,
                num_values=sum(p.numel() for p in trained.values()),
                cuda=cuda,
            ),
        )
        for piece in self._pieces() if exact else []:
            values = exact[piece.name].view(-1).narrow(0, piece.start, piece.length)
            piece.of(piece.flat.data).copy_(values)
        self._engine.train()

    def step(
        self,
        batches: Sequence[CellBatch],
        *,
        lr: float,
        limit: float = math.inf,
        vote: float = 0.0,
    ) -> StepStats:
        """See :class:`cellray.train.engine.Engine`."""
        set_learning_rate(self._engine.optimizer, lr)
        norm = 0.0
        statistics = KeptStatistics(self.module)

        def backward(loss: torch.Tensor, last: bool) -> None:
            nonlocal norm
            if isinstance(self._engine.optimizer, BF16_Optimizer):
                # It has added the last pass's gradients to float32 ones, and would again: it clears
                # them on hooks that DeepSpeed hangs on tensors in tuples and dicts, not in ours.
                self._engine.optimizer.clear_lp_grads()
            self._engine.set_gradient_accumulation_boundary(last)
            self._engine.backward(loss)
            if last and self._stage == 0:
                norm = float(clip_gradients(self.module.parameters(), 0.0))
                if not math.isfinite(norm):  # stages 1 to 3 look for themselves
                    self._engine.zero_grad()
                    return
            self._engine.step()

        stats = step_losses(
            self._engine,
            self._objective,
            batches,
            device=self._device,
            precision="fp32",  # the wrapped module enters autocast itself
            backward=backward,
            scale=float(world_size() * _ACCUMULATION),
            limit=limit,
            vote=vote,
        )
        if self._stage:
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        taken = stats.taken and math.isfinite(norm)
        if not taken:
            statistics.put_back()
            if self._stage in (1, 2):  # with offload DeepSpeed would go on adding to what was bad
                held = getattr(self._engine.optimizer, "averaged_gradients", {})
                held.update(dict.fromkeys(held))
        return replace(stats, gradient_norm=norm, taken=taken)

    def evaluate(self, batches: Iterable[CellBatch], *, counted: int | None = None) -> StepStats:
        """See :class:`cellray.train.engine.Engine`; at stage 3 ranks must have equally many."""
        return evaluate_batches(
            self._engine, self._objective, batches, precision="fp32", counted=counted
        )

    def snapshot(self) -> Snapshot:
        """See :class:`cellray.train.engine.Engine`; every rank gives its own shard."""
        pieces = self._pieces()
        if not self._stage:  # ranks hold the same
            pieces = pieces[dist.get_rank() :: world_size()]
        state = pieces_state(self._optimizer, pieces)
        return Snapshot(state, self.weights(keep=dist.get_rank() == 0))

    def load(self, folder: Path) -> None:
        """See :class:`cellray.train.engine.Engine`."""
        with Shards(folder) as saved:
            restore_pieces(self._optimizer, self._pieces(), saved)

    def _pieces(self) -> list[Piece]:
        """What this rank's optimizer holds of every trained parameter."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self._stage:
            return whole_parameters(named)
        find = _sharded_piece if self._stage == 3 else _flat_piece
        found = (find(self._engine.optimizer, name, p) for name, p in named.items())
        return [piece for piece in found if piece is not None]

    def weights(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """See :class:`cellray.train.engine.Engine`; gathers shards parameter by parameter."""
        share_statistics(self.module)
        result: dict[str, torch.Tensor] = {}
        parameters: Mapping[str, nn.Parameter] = dict(
            self.module.named_parameters(remove_duplicate=False)
        )
        for name, value in self.module.state_dict().items():
            if name in self._frozen:
                whole = self._frozen[name]
            else:
                whole = _whole(parameters[name]) if name in parameters else value
            if keep:
                result[name] = host_copy(whole)
        return result


def _flat_piece(zero: Any, name: str, parameter: Any) -> Piece | None:
    """Stages 1 and 2: the part of a parameter that lies in this rank's flat partition."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
    # bf16 at stage 1 has an optimizer of its own, with another name for the same thing
    partitions = getattr(zero, "single_partition_of_fp32_groups", None)
    if partitions is None:
        partitions = zero.fp32_groups_flat_partition
    flat = partitions[mapping.param_group_index]
    return Piece(name, ours.start, ours.numel, flat, theirs.start)


def _sharded_piece(zero: Any, name: str, parameter: Any) -> Piece | None:
    """Stage 3: this rank's share of a parameter; the last rank's may be empty or cut short."""
    group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
    start = dist.get_rank() * length
    real = min(length, parameter.ds_numel - start)
    if real <= 0:
        return None
    return Piece(name, start, real, zero.fp32_partitioned_groups_flat[group], offset)


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's full values; collective at stage 3, where also frozen ones are sharded."""
    full: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    if full is None and hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            full = parameter.detach().clone()
    return parameter if full is None else full
