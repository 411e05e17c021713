"""The sections that say how a run trains: batch, steps, engine, scale, checkpoints, tracking."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cellray.core.section import Section

__all__ = [
    "AdaptSection",
    "BatchSection",
    "CheckpointSection",
    "EngineSection",
    "OptimSection",
    "ScaleSection",
    "TrackingSection",
    "TrainSection",
]


class OptimSection(Section):
    """AdamW with linear warm-up and decay.

    Attributes:
        lr: peak learning rate.
        warmup_steps: steps from 0 to the peak.
        schedule: what follows: ``cosine`` or ``linear`` to ``final_lr_fraction``, or ``constant``.
        final_lr_fraction: last learning rate as a share of the peak.
        clip_norm: global gradient norm is clipped to it; 0 does not clip.
        weight_decay: decoupled; not applied to biases, norms and embeddings' 1-d parameters.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    clip_norm: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)


class AdaptSection(Section):
    """Which weights fine-tuning changes.

    What is not trained is held as in inference: without dropout (where no factors are trained in
    it), and with the batch norms' running statistics as they were.

    Attributes:
        mode: ``full``; ``last_layers``: the last transformer blocks and all that runs after them;
            ``lora``: low-rank factors beside the linear layers of every block, and the head; or
            ``probe``: the head alone. What the loss does not reach is trained in no mode.
        last_layers: blocks that ``last_layers`` trains.
        rank: of the factors of ``lora``.
        alpha: the factors' product is scaled by alpha / rank.
        dropout: on what the factors read, in training.
        targets: ends of the names of the layers that get factors (``attention.qkv``, ``expand``);
            [] takes every linear layer of a block: attention in and out, feed-forward.
    """

    mode: Literal["full", "last_layers", "lora", "probe"] = "full"
    last_layers: int = Field(default=1, ge=1)
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = []


class BatchSection(Section):
    """Cells per optimizer step and per forward pass.

    Attributes:
        cells_global: cells of one optimizer step over all workers.
        cells_micro: cells of one forward pass on one worker, at most; gradients accumulate over as
            many passes as the worker's cells take.
        tokens_micro: tokens of one forward pass, at most: padded slots where cells are padded; a
            cell that is longer alone has a pass of its own. Short cells then share a pass in
            greater number than long ones. 0 has no limit; ``auto`` measures at the start of the run
            how many fit into the worker's memory, and keeps to it when the run goes on.
        packing: ``padded`` fills cells up to the longest of their pass; ``packed`` lays them end to
            end and computes nothing on padding. Losses and gradients are equal up to rounding.
    """

    cells_global: int = Field(default=32, ge=1)
    cells_micro: int = Field(default=16, ge=1)
    tokens_micro: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    packing: Literal["padded", "packed"] = "padded"


class TrainSection(Section):
    """How long, in what precision, and how often to look.

    Attributes:
        steps: optimizer steps; 0 takes ``epochs``.
        epochs: passes over the training cells; used when ``steps`` is 0.
        precision: ``fp32`` or ``bf16`` (the loss stays float32).
        eval_every_steps: steps between validations; 0 validates at the end only.
        eval_cells: validation cells looked at, at most.
        log_every_steps: steps between reports.
        activation_checkpointing: keep only the input of every block for the backward pass, and
            compute the rest anew there: less memory, a third more computation, the same gradients.
        compile: compile the blocks with ``torch.compile`` (a C++ compiler is needed on CPUs; the
            first steps take longer).
        bad_steps: what happens to a step whose loss or gradient is not finite, or whose loss
            explodes: ``stop`` ends the run, ``skip`` leaves the step out and goes on. Either way
            the run directory's ``bad_steps`` gets the ids of its cells.
        explosion_factor: a loss above this many times the median of the last 50, and above twice
            the highest of the run's first 20, counts as exploded; 0 never.
        max_bad_steps: ``skip`` gives up after so many bad steps one after another.
        log_cells: write the ids of the cells of every step to the run directory's ``cells``.
        profile_steps: first and last step to record on rank 0 as a profiler trace in the run
            directory's ``profile``; [] records nothing.
    """

    steps: int = Field(default=0, ge=0)
    epochs: float = Field(default=0.0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_every_steps: int = Field(default=0, ge=0)
    eval_cells: int = Field(default=2048, ge=1)
    log_every_steps: int = Field(default=10, ge=1)
    activation_checkpointing: bool = False
    compile: bool = False
    bad_steps: Literal["stop", "skip"] = "stop"
    explosion_factor: float = Field(default=10.0, ge=0)
    max_bad_steps: int = Field(default=10, ge=1)
    log_cells: bool = False
    profile_steps: list[Annotated[int, Field(ge=1)]] = []

    @model_validator(mode="after")
    def _trace_has_two_ends(self) -> TrainSection:
        steps = self.profile_steps
        if steps and (len(steps) != 2 or steps[0] > steps[1]):
            raise ValueError(
                f"train.profile_steps = {steps}: give the first and the last step, e.g. [20, 24]"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(
                f"give either train.steps or train.epochs (given: steps = {self.steps}, "
                f"epochs = {self.epochs})"
            )
        return self


class EngineSection(Section):
    """What runs the step.

    Attributes:
        name: ``deepspeed``, or ``torch`` (plain AdamW, gradients all-reduced).
        zero_stage: DeepSpeed ZeRO stage, 0 to 3; ``torch`` has stage 0 only, its default.
        offload: what is kept in the host's memory instead of the GPU's: ``none``, ``optimizer``
            (its states, and the step on the CPU; stages 1 to 3) or ``parameters`` (these too;
            stage 3).
    """

    name: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = Field(default=1, ge=0, le=3)
    offload: Literal["none", "optimizer", "parameters"] = "none"

    @model_validator(mode="before")
    @classmethod
    def _stage_of_torch(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("name") == "torch":
            return {"zero_stage": 0, **raw}
        return raw

    @model_validator(mode="after")
    def _torch_is_not_sharded(self) -> EngineSection:
        if self.name == "torch" and self.zero_stage:
            raise ValueError(
                f"engine.zero_stage = {self.zero_stage} needs engine.name = 'deepspeed'; the torch "
                "engine keeps everything on every worker (zero_stage = 0)"
            )
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(
                f"engine.offload = '{self.offload}' needs engine.name = 'deepspeed' and "
                f"engine.zero_stage >= {least} (given: '{self.name}', stage {self.zero_stage})"
            )
        return self


class ScaleSection(Section):
    """How many workers with what each.

    Attributes:
        workers: Ray Train workers.
        min_workers: an elastic run: it goes on with as few as these when a node is lost, and takes
            workers back, up to ``workers``, when there is room again; 0 wants ``workers``, always.
        resize_interval_s: seconds between two looks for room for more workers.
        gpus_per_worker: GPUs each reserves (0 trains on CPU over gloo).
        cpus_per_worker: logical CPUs each reserves.
        tokenizer_actors: tokenisation actors per worker.
        cpus_per_actor: logical CPUs each of them reserves.
        max_failures: worker-group restarts from the last checkpoint before the run fails.
        threads_per_worker: torch threads of a CPU worker; 0 divides the machine's cores.
    """

    workers: int = Field(default=1, ge=1)
    min_workers: int = Field(default=0, ge=0)
    resize_interval_s: float = Field(default=60.0, gt=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    cpus_per_worker: float = Field(default=1.0, gt=0)
    tokenizer_actors: int = Field(default=1, ge=1)
    cpus_per_actor: float = Field(default=0.5, gt=0)
    max_failures: int = Field(default=2, ge=0)
    threads_per_worker: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _range_of_workers(self) -> ScaleSection:
        if self.min_workers > self.workers:
            raise ValueError(
                f"scale.min_workers = {self.min_workers} is more than scale.workers = "
                f"{self.workers}; min_workers is the fewest an elastic run goes on with"
            )
        return self


class CheckpointSection(Section):
    """Where runs live and when they are saved.

    Attributes:
        dir: folder that holds one run directory per run name.
        every_steps: steps between checkpoints; 0 saves at the end only.
        keep_last: checkpoints kept; the best one by validation loss is kept besides.
        background: go on training while a checkpoint is being written (what is written is first
            copied to the host's memory).
        resume: ``auto`` continues the run of this name where its last checkpoint stands;
            ``never`` moves an older run of this name aside and starts anew.
    """

    dir: str = "runs"
    every_steps: int = Field(default=0, ge=0)
    keep_last: int = Field(default=2, ge=1)
    background: bool = True
    resume: Literal["auto", "never"] = "auto"

    @field_validator("dir")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"checkpoint.dir = '{value}' is no folder: runs live in a folder that all workers "
                "see (a shared file system, a mounted bucket)"
            )
        return value


class TrackingSection(Section):
    """Where MLflow writes.

    Attributes:
        mlflow_uri: a server's URL or ``sqlite:///file``; "" is ``mlflow.db`` in
            ``checkpoint.dir``.
        experiment: MLflow experiment; "" is the job's name.
        enabled: False tracks nothing.
    """

    mlflow_uri: str = ""
    experiment: str = ""
    enabled: bool = True
