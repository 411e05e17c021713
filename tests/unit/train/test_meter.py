"""The work of a step, by hand."""

import numpy as np
import pytest
import torch

from cellray.core.blocks import TokenBlock
from cellray.data.collate import collate_packed, collate_tokens
from cellray.train.meter import StepWork, WorkCounter, memory_bytes

CPU = torch.device("cpu")


class _Model:
    """A model of which a cell of n tokens takes n squared operations."""

    def read_lengths(self, batch):
        return batch.lengths().numpy().astype(np.int64)

    def training_flops(self, lengths_B, num_targets, *, cell_prompt=False):
        return float(np.square(lengths_B).sum())


def block():
    return TokenBlock(
        joinids=np.arange(2),
        indptr=np.array([0, 2, 5]),
        tokens=np.arange(5, dtype=np.int32),
        values=np.zeros(5, dtype=np.float32),
    )


def test_real_tokens_count_as_needed_and_slots_as_executed():
    counter = WorkCounter(_Model(), CPU, peak_flops=100.0, workers=2)
    work = counter.of([collate_tokens(block(), pad=9)])
    assert work == StepWork(cells=2, tokens=5, slots=6, flops=4 + 9, executed_flops=9 + 9)
    rates = counter.rates(work, 0.5)
    assert rates["mfu"] == pytest.approx(13 / 0.5 / 200)
    assert rates["hfu"] == pytest.approx(18 / 0.5 / 200)
    assert rates["tflops_per_s"] == pytest.approx(26e-12)


def test_packed_cells_execute_what_they_need_and_recomputed_blocks_a_third_more():
    counter = WorkCounter(_Model(), CPU, recomputed=True)
    work = counter.of([collate_packed(block(), pad=9)])
    assert (work.slots, work.flops) == (5, 13)
    assert work.executed_flops == pytest.approx(13 * 4 / 3)


def test_a_cpu_has_no_utilisation():
    counter = WorkCounter(_Model(), CPU)
    assert set(counter.rates(counter.of([]), 1.0)) == {"tflops_per_s"}
    assert memory_bytes(CPU) > 1e7


def test_the_counts_of_a_batch_are_kept_where_it_goes():
    batch = collate_tokens(block(), pad=9).to("meta")
    assert batch.num_real_tokens == 5  # nothing is asked of the other device
