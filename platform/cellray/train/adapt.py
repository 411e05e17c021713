"""Which weights a fine-tuning run trains: all, the last layers, low-rank factors, or the head.

No rule here knows a family. One pass over a few cells shows in which order modules run and which
weights the loss reaches; a block is what has the class attribute ``recomputable``
(:mod:`cellray.nn.recompute`); the last blocks are the last that ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cellray.core.batch import CellBatch
from cellray.core.errors import ConfigError
from cellray.nn.lora import add_factors
from cellray.objectives.base import Objective
from cellray.train.config import AdaptSection
from cellray.train.statistics import KeptStatistics

__all__ = [
    "PARAMETERS_FILE",
    "Adapted",
    "adapt_model",
    "check_adapt",
    "count_parameters",
    "hold_in_eval",
]

PARAMETERS_FILE = "parameters.json"  # of the run directory: Adapted.counts
_HEAD = "head"


@dataclass(frozen=True)
class Adapted:
    """What :func:`adapt_model` has done.

    Attributes:
        unreached: parameters that the loss does not reach (e.g. of a pretraining decoder).
        counts: see :func:`count_parameters`.
    """

    unreached: list[str]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class _Walk:
    """One pass: module name -> place in the order of first calls, and parameters reached."""

    order: Mapping[str, int]
    reached: frozenset[str]

    def ran(self, model: nn.Module, name: str) -> bool:
        """Whether a module ran, and the loss depends on one of its parameters."""
        prefix = f"{name}."
        own = model.get_submodule(name).named_parameters()
        return name in self.order and any(prefix + n in self.reached for n, _ in own)


def _walk(model: nn.Module, objective: Objective, batch: CellBatch) -> _Walk:
    """Pass a batch through and back; gradients are cleared, running statistics put back."""
    order: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            order.setdefault(name, len(order))

        return hook

    statistics = KeptStatistics(model)
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        objective.loss(model(batch), batch).total.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    named = list(model.named_parameters())
    reached = frozenset(name for name, p in named if p.grad is not None)
    for _, parameter in named:
        parameter.grad = None
    statistics.put_back()
    return _Walk(order, reached)


def _is_block(module: nn.Module) -> bool:
    return bool(getattr(type(module), "recomputable", False))


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if name and _is_block(module)]


def _linears(model: nn.Module, blocks: Iterable[str]) -> list[str]:
    """Linear layers of blocks, by name."""
    return [
        f"{block}.{name}"
        for block in blocks
        for name, module in model.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear)
    ]


def _targets(model: nn.Module, blocks: Iterable[str], wanted: list[str]) -> list[str]:
    """The linear layers that get factors.

    Raises:
        ConfigError: a wanted name fits none.
    """
    linears = _linears(model, blocks)
    chosen = [n for n in linears if not wanted or any(f".{n}".endswith(f".{w}") for w in wanted)]
    idle = [w for w in wanted if not any(f".{n}".endswith(f".{w}") for n in linears)]
    if idle:
        ends = sorted(
            {name.rpartition(".blocks.")[2].partition(".")[2] or name for name in linears}
        )
        raise ConfigError(
            f"adapt.targets: no linear layer of a block is called '{idle[0]}'; there are: "
            f"{', '.join(ends)}"
        )
    return chosen


def check_adapt(model: nn.Module, adapt: AdaptSection) -> None:
    """Refuse what does not fit a model; it may be on ``meta``.

    Raises:
        ConfigError: no head to be trained alone, no blocks, fewer than are to be trained, or
            targets that it does not have.
    """
    if adapt.mode == "probe" and _HEAD not in dict(model.named_children()):
        raise ConfigError(
            "adapt.mode = 'probe' trains a classifier's head alone, and what this task learns has "
            "none; use 'full', 'last_layers' or 'lora'"
        )
    if adapt.mode not in ("last_layers", "lora"):
        return
    blocks = _blocks(model)
    if not blocks:
        raise ConfigError(
            f"adapt.mode = '{adapt.mode}' needs a model of blocks (modules with the class "
            "attribute recomputable = True), and this one has none; use 'full' or 'probe'"
        )
    if adapt.mode == "lora":
        _targets(model, blocks, adapt.targets)
    elif adapt.last_layers > len(blocks):
        raise _too_many(adapt.last_layers, len(blocks))


def _too_many(wanted: int, there: int) -> ConfigError:
    return ConfigError(
        f"adapt.last_layers = {wanted}, but the loss goes through {there} blocks at most; "
        f"give 1 to {there}, or adapt.mode = 'full'"
    )


def hold_in_eval(module: nn.Module) -> None:
    """Keep a module in eval mode whatever its parents are set to."""
    module.eval()

    def stay(mode: bool = True) -> nn.Module:
        return module

    module.train = stay  # type: ignore[method-assign]


def _hold_statistics(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            hold_in_eval(norm)


def _body(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in model.named_children() if name != _HEAD]


def _freeze(model: nn.Module, kept: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        if not kept(name):
            parameter.requires_grad_(False)


def _train_last(model: nn.Module, walk: _Walk, num_blocks: int) -> None:
    """Train the last blocks that ran and what ran after them; hold what ran before."""
    ran = sorted((n for n in _blocks(model) if walk.ran(model, n)), key=lambda n: walk.order[n])
    if num_blocks > len(ran):
        raise _too_many(num_blocks, len(ran))
    first = walk.order[ran[-num_blocks]]
    _freeze(model, lambda name: walk.order.get(name.rpartition(".")[0], -1) >= first)
    for name, module in model.named_modules():
        trained = any(p.requires_grad for p in module.parameters())
        inside = any(walk.order.get(f"{name}.{n}", -1) >= first for n, _ in module.named_modules())
        if walk.order.get(name, first) < first and not trained and not inside:
            hold_in_eval(module)


def _train_factors(model: nn.Module, walk: _Walk, adapt: AdaptSection, seed: int) -> None:
    _freeze(model, lambda name: name.startswith(f"{_HEAD}."))
    blocks = [name for name in _blocks(model) if walk.ran(model, name)]
    generator = torch.Generator().manual_seed(seed)
    for name in _targets(model, blocks, adapt.targets):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        add_factors(
            layer,
            rank=adapt.rank,
            alpha=adapt.alpha,
            dropout=adapt.dropout,
            generator=generator,
        )
    for _, child in _body(model):
        _hold_statistics(child)


def adapt_model(
    model: nn.Module, adapt: AdaptSection, objective: Objective, batch: CellBatch, *, seed: int
) -> Adapted:
    """Freeze what is not trained, and add what is trained beside it; in place.

    Every rank does the same to the same weights. Outputs stay as they were, to the bit.

    Args:
        model: a backbone with a classifier called ``head``, on the CPU, with its weights.
        adapt: the section.
        objective: of the run.
        batch: corrupted cells, with every category of every covariate among them.
        seed: of the factors.

    Raises:
        ConfigError: as in :func:`check_adapt`.
    """
    check_adapt(model, adapt)
    total = count_parameters(model)
    walk = _walk(model, objective, batch)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    unreached = [name for name in trainable if name not in walk.reached]
    _freeze(model, lambda name: name in walk.reached)
    if adapt.mode == "last_layers":
        _train_last(model, walk, adapt.last_layers)
    elif adapt.mode == "lora":
        _train_factors(model, walk, adapt, seed)
    elif adapt.mode == "probe":
        _freeze(model, lambda name: name.startswith(f"{_HEAD}."))
        for _, child in _body(model):
            hold_in_eval(child)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapted(unreached, {**total, "n_params_trainable": trained})


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Values of parameters, tied ones once.

    Returns:
        ``n_params_total``, ``n_params_trainable`` (those that take a gradient), and
        ``n_params_nonembedding`` (those outside of tables that are looked up by a code).
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = list(model.parameters())
    return {
        "n_params_total": sum(p.numel() for p in parameters),
        "n_params_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "n_params_nonembedding": sum(p.numel() for p in parameters if id(p) not in tables),
    }
