"""The optimizer's state as named pieces of parameters, so that any engine can take it up.

Each rank writes the pieces it holds: of a parameter the flat values ``start .. start + n`` of its
moments. Which rank held which piece is a matter of the ZeRO stage and the number of workers that
wrote; a reader puts together whatever piece it wants from all files. So a run may go on with
another number of workers, at another stage, or with another engine.

Files: ``optimizer-RRRRR-of-WWWWW.safetensors`` with tensors ``NAME:START:KEY``, KEY one of
``exp_avg``, ``exp_avg_sq`` (flat, float32) and ``step`` (a number).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cellray.core.errors import CheckpointError

__all__ = [
    "MOMENTS",
    "Piece",
    "Shards",
    "optimizer_file",
    "pieces_state",
    "restore_pieces",
    "whole_parameters",
]

Tensor = torch.Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """Where the optimizer of this rank keeps a part of a parameter.

    Attributes:
        name: the parameter.
        start: its first value, in the flattened parameter.
        length: how many.
        flat: the tensor that the optimizer knows (a parameter, or a partition of many).
        offset: where the piece begins in ``flat``, flattened.
    """

    name: str
    start: int
    length: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's view of a tensor of ``flat``'s size."""
        return tensor.view(-1).narrow(0, self.offset, self.length)


def optimizer_file(rank: int, world: int) -> str:
    """Name of the file that a rank writes."""
    return f"optimizer-{rank:05d}-of-{world:05d}.safetensors"


def pieces_state(optimizer: torch.optim.Optimizer, pieces: Iterable[Piece]) -> dict[str, Tensor]:
    """Copies of the moments of pieces, in host memory; pieces never stepped have none."""
    found = {}
    for piece in pieces:
        state = optimizer.state.get(piece.flat) or {}
        if MOMENTS[0] not in state:
            continue
        prefix = f"{piece.name}:{piece.start}"
        for key in MOMENTS:
            found[f"{prefix}:{key}"] = piece.of(state[key]).detach().to("cpu", copy=True)
        found[f"{prefix}:step"] = torch.tensor(float(state["step"]))
    return found


def restore_pieces(
    optimizer: torch.optim.Optimizer, pieces: Sequence[Piece], saved: Shards
) -> None:
    """Fill the optimizer's state from what was saved.

    Raises:
        CheckpointError: a part of a piece was saved by no rank.
    """
    for piece in pieces:
        steps = saved.steps(piece.name)
        if not steps:
            continue  # never stepped
        state = optimizer.state[piece.flat]
        if MOMENTS[0] not in state:
            for key in MOMENTS:
                state[key] = torch.zeros_like(piece.flat.detach())
            state["step"] = _step_like(optimizer, piece.flat)
        for key in MOMENTS:
            piece.of(state[key]).copy_(saved.read(piece.name, piece.start, piece.length, key))
        if isinstance(state["step"], Tensor):
            state["step"].fill_(max(steps))
        else:
            state["step"] = int(max(steps))


def _step_like(optimizer: torch.optim.Optimizer, flat: Tensor) -> Any:
    """The count of steps as the optimizer keeps it."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return 0
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")


@dataclass(frozen=True)
class _Place:
    file: int
    start: int
    length: int


class Shards:
    """The saved pieces of all ranks, opened for reading; use as a context manager.

    Args:
        folder: the checkpoint's engine folder.

    Raises:
        CheckpointError: there is no optimizer state, or a file is torn.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._files: list[Any] = []
        self._places: dict[str, list[_Place]] = {}
        self._steps: dict[str, set[float]] = {}
        names = sorted(folder.glob("optimizer-*.safetensors"))
        if not names:
            raise CheckpointError(
                f"no optimizer state in '{folder}': it holds a model only; start a new run from "
                "its weights with init_from"
            )
        for file in names:
            try:
                opened = self._stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"'{file}' is torn: {error}") from error
            self._index(len(self._files), opened)
            self._files.append(opened)

    def _index(self, number: int, opened: Any) -> None:
        for key in opened.keys():
            name, start, kind = key.rsplit(":", 2)
            if kind == "step":
                self._steps.setdefault(name, set()).add(float(opened.get_tensor(key)))
            elif kind == MOMENTS[0]:
                length = int(opened.get_slice(key).get_shape()[0])
                place = _Place(number, int(start), length)
                self._places.setdefault(name, []).append(place)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def steps(self, name: str) -> set[float]:
        """Optimizer steps taken on a parameter; empty if none was."""
        return self._steps.get(name, set())

    def read(self, name: str, start: int, length: int, key: str) -> Tensor:
        """(length,) float32 values of a moment from ``start`` on.

        Raises:
            CheckpointError: some of them were saved by no rank.
        """
        out, covered = torch.empty(length), 0
        for place in self._places.get(name, []):
            first, last = max(start, place.start), min(start + length, place.start + place.length)
            if first >= last:
                continue
            saved = self._files[place.file].get_slice(f"{name}:{place.start}:{key}")
            out[first - start : last - start] = saved[first - place.start : last - place.start]
            covered += last - first
        if covered < length:
            raise CheckpointError(
                f"the saved optimizer state lacks {length - covered} of {length} values of "
                f"'{name}' ({key}); a file of the checkpoint is missing"
            )
        return out


def whole_parameters(named: Mapping[str, Tensor]) -> list[Piece]:
    """Pieces of an optimizer that knows the parameters themselves."""
    return [Piece(name, 0, p.numel(), p, 0) for name, p in named.items() if p.requires_grad]
