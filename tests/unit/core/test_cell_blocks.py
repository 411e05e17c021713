"""Blocks keep rows and offsets together through selection and Arrow."""

import numpy as np
import pyarrow as pa

from cellray.core.blocks import CellBlock, TokenBlock, row_ids


def block() -> CellBlock:
    return CellBlock(
        joinids=np.array([10, 20, 30]),
        indptr=np.array([0, 2, 2, 5]),
        genes=np.array([1, 4, 0, 2, 3], dtype=np.int32),
        counts=np.array([5, 6, 7, 8, 9], dtype=np.float32),
        library_sizes=np.array([11, 0, 24], dtype=np.float32),
        obs={"type": np.array(["a", "b", "c"])},
    )


def test_row_ids():
    assert row_ids(np.array([0, 2, 2, 5])).tolist() == [0, 0, 2, 2, 2]


def test_take_permutes_and_repeats_rows():
    taken = block().take(np.array([2, 1, 0, 2]))
    assert taken.joinids.tolist() == [30, 20, 10, 30]
    assert taken.indptr.tolist() == [0, 3, 3, 5, 8]
    assert taken.genes.tolist() == [0, 2, 3, 1, 4, 0, 2, 3]
    assert taken.counts.tolist() == [7, 8, 9, 5, 6, 7, 8, 9]
    assert taken.library_sizes.tolist() == [24, 0, 11, 24]
    assert taken.obs["type"].tolist() == ["c", "b", "a", "c"]


def test_arrow_round_trip_of_a_slice_rebases_offsets():
    tokens = TokenBlock(
        joinids=np.array([1, 2, 3, 4]),
        indptr=np.array([0, 2, 2, 5, 6]),
        tokens=np.arange(6, dtype=np.int32),
        values=np.arange(6, dtype=np.float32) / 2,
    )
    part = TokenBlock.from_arrow(tokens.to_arrow().slice(1, 2))
    assert part.joinids.tolist() == [2, 3]
    assert part.indptr.tolist() == [0, 0, 3]
    assert part.tokens.tolist() == [2, 3, 4]
    assert part.values.tolist() == [1.0, 1.5, 2.0]


def test_arrow_chunks_are_joined():
    tokens = TokenBlock(
        np.array([1]), np.array([0, 2]), np.array([5, 6], dtype=np.int32), np.ones(2, np.float32)
    )
    both = pa.concat_tables([tokens.to_arrow(), tokens.to_arrow()])
    assert TokenBlock.from_arrow(both).tokens.tolist() == [5, 6, 5, 6]
    assert len(TokenBlock.from_arrow(both.slice(0, 0))) == 0
