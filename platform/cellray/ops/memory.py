"""Memory of a worker by engine and ZeRO stage: weights, gradients, moments, buffers, activations.

Bytes for each of P parameters on W workers; b = min(1, 200 million / P) is the share of them that a
gradient bucket holds (on a GPU stages 1 and 2 fill a second one while the first is reduced):

    engine           held          gradients   while reducing    gathered for a pass
    torch, stage 0   4 + 8         4           4 if W > 1
    stage 1          4 + 12 / W    4           4 b
    stage 2          4 + 12 / W    4 / W       8 b
    stage 3          16 / W        4 / W       8 b               4
    stage 1, bf16    2 + 12 / W    4           8 b
    stage 2, bf16    2 + 12 / W    4 / W       4 b
    stage 3, bf16    14 / W        4 / W       4 b               2

Under bf16 torch and stage 0 keep float32 weights. On a GPU AdamW needs 4 bytes more for each moment
of a worker while it steps. Offloading takes masters, moments, and their gradients to the host (20
bytes for each parameter of a worker's share), offloading parameters the working weights too.

A worker needs what is held, and the larger of: activations, with the gradients that earlier passes
of the step have left; or gradients, and what reduces them or steps. The formulae are tested against
the growth of resident memory on one and two workers (``tests/unit/ops/test_planner_memory.py``; for
stages 1 to 3 they fit four as well). Of GPUs they say what follows from the same code; nothing of
it was measured there. Contexts,
communication buffers and fragments come on top: :data:`USABLE` of a card is planned with.
"""

from __future__ import annotations

from dataclasses import dataclass

from cellray.nn.activations import Activations

__all__ = ["USABLE", "States", "model_states", "peak_memory"]

_MOST_BUCKET = 200_000_000  # values of a gradient bucket at most, as train/deepspeed.py sets it
_MOST_LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered at most, DeepSpeed's default
USABLE = 0.9


@dataclass(frozen=True)
class States:
    """Bytes of a worker that do not depend on its batch.

    Attributes:
        held: from the first step to the last: weights, masters, moments.
        gathered: whole weights while a pass runs.
        gradients: kept between the passes of a step.
        reducing: beside all that, while gradients are reduced or the optimizer steps.
        host: in the host's memory instead.
    """

    held: float
    gathered: float
    gradients: float
    reducing: float
    host: float = 0.0


def model_states(
    num_parameters: float,
    *,
    engine: str,
    stage: int,
    workers: int,
    bf16: bool,
    offload: str = "none",
    on_gpu: bool = False,
) -> States:
    """What an engine keeps for a model; see the module for the formulae.

    Args:
        num_parameters: P, those that are trained.
        engine: ``torch`` or ``deepspeed``.
        stage: ZeRO stage, 0 to 3.
        workers: W.
        bf16: whether the run's precision is bf16.
        offload: ``none``, ``optimizer`` or ``parameters``.
        on_gpu: whether a card holds it.
    """
    values, share = num_parameters, 1 / workers
    if engine == "torch" or stage == 0:
        reducing = 4.0 if workers > 1 or on_gpu else 0.0
        return States(12 * values, 0.0, 4 * values, reducing * values)
    work = 2.0 if bf16 else 4.0
    bucket = min(values, _MOST_BUCKET)
    sharded = stage == 3
    held = work * (share if sharded else 1.0) + 12 * share
    gradients = 4.0 if stage == 1 else 4 * share
    reduced = {1: 4.0 + 4.0 * bf16, 2: 2 * work, 3: 2 * work}[stage] * bucket
    if on_gpu and not sharded:
        reduced += work * bucket
    reducing = max(reduced, 4 * share * values if on_gpu else 0.0)
    gathered = work * min(values, _MOST_LIVE) if sharded else 0.0
    host = 0.0
    if offload != "none":
        held -= 12 * share
        gradients = work if stage == 1 else work * share
        host = 20 * share * values
        reducing = reduced
    if offload == "parameters":
        held -= work * share
        host += work * share * values
    return States(held * values, gathered, gradients * values, reducing, host)


def peak_memory(states: States, activations: Activations, *, passes: int) -> float:
    """Bytes of a worker at the worst moment of a step.

    Args:
        states: of its engine.
        activations: of its largest micro-batch.
        passes: micro-batches of a step; with more than one, gradients wait for the next.
    """
    waiting = states.gradients if passes > 1 else 0.0
    in_pass = states.gathered + activations.total + waiting
    after = states.gathered + states.gradients + states.reducing
    return states.held + max(in_pass, after)
