import numpy as np
import pytest

from cellray.core.errors import ConfigError
from cellray.data.digest import cell_hashes, content_digest, hash64
from cellray.data.split import hash_unit, split_by


def splitmix_int(x):
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def slow_hash64(text, salt=0):
    data = text.encode()
    state = splitmix_int(len(data) ^ splitmix_int(salt))
    for i in range(0, len(data), 8):
        state = splitmix_int(state ^ int.from_bytes(data[i : i + 8].ljust(8, b"\0"), "little"))
    return state


def test_hash64_equals_a_plain_python_implementation():
    texts = ["", "a", "donor", "ENSG00000141510", "x" * 40, "é\u4e2d", "12345678", "123456789"]
    assert hash64(texts).tolist() == [slow_hash64(t) for t in texts]
    assert hash64(texts, salt=5).tolist() == [slow_hash64(t, 5) for t in texts]


def test_hash64_does_not_depend_on_the_neighbours_or_the_container():
    alone = [int(hash64([t])[0]) for t in ("a", "long" * 30)]
    assert hash64(np.array(["a", "long" * 30], dtype=object)).tolist() == alone


def test_hash64_is_pinned():
    assert hash64(["a"]).tolist() == [17106707319094771287]
    assert len(hash64([])) == 0


def test_hash_unit_is_uniform():
    unit = hash_unit([f"donor{i}" for i in range(20_000)])
    assert unit.min() >= 0
    assert unit.max() < 1
    assert abs(unit.mean() - 0.5) < 0.01
    assert abs(unit.std() - 12**-0.5) < 0.01


def test_adding_cells_never_moves_old_ones():
    old = [f"cell{i}" for i in range(500)]
    before = split_by(old, fraction=0.3, salt=2)
    after = split_by([f"new{i}" for i in range(300)] + old, fraction=0.3, salt=2)
    assert (after[300:] == before).all()
    assert 100 < before.sum() < 200


def test_a_larger_fraction_only_adds():
    ids = [f"cell{i}" for i in range(500)]
    small, large = split_by(ids, fraction=0.1), split_by(ids, fraction=0.4)
    assert (small <= large).all()
    assert small.sum() < large.sum()


def test_groups_stay_whole_and_salts_differ():
    donors = np.array(["d1", "d2", "d3", "d4", "d5", "d6"] * 20)
    masks = [split_by(donors, fraction=0.5, salt=s) for s in range(8)]
    for mask in masks:
        for donor in set(donors):
            assert len(set(mask[donors == donor])) == 1
    assert len({m.tobytes() for m in masks}) > 1


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (1.0, 50)])
def test_extreme_fractions(fraction, expected):
    assert split_by([str(i) for i in range(50)], fraction=fraction).sum() == expected


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"split fraction {fraction} is not between 0 and 1"):
        split_by(["a"], fraction=fraction)


def test_cell_hash_ignores_gene_order_and_sees_every_change():
    genes = hash64(["g0", "g1", "g2"])
    indptr = np.array([0, 2, 2, 4])
    one = cell_hashes(indptr, np.array([0, 2, 0, 1]), np.array([5, 1, 5, 1], np.float32), genes)
    assert one[1] == 0
    assert one[0] != one[2]
    turned = cell_hashes(indptr, np.array([2, 0, 1, 0]), np.array([1, 5, 1, 5], np.float32), genes)
    assert (one == turned).all()
    swapped = cell_hashes(indptr, np.array([2, 0, 1, 0]), np.array([5, 1, 5, 1], np.float32), genes)
    assert swapped[0] != one[0]


def test_content_digest_ignores_cell_order_only():
    hashes = np.array([3, 1, 2], dtype=np.uint64)
    digest = content_digest(["a", "b", "c"], hashes)
    assert content_digest(["c", "a", "b"], hashes[[2, 0, 1]]) == digest
    assert content_digest(["a", "b", "c"], hashes[[0, 2, 1]]) != digest
    assert content_digest(["a", "b", "d"], hashes) != digest
    assert len(digest) == 64
