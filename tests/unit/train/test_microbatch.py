"""Micro-batches by cells and tokens, and the search for how many tokens fit."""

from itertools import pairwise

import numpy as np
import pytest

from cellray.core.blocks import TokenBlock
from cellray.train.microbatch import Collator, cut_points, most_tokens


def cuts(lengths, **over):
    facts = {"cells_micro": 100, "tokens_micro": 0, "packed": True} | over
    return cut_points(np.array(lengths, dtype=np.int64), **facts)


def test_cells_alone_count_without_a_limit_of_tokens():
    assert cuts([1, 2, 3, 4, 5], cells_micro=2) == [0, 2, 4, 5]
    assert cuts([]) == [0]


def test_packed_cells_count_their_tokens():
    assert cuts([1, 2, 3, 4, 5], tokens_micro=6) == [0, 3, 4, 5]
    assert cuts([1, 2, 3, 4, 5], tokens_micro=6, cells_micro=2) == [0, 2, 3, 4, 5]


def test_padded_cells_count_their_slots():
    # 2 cells of 2 slots, then 3 x 2 = 6, then one each
    assert cuts([1, 2, 3, 4, 5], tokens_micro=6, packed=False) == [0, 2, 3, 4, 5]
    assert cuts([2, 2, 2, 4], tokens_micro=6, packed=False) == [0, 3, 4]


def test_a_cell_longer_than_the_limit_is_alone():
    assert cuts([3, 9, 9], tokens_micro=4) == [0, 1, 2, 3]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_no_micro_batch_is_over_the_limits_and_none_could_take_the_next_cell(packed, seed):
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(1, 60, 200))
    ends = cuts(lengths, cells_micro=16, tokens_micro=150, packed=packed)
    assert ends[0] == 0
    assert ends[-1] == 200

    def size(part):
        return part.sum() if packed else len(part) * part.max()

    for start, stop in pairwise(ends):
        part = lengths[start:stop]
        assert len(part) <= 16
        assert len(part) == 1 or size(part) <= 150
        if stop < 200 and len(part) < 16:
            assert size(lengths[start : stop + 1]) > 150


def test_a_model_that_reads_a_panel_counts_the_panel():
    block = TokenBlock(
        joinids=np.arange(4),
        indptr=np.array([0, 1, 2, 3, 6]),
        tokens=np.arange(6, dtype=np.int32),
        values=np.zeros(6, dtype=np.float32),
    )

    class Nothing:
        def corrupt(self, batch, draw):
            return batch

    def sizes(**over):
        collator = Collator(Nothing(), pad=9, cells_micro=9, seed=0, tokens_micro=20, **over)
        return [len(batch) for batch in collator(block, {}, epoch=0)]

    assert sizes() == [4]
    assert sizes(fixed_length=8) == [2, 2]


def test_the_search_finds_what_fits():
    tried = []

    def measure(tokens):
        tried.append(tokens)
        return 1000.0 + 10 * tokens

    found = most_tokens(measure, 11_000, first=50, most=10_000)
    assert 900 <= found <= 1000
    assert measure(found) <= 11_000
    assert len(tried) <= 4


def test_the_search_gives_way_where_memory_grows_faster_than_it_seemed():
    def measure(tokens):
        return 10.0 * tokens + (5.0 * tokens if tokens > 400 else 0.0)

    found = most_tokens(measure, 8_000, first=50, most=10_000)
    assert found <= 533
    assert measure(found) <= 8_000


def test_the_search_keeps_to_one_cell_where_two_do_not_fit():
    assert most_tokens(lambda t: 10.0 * t, 150, first=10, most=64) == 10
    assert most_tokens(lambda t: float("inf") if t > 10 else 5.0, 100, first=10, most=64) == 10


def test_the_search_keeps_to_the_cells_of_a_step_and_to_what_does_not_fit_at_all():
    assert most_tokens(lambda t: float(t), 1e9, first=10, most=64) == 64
    assert most_tokens(lambda t: float("inf"), 1e9, first=10, most=64) == 10
