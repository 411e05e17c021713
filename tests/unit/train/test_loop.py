"""The loop's parts that need no Ray: prefetching and micro-batches."""

import numpy as np
import pytest
import torch

from cellray.core.blocks import TokenBlock
from cellray.train.engine import StepStats
from cellray.train.feed import prefetch
from cellray.train.loop import _Window
from cellray.train.meter import WorkCounter
from cellray.train.microbatch import Collator


def test_prefetch_keeps_order_and_content():
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))
    assert list(prefetch([])) == []


def test_an_error_in_the_source_surfaces_after_what_came_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("the store went away")

    ahead = prefetch(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="the store went away"):
        next(ahead)


def test_stopping_early_ends_the_thread():
    taken = []

    def items():
        for i in range(10_000):
            taken.append(i)
            yield i

    for item in prefetch(items(), depth=2):
        if item == 5:
            break
    assert len(taken) < 20


class _Count:
    """An objective that hides nothing and remembers what it was given."""

    def __init__(self):
        self.seen = []

    def corrupt(self, batch, draw):
        self.seen.append((batch.cell_ids.tolist(), draw.epoch))
        return batch

    def loss(self, output, batch):
        raise AssertionError("not used")


def five_cells() -> TokenBlock:
    return TokenBlock(
        joinids=np.arange(5) + 10,
        indptr=np.array([0, 1, 3, 3, 4, 6]),
        tokens=np.arange(6, dtype=np.int32),
        values=np.arange(6, dtype=np.float32),
    )


def test_micro_batches_take_cells_and_codes_by_length_and_equal_ones_in_order():
    objective = _Count()
    collator = Collator(objective, pad=9, cells_micro=2, seed=0)
    batches = collator(five_cells(), {"label": np.array([4, 3, 2, 1, 0])}, epoch=3, step=8)
    assert objective.seen == [([12, 10], 3), ([13, 11], 3), ([14], 3)]
    assert [b.token_ids.tolist() for b in batches] == [
        [[9], [0]],
        [[3, 9], [1, 2]],
        [[4, 5]],
    ]
    assert [b.covariates["label"].tolist() for b in batches] == [[2, 4], [1, 3], [0]]
    assert {b.step for b in batches} == {8}


def test_packed_micro_batches_hold_the_same_cells_end_to_end():
    collator = Collator(_Count(), pad=9, cells_micro=2, seed=0, packed=True)
    batches = collator(five_cells(), {}, epoch=3, step=8)
    assert [b.token_ids.tolist() for b in batches] == [[9, 0], [3, 1, 2], [4, 5]]
    assert [b.packing.cu_lengths.tolist() for b in batches] == [[0, 1, 2], [0, 1, 3], [0, 2]]


@pytest.mark.parametrize(("packed", "expected"), [(False, 1 / 8), (True, 0.0)])
def test_the_padding_fraction_of_a_report_is_slots_without_a_token(packed, expected):
    window = _Window()
    batches = Collator(_Count(), pad=9, cells_micro=2, seed=0, packed=packed)(
        five_cells(), {}, epoch=0
    )
    counter = WorkCounter(None, torch.device("cpu"))
    window.add(counter.of(batches), StepStats(1.0, 1), 0.0)
    metrics = window.metrics(counter)
    assert metrics["tokens"] == 7  # six, and the pad token of the cell without tokens
    assert metrics["padding_fraction"] == pytest.approx(expected)
