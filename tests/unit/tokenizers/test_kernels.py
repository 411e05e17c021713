"""The compiled hash is the house hash."""

from __future__ import annotations

import numpy as np

from cellray.core.draw import Draw, splitmix64
from cellray.tokenizers._kernels import _mix


def test_the_compiled_mix_is_splitmix64():
    numbers = np.random.default_rng(0).integers(0, 2**64, 200, dtype=np.uint64)
    assert [int(_mix(x)) for x in numbers] == splitmix64(numbers).tolist()


def test_cell_keys_are_the_first_half_of_bits():
    draw = Draw(3, 4)
    cells, positions = np.arange(5), np.array([9, 8, 7, 6, 5])
    half = draw.cell_keys("bins", cells) ^ splitmix64(positions.astype(np.uint64))
    np.testing.assert_array_equal(splitmix64(half), draw.bits("bins", cells, positions))
