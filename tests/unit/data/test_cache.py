"""The token cache: the same tokens as the store gives, refused when stale, mended when damaged."""

import logging
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from cellray.core.blocks import lay_out
from cellray.core.errors import DataError
from cellray.core.ids import cell_ids
from cellray.data.cache import TokenCache, cache_key, prepare_cache
from cellray.data.config import DataSection
from cellray.data.pipeline import cached_stream
from cellray.data.plan import EpochPlan
from cellray.data.tokens import TokenSource
from cellray.data.vocab import Vocab
from cellray.train.prepare import gene_map, select_cells

SPECIALS = ("<pad>", "<cls>", "<eoc>", "<eos>", "<mask>")


def source_of(uri, *, tokenizer=None, obs_filter="", seed=0):
    cells = select_cells(DataSection(uri=uri, obs_filter=obs_filter))
    var = cells.store.var()
    vocab = Vocab.from_genes(list(var["feature_id"]), list(var["feature_name"]), specials=SPECIALS)
    config = tokenizer or {"name": "bins", "max_tokens": 40}
    codes = {"parity": cells.joinids % 2}
    return TokenSource(
        cells.store, gene_map(cells.store, vocab), vocab, config, cells.joinids, codes, seed
    )


def cached(source, folder, *, cells_per_shard=50, write=True):
    key = cache_key(source, cells=source.joinids, fingerprint="f")
    prepare_cache(folder, key, source.joinids, cells_per_shard=cells_per_shard)
    source = replace(source, cache=str(folder))
    cache = TokenCache(folder, source)
    if write:
        for shard in cache.missing():
            cache.write(shard)
    return source, cache


def same(one, two):
    assert np.array_equal(one.joinids, two.joinids)
    assert np.array_equal(one.indptr, two.indptr)
    assert np.array_equal(one.tokens, two.tokens)
    assert np.array_equal(one.values, two.values)


def test_the_cache_gives_the_tokens_of_the_store_in_any_order(small_store, tmp_path):
    plain = source_of(small_store)
    source, cache = cached(plain, tmp_path / "c")
    assert cache.info.num_shards == 5
    ids = np.random.default_rng(0).permutation(plain.joinids)
    same(source.tokens(ids, epoch=3), plain.tokens(ids, epoch=0))


def test_tokens_are_stored_narrow(small_store, tmp_path):
    source, _ = cached(source_of(small_store), tmp_path / "c")
    block = source.tokens(source.joinids[:3], epoch=0)
    assert (block.tokens.dtype, block.values.dtype) == (np.uint16, np.int8)
    wide = {"name": "bins", "max_tokens": 40, "cls_value": 0.5}
    source, _ = cached(source_of(small_store, tokenizer=wide), tmp_path / "wide")
    block = source.tokens(source.joinids[:3], epoch=0)
    assert block.values.dtype == np.float32
    assert block.values[0] == 0.5


def test_a_cell_that_comes_again_keeps_its_own_id(small_store, tmp_path):
    source, _ = cached(source_of(small_store), tmp_path / "c")
    ids = cell_ids(np.array([7, 7]), repeats=np.array([0, 1]))
    block = source.tokens(ids, epoch=0)
    assert np.array_equal(block.joinids, ids)
    half = len(block.tokens) // 2
    assert np.array_equal(block.tokens[:half], block.tokens[half:])


def test_the_cached_stream_keeps_plan_order_covariates_and_resume(small_store, tmp_path):
    source, _ = cached(source_of(small_store), tmp_path / "c")
    plan = EpochPlan(
        source.joinids, None, seed=1, cells_global=24, lanes=8, run_cells=4, window_batches=4
    )
    steps = list(cached_stream(source, plan, first_step=0, last_step=15, rank=1, world=2))
    assert [s.step for s in steps] == list(range(15))
    assert [s.epoch for s in steps] == [0] * 10 + [1] * 5
    for step in steps:
        rows = plan.rows(step.epoch, step.step % 10, step.step % 10 + 1, rank=1, world=2)[0]
        assert np.array_equal(step.block.joinids, rows)
        assert np.array_equal(step.covariates["parity"], rows % 2)
    again = list(cached_stream(source, plan, first_step=7, last_step=15, rank=1, world=2))
    for one, two in zip(steps[7:], again, strict=True):
        same(one.block, two.block)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: replace(s, tokenizer={"name": "bins", "max_tokens": 41}), "tokenizer"),
        (lambda s: replace(s, joinids=s.joinids[1:]), "cells"),
        (lambda s: replace(s, vocab=s.vocab.with_medians(np.ones(len(s.vocab), "f4"))), "vocab"),
    ],
)
def test_a_stale_cache_is_refused_and_says_why(small_store, tmp_path, change, named):
    source, _ = cached(source_of(small_store), tmp_path / "c", write=False)
    with pytest.raises(DataError, match=f"is stale: it was written for another {named}"):
        cached(change(source), tmp_path / "c", write=False)


def test_another_seed_uses_the_same_cache(small_store, tmp_path):
    one, _ = cached(source_of(small_store), tmp_path / "c")
    two, _ = cached(source_of(small_store, seed=9), tmp_path / "c", write=False)
    same(one.tokens(one.joinids, epoch=0), two.tokens(two.joinids, epoch=1))


def test_a_folder_of_something_else_is_left_alone(small_store, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not a token cache and not empty \(notes.txt\)"):
        cached(source_of(small_store), tmp_path)


def damage_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def take_another(path):
    path.write_bytes(path.with_name("shard-00000.arrow").read_bytes())


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damage_a_bit, "its checksum is wrong"),
        (truncate, "it cannot be read"),
        (lambda p: p.unlink(), "it is gone"),
    ],
)
def test_a_damaged_shard_is_named_and_written_anew(small_store, tmp_path, caplog, harm, reason):
    source, cache = cached(source_of(small_store), tmp_path / "c")
    whole = cache.path(2).read_bytes()
    harm(cache.path(2))
    with caplog.at_level(logging.WARNING, logger="cellray"):
        block = TokenCache(cache.folder, source).tokens(source.joinids)
    assert "shard-00002.arrow' is damaged" in caplog.text
    assert reason in caplog.text
    same(block, replace(source, cache="").tokens(source.joinids, epoch=0))
    assert cache.path(2).read_bytes() == whole


@pytest.mark.parametrize("place", ["file/cache", "/proc/cache"])
def test_a_cache_that_cannot_be_written_says_so(small_store, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="token cache .* cannot be written"):
        cached(source_of(small_store), tmp_path / place)


def empty_file(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("harm", [damage_a_bit, truncate, empty_file, lambda path: path.unlink()])
def test_a_damaged_list_of_cells_is_named_and_written_anew(small_store, tmp_path, caplog, harm):
    plain = source_of(small_store)
    cached(plain, tmp_path / "c")
    harm(tmp_path / "c" / "cells.npy")
    with caplog.at_level(logging.WARNING):
        source, cache = cached(plain, tmp_path / "c", write=False)
    assert "cells.npy' is gone or damaged; it is written anew" in caplog.text
    assert not cache.missing()
    same(source.tokens(plain.joinids, epoch=0), plain.tokens(plain.joinids, epoch=0))


def test_no_cells_of_a_cache_are_an_empty_block(small_store, tmp_path):
    source, _ = cached(source_of(small_store), tmp_path / "c")
    assert len(source.tokens(np.zeros(0, dtype=np.int64), epoch=0)) == 0


def test_a_shard_in_anothers_place_is_noticed(small_store, tmp_path, caplog):
    source, cache = cached(source_of(small_store), tmp_path / "c")
    take_another(cache.path(3))
    block = TokenCache(cache.folder, source).tokens(source.joinids)
    same(block, replace(source, cache="").tokens(source.joinids, epoch=0))


def test_a_shard_of_another_cache_is_noticed(small_store, tmp_path, caplog):
    source, cache = cached(source_of(small_store), tmp_path / "c")
    other = {"name": "bins", "max_tokens": 12}
    _, theirs = cached(source_of(small_store, tokenizer=other), tmp_path / "d")
    cache.path(1).write_bytes(theirs.path(1).read_bytes())
    TokenCache(cache.folder, source).tokens(source.joinids)
    assert "shard-00001.arrow' is damaged (it belongs to another cache)" in caplog.text


def test_a_damaged_manifest_says_what_to_do(small_store, tmp_path):
    source, cache = cached(source_of(small_store), tmp_path / "c")
    (cache.folder / "cache.json").write_text("{")
    with pytest.raises(DataError, match="cache.json' is damaged .* remove the folder"):
        TokenCache(cache.folder, source)


def test_a_cell_outside_the_cache(small_store, tmp_path):
    _, cache = cached(source_of(small_store, obs_filter="donor == 'd1'"), tmp_path / "c")
    with pytest.raises(DataError, match="cell 0 is not in the token cache"):
        cache.tokens(np.array([0]))


def test_a_shard_is_plain_arrow(small_store, tmp_path):
    source, cache = cached(source_of(small_store), tmp_path / "c")
    with pa.memory_map(str(cache.path(0))) as mapped:
        table = pa.ipc.open_file(mapped).read_all()
    assert table.column_names == ["id", "tokens", "values"]
    first = source.tokens(source.joinids[:1], epoch=0)
    assert table["tokens"][0].as_py() == first.tokens.tolist()


def test_no_cells_give_an_empty_block():
    assert len(lay_out([], joinids=np.zeros(0, np.int64))) == 0
