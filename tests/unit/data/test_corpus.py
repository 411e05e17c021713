"""What a model has seen, written beside it, and whether test cells are among."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from cellray.core.errors import CheckpointError
from cellray.data import contents, corpus
from cellray.data.contents import content_hashes, keeps_hashes, near_hashes
from cellray.data.corpus import (
    CORPUS,
    bring,
    corpus_files,
    read_corpus,
    record_corpus,
)
from cellray.data.dataset_name import dataset_id_of, is_synthetic
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.soma import Store, open_store
from cellray.data.stores import AnyStore, join_stores
from helpers_cells import known_cells


def stored(folder: Path, name: str, cells: ad.AnnData, dataset: str = "") -> Store:
    cells.write_h5ad(folder / f"{name}.h5ad")
    uri = str(folder / name)
    ids = [dataset] if dataset else []
    ingest(IngestConfig(files=[str(folder / f"{name}.h5ad")], uri=uri, dataset_ids=ids))
    return open_store(uri)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Store]:
    """The same cells: as they are; genes in another order with empty ones between; genes cut."""
    folder = tmp_path_factory.mktemp("corpus")
    cells = known_cells()
    rng = np.random.default_rng(1)
    empty = ad.AnnData(np.zeros((240, 5), np.float32), obs=cells.obs)
    empty.var_names = [f"ENSG{i:011d}" for i in range(900, 905)]
    wide = ad.concat([cells, empty], axis=1, merge="same")
    moved = wide[rng.permutation(240)][:, rng.permutation(65)].copy()
    moved.var_names = [f"{name}.3" for name in moved.var_names]
    other = known_cells(seed=5)
    other.obs_names = [f"other{i}" for i in range(240)]
    return {
        "plain": stored(folder, "plain", cells, "study"),
        "moved": stored(folder, "moved", moved, "elsewhere"),
        "cut": stored(folder, "cut", cells[:, :40].copy(), "study"),
        "other": stored(folder, "other", other, "another"),
    }


@dataclass
class Cells:
    store: AnyStore


def overlap(model, store: AnyStore, joinids) -> corpus.Overlap:
    return corpus.overlap(model, Cells(store), joinids)


def ids(store: Store) -> np.ndarray:
    return store.obs([])["soma_joinid"].to_numpy()


def by_name(store: Store, values: np.ndarray) -> dict[str, int]:
    names = store.obs(["obs_id"])["obs_id"].astype(str)
    return dict(zip(names, values.tolist(), strict=True))


def test_a_cell_keeps_its_hash_in_another_store(stores):
    plain, moved = stores["plain"], stores["moved"]
    assert moved.var()["feature_id"].tolist() != plain.var()["feature_id"].tolist()
    for hashes in (content_hashes, near_hashes):
        first, second = (by_name(s, hashes(s, ids(s))) for s in (plain, moved))
        assert first == second
        assert len(set(first.values())) == 240


def test_cut_genes_change_it(stores):
    first, second = (content_hashes(stores[n], ids(stores[n])) for n in ("plain", "cut"))
    assert not np.isin(first, second).any()


def test_what_is_read_is_what_ingest_keeps(stores, monkeypatch):
    store = stores["plain"]
    some = np.array([200, 3, 77])
    kept = content_hashes(store, some)
    monkeypatch.setattr(contents, "keeps_hashes", lambda store: False)
    monkeypatch.setattr(contents, "_BLOCK_CELLS", 2)
    monkeypatch.setattr(contents, "_SAY_EVERY_S", -1.0)
    told: list[str] = []
    np.testing.assert_array_equal(content_hashes(store, some, say=told.append), kept)
    assert told[-1].startswith("hashing cells: 3/3  ETA 0 s")


def test_another_measurement_is_read(stores):
    assert keeps_hashes(stores["plain"])
    assert not keeps_hashes(replace(stores["plain"], measurement="ATAC"))


def test_hashes_of_joined_stores(stores):
    joined = join_stores([stores["plain"], stores["other"]])
    cells = joined.obs([])["soma_joinid"].to_numpy()[::-1].copy()
    expected = [content_hashes(s, ids(s)) for s in joined.stores]
    np.testing.assert_array_equal(content_hashes(joined, cells), np.concatenate(expected)[::-1])


def near_by_hand(cells: ad.AnnData, top: int) -> list[tuple[frozenset[int], float]]:
    """The largest genes as a set and the total; ties by the hash of the gene."""
    order = np.argsort(contents.hash64(cells.var_names), kind="stable")
    counts = cells.X.toarray()
    found = []
    for row in counts:
        largest = order[np.argsort(-row[order], kind="stable")][:top]
        found.append((frozenset(g for g in largest.tolist() if row[g] > 0), float(row.sum())))
    return found


@pytest.mark.parametrize("top", [3, 20, 64])
def test_near_hashes_say_the_same_as_sets_of_genes(stores, top):
    cells = known_cells()
    hashes = near_hashes(stores["plain"], ids(stores["plain"]), top=top)
    by_hand = near_by_hand(cells, top)
    assert len(set(hashes.tolist())) == len(set(by_hand))
    seen = {}
    for value, expected in zip(hashes.tolist(), by_hand, strict=True):
        assert seen.setdefault(value, expected) == expected


def test_a_count_moved_among_small_genes_keeps_the_near_hash(tmp_path):
    counts = np.random.default_rng(0).poisson(2.0, (12, 200)).astype(np.float32)
    counts[:, :100] += 20
    near, other = counts[0].copy(), counts[0].copy()
    small = np.flatnonzero(counts[0, 100:] > 1)[:2] + 100
    near[small] += [1, -1]  # far below the 64th
    other[0] += 1  # another total
    cells = known_cells(num_cells=12, num_genes=200)
    cells.X = type(cells.X)(np.vstack([counts[:10], near, other]))
    store = stored(tmp_path, "near", cells)
    exact, coarse = (f(store, np.arange(12)) for f in (content_hashes, near_hashes))
    assert len(set(exact.tolist())) == 12
    assert coarse[10] == coarse[0]
    assert len(set(coarse.tolist())) == 11


def noted(folder: Path, store, cells, **more) -> Path:
    folder.mkdir(exist_ok=True)
    record_corpus(folder, store, cells, kind="pretrain", run="base", **more)
    return folder


def test_what_is_written_down(stores, tmp_path):
    store = stores["plain"]
    folder = noted(tmp_path / "run", store, np.arange(0, 200), timestamp="2026-01-01T00:00:00Z")
    found = read_corpus(folder)
    assert found is not None
    (stage,) = found.stages
    assert found.complete
    assert stage.kind == "pretrain"
    (noted_store,) = stage.stores
    assert noted_store["uri"] == store.uri
    assert noted_store["timestamp"] == "2026-01-01T00:00:00Z"
    assert noted_store["num_genes"] == 60
    assert len(noted_store["genes"]) == 16
    assert stage.num_cells == 200
    assert stage.datasets == {"study": 200}
    assert stage.donors == {"study": dict.fromkeys(("d0", "d1", "d2", "d3"), 50)}
    hashes = np.load(folder / stage.hashes)
    np.testing.assert_array_equal(hashes, np.unique(content_hashes(store, np.arange(200))))
    assert (np.diff(hashes) > 0).all()
    assert stage.num_hashes == 200
    assert {p.name for p in folder.iterdir()} == {CORPUS, stage.hashes}
    assert found.lines() == [
        "seen in pretrain 'base': 200 cells of 1 data sets, 200 content hashes, from " + store.uri
    ]


def test_overlap_of_the_same_cells_in_another_store(stores, tmp_path):
    folder = noted(tmp_path / "run", stores["plain"], np.arange(120))
    moved = stores["moved"]
    names = moved.obs(["obs_id"])["obs_id"].astype(str)
    inside = names.str.removeprefix("cell").astype(int).to_numpy() < 120
    full = overlap(folder, moved, ids(moved)[inside])
    assert (full.flag, full.fraction, full.num_cells) == ("full", 1.0, 120)
    partial = overlap(folder, moved, ids(moved))
    assert (partial.flag, partial.fraction, dict(partial.by_dataset)) == ("partial", 0.5, {})
    assert "has seen 50.0% of these cells" in partial.remark
    # of other genes (though all of them empty), and few: what is not met proves nothing
    other = overlap(folder, moved, ids(moved)[~inside])
    assert (other.flag, other.fraction) == ("unknown", None)


def test_cells_of_the_same_study_are_flagged_by_its_name(stores, tmp_path):
    folder = noted(tmp_path / "run", stores["plain"], np.arange(120))
    held = overlap(folder, stores["plain"], np.arange(120, 240))
    cut = overlap(folder, stores["cut"], np.arange(30))
    assert (held.flag, held.fraction, dict(held.by_dataset)) == ("partial", 0.0, {"study": 120})
    assert "has seen cells of study: none with the same counts" in held.remark
    assert (cut.flag, cut.fraction, dict(cut.by_dataset)) == ("partial", None, {"study": 30})
    assert "whether the same ones is not known" in cut.remark


def test_counts_of_other_genes_prove_nothing(stores, tmp_path, monkeypatch):
    """The very cells that were trained on, with genes left out and no name of their study."""
    folder = noted(tmp_path / "run", stores["plain"], np.arange(240))
    cells = known_cells()[:, :40].copy()
    nameless = stored(tmp_path, "nameless", cells, "renamed")
    by_name = overlap(folder, nameless, np.arange(30))  # its dataset id is the file's name
    assert (by_name.flag, by_name.fraction) == ("unknown", None)
    raw = json.loads((folder / CORPUS).read_text())
    raw["stages"][0]["datasets"] = {}
    (folder / CORPUS).write_text(json.dumps(raw))
    assert overlap(folder, nameless, np.arange(30)).flag == "unknown"
    assert overlap(folder, stores["other"], np.arange(30)).flag == "none"  # the same genes
    monkeypatch.setattr(corpus, "WHOLE_GENES", 40)
    assert overlap(folder, nameless, np.arange(30)).flag == "none"  # both taken for whole


def test_other_cells_do_not_overlap(stores, tmp_path):
    folder = noted(tmp_path / "run", stores["plain"], np.arange(240))
    other = overlap(folder, stores["other"], ids(stores["other"]))
    assert (other.flag, other.fraction, dict(other.by_dataset)) == ("none", 0.0, {})


def test_overlap_over_joined_stores(stores, tmp_path):
    joined = join_stores([stores["plain"], stores["other"]])
    cells = joined.obs([])["soma_joinid"].to_numpy()
    folder = noted(tmp_path / "run", joined, cells[cells != 3])
    (stage,) = read_corpus(folder).stages
    assert stage.datasets == {"study": 239, "another": 240}
    assert [s["uri"] for s in stage.stores] == [s.uri for s in joined.stores]
    assert overlap(folder, stores["plain"], np.array([2, 4])).flag == "full"
    assert overlap(folder, stores["plain"], np.array([3])).fraction == 0.0


def test_without_a_record_nobody_knows(stores, tmp_path):
    assert read_corpus(tmp_path) is None
    assert corpus_files(tmp_path) == []
    found = overlap(tmp_path, stores["plain"], np.arange(5))
    assert found.flag == "unknown"
    assert found.fraction is None
    assert found.corpus_id == "unknown"
    assert "nothing beside the model says" in found.remark


def test_without_hashes_the_names_of_data_sets_decide(stores, tmp_path):
    folder = noted(tmp_path / "run", stores["plain"], np.arange(240), hashes="never")
    assert read_corpus(folder).stages[0].hashes == ""
    same = overlap(folder, stores["plain"], np.arange(9))
    assert same.flag == "partial"
    assert same.fraction is None
    assert same.corpus_id == "base:?"
    assert "whether the same ones is not known" in same.remark
    other = overlap(folder, stores["other"], np.arange(9))
    assert (other.flag, other.remark) == (
        "none",
        "no cell and no data set in common, by dataset ids",
    )
    raw = json.loads((folder / CORPUS).read_text())
    raw["stages"][0]["datasets"] = {}
    (folder / CORPUS).write_text(json.dumps(raw))
    assert overlap(folder, stores["other"], np.arange(9)).flag == "unknown"


def test_counts_of_many_cells_are_read_only_if_asked(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "keeps_hashes", lambda store: False)
    monkeypatch.setattr(corpus, "READ_AT_MOST", 100)
    told: list[str] = []
    few = noted(tmp_path / "few", stores["plain"], np.arange(100), say=told.append)
    assert read_corpus(few).stages[0].num_hashes == 100
    assert told == []
    many = noted(tmp_path / "many", stores["plain"], np.arange(101), say=told.append)
    assert read_corpus(many).stages[0].hashes == ""
    assert 'data.corpus_hashes = "always" computes them' in told[0]
    every = noted(tmp_path / "all", stores["plain"], np.arange(101), hashes="always")
    assert read_corpus(every).stages[0].num_hashes == 101


def test_a_model_keeps_what_its_start_has_seen(stores, tmp_path):
    base = noted(tmp_path / "base", stores["plain"], np.arange(240))
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    more = {"kind": "finetune", "run": "tuned"}
    record_corpus(tuned, stores["other"], np.arange(100), before=str(base), **more)
    found = read_corpus(tuned)
    assert [(s.kind, s.num_cells) for s in found.stages] == [("pretrain", 240), ("finetune", 100)]
    assert found.complete
    assert re.fullmatch(r"base:[0-9a-f]{8}\+tuned:[0-9a-f]{8}", found.id)
    first = found.stages[0].hashes
    assert os.path.samefile(tuned / first, base / first)  # a link: no bytes
    assert overlap(tuned, stores["plain"], np.arange(5)).flag == "full"
    assert overlap(tuned, stores["other"], np.arange(100)).flag == "full"
    assert overlap(base, stores["other"], np.arange(100)).flag == "none"


def test_what_starts_from_unknown_weights_stays_unknown(stores, tmp_path):
    (tmp_path / "theirs").mkdir()
    folder = noted(tmp_path / "run", stores["plain"], np.arange(9), before=str(tmp_path / "theirs"))
    found = read_corpus(folder)
    assert not found.complete
    assert found.id.startswith("unknown+base:")
    assert found.lines()[0] == "seen before: unknown (weights of others)"
    assert overlap(folder, stores["plain"], np.arange(9)).flag == "full"
    other = overlap(folder, stores["other"], np.arange(9))
    assert other.flag == "unknown"
    assert "not all that the model has seen is known" in other.remark


def test_it_is_found_from_a_run_and_from_a_checkpoint_of_it(stores, tmp_path):
    run = noted(tmp_path / "run", stores["plain"], np.arange(9))
    step = run / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    assert read_corpus(step).folder == run
    (run / "other" / "deep").mkdir(parents=True)
    assert read_corpus(run / "other" / "deep") is None
    (tmp_path / "moved").mkdir()
    model = tmp_path / "moved" / "model"
    model.mkdir()
    for file in corpus_files(run):
        bring(file, model)
    assert read_corpus(tmp_path / "moved").folder == model


def test_files_are_copied_where_they_cannot_be_linked(stores, tmp_path, monkeypatch):
    def no_link(*paths):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", no_link)
    run = noted(tmp_path / "run", stores["plain"], np.arange(9))
    (tmp_path / "model").mkdir()
    for file in corpus_files(run):
        bring(file, tmp_path / "model")
    assert overlap(tmp_path / "model", stores["plain"], np.arange(9)).flag == "full"


def test_a_torn_record_says_so(stores, tmp_path):
    run = noted(tmp_path / "run", stores["plain"], np.arange(9))
    (run / read_corpus(run).stages[0].hashes).unlink()
    with pytest.raises(CheckpointError, match=r"names 'corpus\..*npy', which is not beside it"):
        read_corpus(run)
    (run / CORPUS).write_text('{"format": "x"}')
    with pytest.raises(CheckpointError, match="cannot be read: format 'x'"):
        overlap(run, stores["plain"], np.arange(9))


def test_names_of_data_sets(stores):
    assert dataset_id_of(stores["plain"]) == "study"
    assert dataset_id_of(join_stores([stores["plain"], stores["other"]])) == "study+another"
    assert dataset_id_of(stores["plain"], "pancreas") == "pancreas"
    assert not is_synthetic(stores["plain"])
