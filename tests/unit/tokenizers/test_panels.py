"""Tokenizers of fixed panels: golden values by hand, and what does not depend on what."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cellray.core.blocks import CellBlock
from cellray.core.draw import Draw
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.testing import random_block

GENES = 6


def vocab_for(name: str, genes: int = GENES) -> Vocab:
    ids = [f"G{i}" for i in range(genes)]
    return Vocab.from_genes(ids, ids, specials=tokenizer_unit(name).specials)


def one_cell(counts: dict[int, float], library: float | None = None) -> CellBlock:
    genes = np.array(sorted(counts), dtype=np.int32)
    values = np.array([counts[g] for g in genes], dtype=np.float32)
    return CellBlock(
        joinids=np.array([11]),
        indptr=np.array([0, len(genes)]),
        genes=genes,
        counts=values,
        library_sizes=np.array([values.sum() if library is None else library], dtype=np.float32),
    )


def test_log2_bins_by_hand():
    # total 10,000: the scaled value is the count itself
    block = one_cell({0: 1, 1: 2, 2: 3, 3: 7, 4: 60, 5: 9927})
    tokens = make_tokenizer({"name": "panel"}, vocab_for("panel"))(block, Draw(0))
    # log2(1 + x): 1, 1.58, 2, 3, 5.93 -> 5 (highest), 13.3 -> 5
    assert tokens.values.tolist() == [1, 1, 2, 3, 5, 5]
    assert tokens.tokens.tolist() == [1, 2, 3, 4, 5, 6]  # 0 is <pad>


def test_values_below_one_count_in_ten_thousand_are_no_token():
    block = one_cell({0: 1, 1: 29_999})  # 0.33 of 10,000: log2(1.33) = 0.41
    tokens = make_tokenizer({"name": "panel"}, vocab_for("panel"))(block, Draw(0))
    assert tokens.tokens.tolist() == [2]
    assert tokens.values.tolist() == [5]


def test_a_panel_is_scaled_by_its_own_genes_unless_told_otherwise():
    block = one_cell({0: 1, 1: 1}, library=40_000)  # most counts are on genes outside
    own = make_tokenizer({"name": "panel"}, vocab_for("panel"))(block, Draw(0))
    every = make_tokenizer({"name": "panel", "library": "all"}, vocab_for("panel"))(block, Draw(0))
    assert own.values.tolist() == [5, 5]
    assert every.values.tolist() == []


def test_log_normalised_values_by_hand():
    block = one_cell({0: 1, 3: 3}, library=8)
    tokens = make_tokenizer({"name": "lognorm"}, vocab_for("lognorm"))(block, Draw(0))
    np.testing.assert_allclose(tokens.values, np.log1p([1250.0, 3750.0]), rtol=1e-6)
    panel = make_tokenizer({"name": "lognorm", "library": "panel"}, vocab_for("lognorm"))
    np.testing.assert_allclose(panel(block, Draw(0)).values, np.log1p([2500.0, 7500.0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("target", "want"), [("f1", 3.0), ("f10", 4.0), ("a2", 5.0), ("t4.5", 4.5)]
)
def test_depth_tokens_stand_behind_the_genes(target, want):
    block = one_cell({0: 400, 2: 600})
    vocab = vocab_for("depth")
    tokens = make_tokenizer({"name": "depth", "target_depth": target}, vocab)(block, Draw(0))
    assert tokens.tokens.tolist() == [3, 5, vocab.special("<T>"), vocab.special("<S>")]
    np.testing.assert_allclose(tokens.values[:2], np.log1p([4000.0, 6000.0]), rtol=1e-6)
    np.testing.assert_allclose(tokens.values[2:], [want, 3.0], rtol=1e-6)


def test_depth_tokens_that_are_not_above_zero_are_left_out():
    vocab = vocab_for("depth")
    tokens = make_tokenizer({"name": "depth"}, vocab)(one_cell({4: 1}), Draw(0))
    assert tokens.tokens.tolist() == [7]  # log10(1) = 0: neither T nor S
    wanted = make_tokenizer({"name": "depth", "target_depth": "t4"}, vocab)(
        one_cell({4: 1}), Draw(0)
    )
    assert wanted.tokens.tolist() == [7, vocab.special("<T>")]


def test_bulk_samples_take_the_sum_of_their_log_values():
    block = one_cell({0: 400, 2: 600})
    tokens = make_tokenizer({"name": "depth", "bulk": True}, vocab_for("depth"))(block, Draw(0))
    want = np.log10(np.log1p(4000.0) + np.log1p(6000.0))
    np.testing.assert_allclose(tokens.values[2:], [want, want], rtol=1e-6)


def test_bad_target_depths_are_refused():
    for text in ("5", "x4", "f0", "f0.0", "t0", "t-1"):
        with pytest.raises(ConfigError, match=f"target_depth = '{text}': write t, f or a"):
            build_section(tokenizer_unit("depth").config, {"target_depth": text})


@pytest.mark.parametrize("name", ["panel", "lognorm", "depth", "bins", "rank"])
def test_cells_without_genes_and_blocks_without_cells(name):
    vocab = vocab_for(name)
    if tokenizer_unit(name).needs_medians:
        vocab = vocab.with_medians(np.ones(GENES, dtype=np.float32))
    tokenizer = make_tokenizer({"name": name}, vocab)
    empty = random_block(2, num_genes=GENES, genes_per_cell=0, seed=0)
    lengths = np.diff(tokenizer(empty, Draw(0)).indptr)
    assert lengths.tolist() == ([1, 1] if name == "bins" else [0, 0])
    assert len(tokenizer(empty.take(np.array([], dtype=np.int64)), Draw(0))) == 0


@pytest.mark.parametrize(("name", "extra"), [("panel", 0), ("lognorm", 0), ("depth", 2)])
def test_long_cells_keep_a_keyed_sample_that_no_cut_changes(name, extra):
    vocab = vocab_for(name, 200)
    block = random_block(9, num_genes=200, genes_per_cell=90, seed=2)
    config = {"name": name, "max_tokens": 40}
    tokenizer = make_tokenizer(config, vocab)
    whole = tokenizer(block, Draw(3))
    assert np.diff(whole.indptr).max() == 40
    full = make_tokenizer({"name": name}, vocab)(block, Draw(3))
    for row in range(9):
        part = tokenizer(block.take(np.array([row])), Draw(3))
        assert np.array_equal(part.tokens, whole.take(np.array([row])).tokens)
        here = dict(zip(part.tokens.tolist(), part.values.tolist(), strict=True))
        every = full.take(np.array([row]))
        values = dict(zip(every.tokens.tolist(), every.values.tolist(), strict=True))
        assert all(values[token] == value for token, value in here.items())
        assert np.array_equal(np.sort(part.tokens[: 40 - extra]), part.tokens[: 40 - extra])
    other = tokenizer(block, Draw(3, epoch=1))
    assert not np.array_equal(other.tokens, whole.tokens)


def test_a_library_size_of_zero_is_refused():
    block = replace(one_cell({0: 2}), library_sizes=np.zeros(1, dtype=np.float32))
    with pytest.raises(DataError, match="library size of 0.0"):
        make_tokenizer({"name": "lognorm"}, vocab_for("lognorm"))(block, Draw(0))


def test_bins_with_zeros_give_every_gene_in_vocabulary_order():
    vocab = vocab_for("bins", 30)
    block = random_block(4, num_genes=30, genes_per_cell=12, seed=1)
    plain = make_tokenizer({"name": "bins"}, vocab)(block, Draw(0))
    tokens = make_tokenizer({"name": "bins", "include_zeros": True}, vocab)(block, Draw(0))
    assert np.diff(tokens.indptr).tolist() == [31] * 4
    for row in range(4):
        one = tokens.take(np.array([row]))
        assert np.array_equal(one.tokens[1:], vocab.gene_tokens)
        few = plain.take(np.array([row]))
        values = dict(zip(few.tokens.tolist(), few.values.tolist(), strict=True))
        assert one.values.tolist() == [values.get(t, 0.0) for t in one.tokens.tolist()]
    cut = make_tokenizer({"name": "bins", "include_zeros": True, "max_tokens": 11}, vocab)
    sampled = cut(block, Draw(0))
    assert np.diff(sampled.indptr).tolist() == [11] * 4
    assert len({tuple(sampled.take(np.array([r])).tokens.tolist()) for r in range(4)}) == 4
