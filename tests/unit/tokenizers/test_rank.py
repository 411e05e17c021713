"""Rank-value encoding against a hand-computed cell and a slow, obvious reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.core.blocks import CellBlock, TokenBlock
from cellray.core.draw import Draw
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.tokenizers.rank import TOKENIZER, RankConfig

NUM_GENES = 40


def make_vocab(medians: list[float] | None = None, num_genes: int = NUM_GENES) -> Vocab:
    ids = [f"G{i}" for i in range(num_genes)]
    vocab = Vocab.from_genes(ids, ids, specials=TOKENIZER.specials)
    given = np.ones(num_genes) if medians is None else np.array(medians)
    return vocab.with_medians(given.astype(np.float32))


def make_block(
    cells: list[dict[int, float]], library_sizes: list[float] | None = None
) -> CellBlock:
    lengths = [len(cell) for cell in cells]
    sums = [sum(cell.values()) for cell in cells] if library_sizes is None else library_sizes
    return CellBlock(
        joinids=np.arange(len(cells), dtype=np.int64) + 100,
        indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        genes=np.array([g for cell in cells for g in sorted(cell)], dtype=np.int32),
        counts=np.array([cell[g] for cell in cells for g in sorted(cell)], dtype=np.float32),
        library_sizes=np.array(sums, dtype=np.float32),
    )


def cell(block: TokenBlock, i: int) -> tuple[list[int], list[float]]:
    rows = slice(block.indptr[i], block.indptr[i + 1])
    return block.tokens[rows].tolist(), block.values[rows].tolist()


def reference(block: CellBlock, vocab: Vocab, config: RankConfig) -> TokenBlock:
    """One cell at a time, sorted by Python with (descending float32 score, gene) as the key."""
    tokens: list[int] = []
    values: list[np.float32] = []
    indptr = [0]
    room = config.max_tokens - 2 * config.specials
    for i in range(len(block)):
        rows = slice(block.indptr[i], block.indptr[i + 1])
        scores = {
            int(g): np.float32(c) / vocab.medians[g]
            for g, c in zip(block.genes[rows], block.counts[rows], strict=True)
        }
        ranked = sorted(scores, key=lambda g, scores=scores: (-scores[g], g))[:room]
        scale = np.float32(0)
        if scores:
            scale = np.float32(10_000 / np.float64(block.library_sizes[i]))
        ids = [int(vocab.gene_tokens[g]) for g in ranked]
        norms = [scores[g] * scale for g in ranked]
        if config.specials:
            ids = [vocab.special("<cls>"), *ids, vocab.special("<eos>")]
            norms = [np.float32(0), *norms, np.float32(0)]
        tokens += ids
        values += norms
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


def test_hand_computed_cell():
    # Library 100 over all genes: count/100*10000/median: G0 2*100/4=50, G1 3*100/1=300,
    # G2 1*100/2=50 (a tie with G0, which stands first), G3 4*100/0.5=800.
    vocab = make_vocab([4, 1, 2, 0.5], num_genes=4)
    block = make_block([{0: 2, 1: 3, 2: 1, 3: 4}], library_sizes=[100])
    tokenizer = TOKENIZER.build(RankConfig(), vocab)
    tokens, values = cell(tokenizer(block, Draw(0)), 0)
    assert tokens == [7, 5, 4, 6]  # four specials come before the genes
    assert values == [800.0, 300.0, 50.0, 50.0]


def test_specials_stand_at_the_ends_and_count_inside_max_tokens():
    vocab = make_vocab([4, 1, 2, 0.5], num_genes=4)
    block = make_block([{0: 2, 1: 3, 2: 1, 3: 4}, {}], library_sizes=[100, 5])
    tokenizer = TOKENIZER.build(RankConfig(specials=True, max_tokens=4), vocab)
    out = tokenizer(block, Draw(0))
    assert cell(out, 0) == ([2, 7, 5, 3], [0.0, 800.0, 300.0, 0.0])
    assert cell(out, 1) == ([2, 3], [0.0, 0.0])


def test_a_cell_without_vocabulary_genes_gives_no_token():
    tokenizer = TOKENIZER.build(RankConfig(), make_vocab())
    out = tokenizer(make_block([{}, {1: 1.0}, {}], library_sizes=[0, 9, 3]), Draw(0))
    assert out.indptr.tolist() == [0, 0, 1, 1]


def test_an_empty_block_gives_an_empty_block():
    tokenizer = TOKENIZER.build(RankConfig(), make_vocab())
    out = tokenizer(make_block([]), Draw(0))
    assert len(out) == 0
    assert out.indptr.tolist() == [0]


def test_values_use_the_library_size_and_order_does_not():
    vocab = make_vocab()
    tokenizer = TOKENIZER.build(RankConfig(), vocab)
    block = make_block([{3: 5, 7: 9, 8: 1}])
    doubled = replace(block, library_sizes=block.library_sizes * 2)
    one, two = tokenizer(block, Draw(0)), tokenizer(doubled, Draw(0))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    np.testing.assert_array_equal(one.values, two.values * 2)


cells = st.lists(
    st.dictionaries(
        st.integers(0, NUM_GENES - 1),
        st.integers(1, 4).map(float) | st.floats(0.0078125, 1e6, width=32),
        max_size=NUM_GENES,
    ),
    max_size=8,
)
# Few distinct medians and small counts: many ties, also between different counts.
medians = st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=NUM_GENES, max_size=NUM_GENES)


@settings(max_examples=60, deadline=None)
@given(cells, medians, st.booleans(), st.integers(3, 45))
def test_equals_the_slow_reference_with_ties(given_cells, given_medians, specials, max_tokens):
    vocab = make_vocab(given_medians)
    config = RankConfig(specials=specials, max_tokens=max_tokens)
    block = make_block(given_cells)
    assert_equal(TOKENIZER.build(config, vocab)(block, Draw(0)), reference(block, vocab, config))


@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_equals_the_slow_reference_on_long_cells(spread):
    rng = np.random.default_rng(3)
    num_genes = 3_000
    vocab = make_vocab(rng.lognormal(0, spread, num_genes).tolist(), num_genes=num_genes)
    sizes = (2_900, 47, 48, 49, 50, 1_500)
    block = make_block(
        [
            dict.fromkeys(rng.choice(num_genes, n, replace=False).tolist(), 1.0) | {0: 7.0, 5: 7.0}
            for n in sizes
        ]
    )
    config = RankConfig(max_tokens=2_048)
    assert_equal(TOKENIZER.build(config, vocab)(block, Draw(0)), reference(block, vocab, config))


@settings(max_examples=30, deadline=None)
@given(cells, st.randoms(use_true_random=False))
def test_a_cell_is_tokenised_alike_in_any_block(given_cells, random):
    tokenizer = TOKENIZER.build(RankConfig(), make_vocab())
    block = make_block(given_cells)
    whole = tokenizer(block, Draw(0))
    order = list(range(len(block)))
    random.shuffle(order)
    for i in order:
        alone = tokenizer(block.take(np.array([i])), Draw(5, 2))
        assert cell(alone, 0) == cell(whole, i)


def test_read_only_arrays_are_accepted():
    block = make_block([{3: 5, 7: 9}])
    block.counts.setflags(write=False)
    block.genes.setflags(write=False)
    out = TOKENIZER.build(RankConfig(), make_vocab())(block, Draw(0))
    assert out.tokens.tolist() == [11, 7]


def test_a_vocabulary_without_medians_is_refused():
    ids = ["A"]
    vocab = Vocab.from_genes(ids, ids, specials=TOKENIZER.specials)
    with pytest.raises(DataError, match="needs corpus medians and the vocabulary has none"):
        TOKENIZER.build(RankConfig(), vocab)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_medians_must_be_above_zero(bad):
    with pytest.raises(DataError, match="1 medians of the vocabulary are not above 0.*'G1'"):
        TOKENIZER.build(RankConfig(), make_vocab([1, bad], num_genes=2))


def test_specials_must_be_in_the_vocabulary():
    vocab = Vocab.from_genes(["A"], ["A"], specials=("<pad>", "<mask>"))
    vocab = vocab.with_medians(np.ones(1, dtype=np.float32))
    TOKENIZER.build(RankConfig(), vocab)
    with pytest.raises(DataError, match="no special token '<cls>'"):
        TOKENIZER.build(RankConfig(specials=True), vocab)


def test_a_library_size_of_zero_is_refused():
    tokenizer = TOKENIZER.build(RankConfig(), make_vocab())
    block = make_block([{1: 2.0}, {1: 2.0}], library_sizes=[2, 0])
    with pytest.raises(DataError, match=r"cell 101 has counts but a library size of 0"):
        tokenizer(block, Draw(0))


def test_specials_need_room():
    with pytest.raises(ConfigError, match="max_tokens = 2 leaves no room for genes"):
        build_section(RankConfig, {"name": "rank", "max_tokens": 2, "specials": True})
