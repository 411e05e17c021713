"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the same interface as the plain-torch one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.errors import CheckpointError
from cellray.objectives.base import Objective
from cellray.train.config import OptimSection
from cellray.train.engine import (
    StepStats,
    autocast,
    evaluate_batches,
    step_losses,
    world_size,
)
from cellray.train.optim import build_adamw, set_learning_rate
from cellray.train.statistics import share_statistics

__all__ = ["DeepSpeedEngine", "deepspeed_config"]

_TAG = "state"
_FACTS = "deepspeed_engine.json"


def deepspeed_config(
    *, zero_stage: int, precision: str, clip_norm: float, cells_micro: int, accumulation: int
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run.

    The optimizer is ours (the same AdamW as the plain engine). bf16 at stage 0 is done by autocast
    over float32 weights, because DeepSpeed's own stage-0 bf16 optimizer drifts from the others.
    """
    return {
        "train_micro_batch_size_per_gpu": cells_micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_optimization": {
            "stage": zero_stage,
            "stage3_gather_16bit_weights_on_model_save": zero_stage == 3,
        },
        "bf16": {"enabled": precision == "bf16" and zero_stage > 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


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
        cells_micro: cells of a micro-batch.
        accumulation: micro-batches of a step.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        *,
        zero_stage: int,
        optim: OptimSection,
        precision: str,
        cells_micro: int,
        accumulation: int,
    ) -> None:
        self.module = module
        self._objective = objective
        self._precision = precision
        self._stage = zero_stage
        self._accumulation = accumulation
        self._device = next(module.parameters()).device
        if self._device.type == "cpu":
            # Compiled on first use for minutes; a killed build leaves a lock that hangs later runs.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "gloo" if self._device.type == "cpu" else "nccl"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        optimizer = build_adamw(module, optim)
        self._engine, *_ = deepspeed.initialize(
            model=_Autocasting(module, precision),
            optimizer=optimizer,
            config=deepspeed_config(
                zero_stage=zero_stage,
                precision=precision,
                clip_norm=optim.clip_norm,
                cells_micro=cells_micro,
                accumulation=accumulation,
            ),
        )
        self._engine.train()

    def step(self, batches: Sequence[CellBatch], *, lr: float) -> StepStats:
        """See :class:`cellray.train.engine.Engine`."""
        assert len(batches) == self._accumulation, "micro-batches differ from the configuration"
        set_learning_rate(self._engine.optimizer, lr)

        def backward(loss: torch.Tensor, last: bool) -> None:
            self._engine.set_gradient_accumulation_boundary(last)
            self._engine.backward(loss)
            self._engine.step()

        return step_losses(
            self._engine,
            self._objective,
            batches,
            device=self._device,
            precision="fp32",  # the wrapped module enters autocast itself
            backward=backward,
            scale=float(world_size() * self._accumulation),
        )

    def evaluate(self, batches: Iterable[CellBatch], *, counted: int | None = None) -> StepStats:
        """See :class:`cellray.train.engine.Engine`; at stage 3 ranks must have equally many."""
        return evaluate_batches(
            self._engine, self._objective, batches, precision="fp32", counted=counted
        )

    def save(self, folder: Path) -> None:
        """See :class:`cellray.train.engine.Engine`; every rank writes its own optimizer shard."""
        share_statistics(self.module)
        # The key lets DeepSpeed's universal format re-shard the state for other world sizes.
        client = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=client)
        if dist.get_rank() == 0:
            facts = {"world": world_size(), "zero_stage": self._stage}
            (folder / _FACTS).write_text(json.dumps(facts))

    def load(self, folder: Path) -> None:
        """See :class:`cellray.train.engine.Engine`.

        Raises:
            CheckpointError: the folder holds no DeepSpeed state, or one of another world size or
                ZeRO stage.
        """
        file = folder / _FACTS
        if not file.is_file():
            raise CheckpointError(
                f"no DeepSpeed state in '{folder}'; it was saved by another engine: set "
                "engine.name = 'torch', or start a new run from its weights with init_from"
            )
        facts = json.loads(file.read_text())
        now = {"world": world_size(), "zero_stage": self._stage}
        if facts != now:
            raise CheckpointError(
                f"the checkpoint was written by {facts['world']} workers at ZeRO stage "
                f"{facts['zero_stage']}, this run has {now['world']} at stage "
                f"{now['zero_stage']}; resume with the same scale.workers and engine.zero_stage, "
                "or start a new run from its weights with init_from"
            )
        self._engine.load_checkpoint(str(folder), tag=_TAG)

    def weights(self) -> dict[str, torch.Tensor]:
        """See :class:`cellray.train.engine.Engine`; gathers shards parameter by parameter."""
        share_statistics(self.module)
        result: dict[str, torch.Tensor] = {}
        parameters: Mapping[str, nn.Parameter] = dict(
            self.module.named_parameters(remove_duplicate=False)
        )
        for name, value in self.module.state_dict().items():
            whole = _whole(parameters[name]) if name in parameters else value
            dtype = torch.float32 if whole.is_floating_point() else None
            result[name] = whole.detach().to("cpu", dtype).clone()
        return result


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's full values; collective at stage 3, where also frozen ones are sharded."""
    full: torch.Tensor | None = safe_get_full_fp32_param(parameter)
    if full is None and hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            full = parameter.detach().clone()
    return parameter if full is None else full
