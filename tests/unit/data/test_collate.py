"""Padding: shapes, masks, empty cells."""

import numpy as np

from cellray.core.blocks import TokenBlock
from cellray.data.collate import collate_tokens


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
