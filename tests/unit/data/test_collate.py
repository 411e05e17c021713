"""Padding and packing: shapes, masks, empty cells, narrow types."""

import numpy as np
import pytest
import torch

from cellray.core.batch import CellBatch, pack, unpack
from cellray.core.blocks import TokenBlock
from cellray.core.packing import Packing
from cellray.data.collate import collate_packed, collate_tokens


def test_cells_are_padded_to_the_longest():
    block = TokenBlock(
        joinids=np.array([7, 8, 9]),
        indptr=np.array([0, 1, 4, 4]),
        tokens=np.array([5, 6, 7, 8], dtype=np.int32),
        values=np.array([0.5, 1, 2, 3], dtype=np.float32),
    )
    batch = collate_tokens(block, pad=1, covariates={"label": np.array([2, 0, 1])}, step=4)
    assert batch.token_ids.tolist() == [[5, 1, 1], [6, 7, 8], [1, 1, 1]]
    assert batch.values.tolist() == [[0.5, 0, 0], [1, 2, 3], [0, 0, 0]]
    # the empty cell attends one pad token, so that attention stays defined
    assert batch.attention_mask.tolist() == [
        [True, False, False],
        [True, True, True],
        [True, False, False],
    ]
    assert batch.cell_ids.tolist() == [7, 8, 9]
    assert batch.covariates["label"].tolist() == [2, 0, 1]
    assert batch.step == 4
    assert batch.num_targets == 0


def test_a_block_of_empty_cells():
    empty = np.zeros(0)
    block = TokenBlock(
        np.array([3]), np.array([0, 0]), empty.astype(np.int32), empty.astype(np.float32)
    )
    batch = collate_tokens(block, pad=0)
    assert batch.token_ids.tolist() == [[0]]
    assert batch.attention_mask.tolist() == [[True]]


def ragged(seed: int, lengths: list[int], tokens=np.int32, values=np.float32) -> TokenBlock:
    rng = np.random.default_rng(seed)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids, numbers = rng.integers(2, 90, indptr[-1]), rng.integers(0, 50, indptr[-1])
    return TokenBlock(np.arange(len(lengths)), indptr, ids.astype(tokens), numbers.astype(values))


def assert_same(one: CellBatch, two: CellBatch) -> None:
    for name in ("cell_ids", "token_ids", "values", "attention_mask"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=0)
    assert (one.packing is None) == (two.packing is None)
    if one.packing is not None:
        assert one.packing.cu_lengths.tolist() == two.packing.cu_lengths.tolist()
        assert one.packing.max_length == two.packing.max_length


LENGTHS = [[3, 0, 7, 1, 1, 12], [0], [0, 0], [5, 5], [1]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_pack_and_unpack_are_inverse_and_equal_to_collating(lengths):
    block = ragged(0, lengths)
    codes = {"label": np.arange(len(lengths))}
    padded = collate_tokens(block, pad=1, covariates=codes, step=3)
    packed = collate_packed(block, pad=1, covariates=codes, step=3)
    assert_same(pack(padded), packed)
    assert_same(unpack(packed, pad=1), padded)
    assert packed.covariates["label"].tolist() == codes["label"].tolist()
    assert packed.step == 3
    assert packed.num_real_tokens == padded.num_real_tokens == packed.attention_mask.numel()
    assert packed.longest == padded.longest
    assert packed.packing.cu_lengths.dtype == torch.int32
    assert unpack(padded, pad=1) is padded
    assert pack(packed) is packed


def test_positions_rows_and_groups_cover_every_token_once():
    packing = Packing.of(np.array([3, 1, 100, 3, 99]))
    assert packing.rows.tolist()[:5] == [0, 0, 0, 1, 2]
    assert packing.positions.tolist()[:5] == [0, 1, 2, 0, 0]
    assert packing.starts.tolist() == [0, 3, 4, 104, 107]
    taken = torch.cat([g.tokens_bt[g.real_bt] for g in packing.groups])
    assert sorted(taken.tolist()) == list(range(206))
    assert taken[packing.restore].tolist() == list(range(206))
    for group in packing.groups:
        lengths = group.real_bt.sum(1)
        assert int(lengths.max()) < 1.2 * int(lengths.min()) + 1


@pytest.mark.parametrize("collate", [collate_tokens, collate_packed])
@pytest.mark.parametrize("tokens", [np.uint16, np.int64])
@pytest.mark.parametrize("values", [np.uint8, np.float64])
def test_narrow_and_wide_types_give_the_same_batch(collate, tokens, values):
    batch = collate(ragged(1, [4, 0, 9], tokens, values), pad=1)
    assert (batch.token_ids.dtype, batch.values.dtype) == (torch.int64, torch.float32)
    assert_same(batch, collate(ragged(1, [4, 0, 9]), pad=1))


def test_taken_cells_are_in_the_asked_order():
    block = ragged(2, [2, 0, 3]).take(np.array([2, 0, 1]))
    assert block.joinids.tolist() == [2, 0, 1]
    assert block.indptr.tolist() == [0, 3, 5, 5]
    source = ragged(2, [2, 0, 3]).tokens.tolist()
    assert block.tokens.tolist() == source[2:] + source[:2]
