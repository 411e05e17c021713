"""Value binning against hand-computed cells and a slow reference made of numpy.quantile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw
from cellray.core.errors import DataError
from cellray.data.vocab import Vocab
from cellray.testing import random_block
from cellray.tokenizers.bins import BIN_STREAM, SAMPLE_STREAM, TOKENIZER, BinsConfig

NUM_GENES = 60


def make_vocab(num_genes: int = NUM_GENES) -> Vocab:
    ids = [f"G{i}" for i in range(num_genes)]
    return Vocab.from_genes(ids, ids, specials=TOKENIZER.specials)


def make_block(cells: list[dict[int, float]]) -> CellBlock:
    lengths = [len(cell) for cell in cells]
    return CellBlock(
        joinids=np.arange(len(cells), dtype=np.int64) * 7 + 3,
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        genes=np.array([g for cell in cells for g in sorted(cell)], dtype=np.int32),
        counts=np.array([cell[g] for cell in cells for g in sorted(cell)], dtype=np.float32),
        library_sizes=np.array([sum(cell.values()) for cell in cells], dtype=np.float32),
    )


def bin_values(values: np.ndarray, u: np.ndarray, num_bins: int) -> np.ndarray:
    edges = np.quantile(values.astype(np.float64), np.linspace(0, 1, num_bins - 1))
    left = np.digitize(values, edges, right=False)
    right = np.digitize(values, edges, right=True)
    return np.ceil(u * (right - left) + left)


def reference(block: CellBlock, vocab: Vocab, config: BinsConfig, draw: Draw) -> TokenBlock:
    """One cell at a time, with numpy's own quantile, digitize and argsort."""
    tokens, values, indptr = [], [], [0]
    for i, joinid in enumerate(block.joinids):
        rows = slice(block.indptr[i], block.indptr[i + 1])
        ids, counts = vocab.gene_tokens[block.genes[rows]], block.counts[rows]
        bins = np.zeros(0)
        if len(ids):
            bins = bin_values(counts, draw.uniform(BIN_STREAM, joinid, ids), config.num_bins)
        if len(ids) > config.max_tokens - 1:
            hashes = draw.bits(SAMPLE_STREAM, joinid, ids)
            keep = np.sort(np.argsort(hashes)[: config.max_tokens - 1])
            ids, bins = ids[keep], bins[keep]
        tokens += [vocab.special("<cls>"), *ids.tolist()]
        values += [config.cls_value, *bins.tolist()]
        indptr.append(len(tokens))
    return TokenBlock(
        joinids=block.joinids,
        indptr=np.array(indptr),
        tokens=np.array(tokens, dtype=np.int32),
        values=np.array(values, dtype=np.float32),
    )


def assert_equal(got: TokenBlock, want: TokenBlock) -> None:
    for name in ("joinids", "indptr", "tokens", "values"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert got.tokens.dtype == np.int32
    assert got.values.dtype == np.float32


def test_hand_computed_cell_without_ties():
    # 3 bins: edges are the minimum and the maximum, 1 and 4. The minimum has no edge below it and
    # one at it (left 1, right 0): ceil(1 - u) = 1. 2 and 3 lie between: bin 1. The maximum has one
    # edge below and two at or below (left 2, right 1): ceil(2 - u) = 2.
    tokenizer = TOKENIZER.build(BinsConfig(num_bins=3), make_vocab())
    out = tokenizer(make_block([{0: 1, 5: 2, 6: 3, 9: 4}]), Draw(0))
    assert out.tokens.tolist() == [1, 3, 8, 9, 12]
    assert out.values.tolist() == [-2.0, 1.0, 1.0, 1.0, 2.0]


def test_hand_computed_cell_with_repeated_edges():
    # Counts 1 1 1 9 and 5 bins: edges at positions 0, 1, 2, 3 are 1, 1, 1, 9. A 1 has no edge below
    # and three at or below: ceil(3 - 3u). The 9 has three below and four at or below: 4.
    vocab = make_vocab()
    block, draw = make_block([{0: 1, 5: 1, 6: 1, 9: 9}]), Draw(4)
    u = draw.uniform(BIN_STREAM, block.joinids[0], vocab.gene_tokens[[0, 5, 6]])
    out = TOKENIZER.build(BinsConfig(num_bins=5, cls_value=0.0), vocab)(block, draw)
    assert out.values.tolist() == [0.0, *np.ceil(3 - 3 * u).tolist(), 4.0]


def test_ties_are_spread_over_their_bins():
    """A cell of ones alone draws every bin of 1..50 about equally often."""
    vocab = make_vocab(5_000)
    tokenizer = TOKENIZER.build(BinsConfig(max_tokens=5_001), vocab)
    values = tokenizer(make_block([dict.fromkeys(range(5_000), 1.0)]), Draw(0)).values[1:]
    times = np.bincount(values.astype(int), minlength=51)
    assert times[0] == 0
    assert len(times) == 51
    assert 50 < times[1:].min()
    assert times[1:].max() < 150


def test_a_cell_without_vocabulary_genes_is_cls_alone():
    out = TOKENIZER.build(BinsConfig(), make_vocab())(make_block([{}, {2: 1.0}]), Draw(0))
    assert out.indptr.tolist() == [0, 1, 3]
    assert out.tokens[0] == 1
    assert out.values[0] == -2.0


small_or_any = st.integers(1, 5).map(float) | st.integers(1, 2_000).map(float)
any_float = st.floats(0.001953125, 1e6, width=32)
cells = st.lists(
    st.dictionaries(st.integers(0, NUM_GENES - 1), small_or_any, max_size=NUM_GENES), max_size=6
) | st.lists(
    st.dictionaries(st.integers(0, NUM_GENES - 1), small_or_any | any_float, max_size=NUM_GENES),
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(cells, st.sampled_from([3, 5, 11, 51]), st.integers(2, 70), st.integers(0, 3))
def test_equals_the_slow_reference_bit_for_bit(given_cells, num_bins, max_tokens, epoch):
    vocab, block, draw = make_vocab(), make_block(given_cells), Draw(11, epoch)
    config = BinsConfig(num_bins=num_bins, max_tokens=max_tokens)
    got = TOKENIZER.build(config, vocab)(block, draw)
    assert_equal(got, reference(block, vocab, config, draw))


@pytest.mark.parametrize("kind", ["counts", "heavy", "log"])
def test_equals_the_slow_reference_on_long_cells(kind):
    rng = np.random.default_rng(5)
    num_genes = 6_000
    vocab = make_vocab(num_genes)
    cells = []
    for n in (1, 2, 50, 51, 99, 700, 1_199, 1_200, 5_500):
        counts = rng.geometric(0.4, n).astype(np.float64)
        if kind == "heavy":
            counts = np.floor(rng.pareto(0.7, n) + 1).clip(max=1e7)
        if kind == "log":
            counts = np.log1p(counts * 3.1)
        cells.append(
            dict(zip(rng.choice(num_genes, n, replace=False).tolist(), counts, strict=True))
        )
    block, draw = make_block(cells), Draw(1)
    got = TOKENIZER.build(BinsConfig(), vocab)(block, draw)
    assert_equal(got, reference(block, vocab, BinsConfig(), draw))
    assert np.diff(got.indptr).max() == 1_200


@settings(max_examples=30, deadline=None)
@given(cells, st.integers(2, 70))
def test_a_cell_is_tokenised_alike_in_any_block(given_cells, max_tokens):
    tokenizer = TOKENIZER.build(BinsConfig(max_tokens=max_tokens), make_vocab())
    block = make_block(given_cells)
    whole = tokenizer(block, Draw(2))
    for i in reversed(range(len(block))):
        alone = tokenizer(block.take(np.array([i])), Draw(2))
        rows = slice(whole.indptr[i], whole.indptr[i + 1])
        np.testing.assert_array_equal(alone.tokens, whole.tokens[rows])
        np.testing.assert_array_equal(alone.values, whole.values[rows])


def test_binning_comes_before_sampling_and_the_sample_changes_with_the_epoch():
    vocab = make_vocab(500)
    block = random_block(3, num_genes=500, genes_per_cell=400, seed=1)
    every = TOKENIZER.build(BinsConfig(max_tokens=401), vocab)(block, Draw(0, 1))
    some = TOKENIZER.build(BinsConfig(max_tokens=101), vocab)(block, Draw(0, 1))
    other = TOKENIZER.build(BinsConfig(max_tokens=101), vocab)(block, Draw(0, 2))
    for i in range(3):
        full = slice(every.indptr[i], every.indptr[i + 1])
        bins = dict(zip(every.tokens[full], every.values[full], strict=True))
        rows = slice(some.indptr[i], some.indptr[i + 1])
        assert [bins[t] for t in some.tokens[rows]] == some.values[rows].tolist()
        genes = some.tokens[rows][1:]
        assert (np.diff(genes) > 0).all()
        assert not np.array_equal(genes, other.tokens[rows][1:])


free_of_hits = st.lists(st.integers(1, 500), min_size=2, max_size=90).filter(
    lambda counts: (len(counts) - 1) % 7 != 0
)


@settings(max_examples=80, deadline=None)
@given(free_of_hits, st.integers(0, 99))
def test_log_normalising_first_would_not_change_the_bins(counts, seed):
    """Why there is no log1p switch: see the module, also for the cells left out here."""
    values = np.array(counts, dtype=np.float64)
    u = np.random.default_rng(seed).random(len(values))
    logged = np.log1p(values / values.sum() * 10_000)
    np.testing.assert_array_equal(bin_values(values, u, 51), bin_values(logged, u, 51))


def test_a_vocabulary_without_cls_is_refused():
    vocab = Vocab.from_genes(["A"], ["A"], specials=("<pad>",))
    with pytest.raises(DataError, match="no special token '<cls>'"):
        TOKENIZER.build(BinsConfig(), vocab)
