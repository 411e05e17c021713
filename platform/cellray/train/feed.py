"""Batches ahead of the model: collated in a thread, and on their way to the GPU beside its work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from cellray.core.batch import CellBatch

__all__ = ["DeviceCopy", "prefetch"]

T = TypeVar("T")


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """Run ``items`` in a thread, at most ``depth`` ahead; errors surface in the caller."""
    ready: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                ready.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:  # noqa: BLE001  handed to the consuming thread
            put((None, error, True))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error, done = ready.get()
            if error is not None:
                raise error
            if done:
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join(timeout=5)


class DeviceCopy:
    """Copies batches to a GPU on a stream of its own; on a CPU batches stay as they are.

    Called in the prefetching thread; :meth:`wait` in the one that computes.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, batches: Sequence[CellBatch]) -> tuple[list[CellBatch], Any]:
        """The batches on the device, and an event that says when they are there."""
        if self._stream is None:
            return list(batches), None
        with torch.cuda.stream(self._stream):
            moved = [batch.pinned().to(self._device) for batch in batches]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return moved, event

    def wait(self, batches: Sequence[CellBatch], event: Any) -> None:
        """Have the computing stream wait for a copy, and keep its memory until it has been read."""
        if event is None:
            return
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for batch in batches:
            for tensor in batch.tensors():
                tensor.record_stream(current)
