"""Several stores read as one: joined genes, cells told apart, blocks in the order asked for."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellray.core.errors import ConfigError, DataError
from cellray.core.ids import cell_ids, stores_of
from cellray.data.config import DataSection
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.mixture import MixturePlan
from cellray.data.relayout import relayout
from cellray.data.soma import open_store
from cellray.data.stores import join_stores
from cellray.train.config import BatchSection
from cellray.train.prepare import make_plan, select_cells, validation_mask

GENES = ([0, 1, 2, 3], [5, 3, 1])  # the second store shares genes 1 and 3


def write(folder, number, num_cells):
    """X[i, j] says which store, cell and gene it is."""
    genes = GENES[number]
    counts = np.array(
        [[100 * (number + 1) + 10 * i + g for g in genes] for i in range(num_cells)], dtype="f4"
    )
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"t{i % 3}" for i in range(num_cells)]),
            f"only_in_{number}": np.arange(num_cells),
        },
        index=[f"s{number}c{i}" for i in range(num_cells)],
    )
    var = pd.DataFrame(index=[f"ENSG{g:011d}" for g in genes])
    file = folder / f"{number}.h5ad"
    ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var).write_h5ad(file)
    ingest(IngestConfig(files=[str(file)], uri=str(folder / f"store{number}")))
    return str(folder / f"store{number}")


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [write(folder, 0, 30), write(folder, 1, 12)]


@pytest.fixture(scope="module")
def joined(uris):
    return join_stores([open_store(u) for u in uris])


def test_genes_are_joined_by_id(joined):
    assert joined.var()["feature_id"].tolist() == [f"ENSG{g:011d}" for g in (0, 1, 2, 3, 5)]
    assert joined.num_cells == 42


def test_a_block_mixes_cells_of_both_in_the_order_asked_for(joined):
    ids = np.array([*cell_ids([3], store=1), 29, *cell_ids([0], store=1), 0])
    genes = np.arange(5, dtype=np.int32)
    block = joined.read_block(ids, genes, obs=["cell_type"])
    assert np.array_equal(block.joinids, ids)
    rows = [slice(*block.indptr[i : i + 2]) for i in range(4)]
    assert [block.counts[r].tolist() for r in rows] == [
        [231, 233, 235],
        [390, 391, 392, 393],
        [201, 203, 205],
        [100, 101, 102, 103],
    ]
    assert [block.genes[r].tolist() for r in rows] == [[1, 3, 4], [0, 1, 2, 3]] * 2
    assert block.library_sizes.tolist() == [699, 1566, 609, 406]
    assert block.obs["cell_type"].tolist() == ["t0", "t2", "t0", "t0"]


def test_obs_is_stacked_with_cell_ids_and_shared_columns(joined):
    obs = joined.obs(["cell_type"], value_filter="cell_type == 't1'")
    assert np.bincount(stores_of(obs["soma_joinid"].to_numpy())).tolist() == [10, 4]
    assert "only_in_0" not in joined.obs_columns()
    assert sorted(obs["cell_type"].unique()) == ["t1"]


def test_the_fingerprint_depends_on_cells_of_every_store(joined):
    one = cell_ids(np.arange(5), store=0)
    two = cell_ids(np.arange(5), store=1)
    prints = {joined.fingerprint(np.concatenate(p)) for p in ([one], [one, two], [two])}
    assert len(prints) == 3


def test_one_store_stays_what_it_is(uris):
    store = open_store(uris[0])
    assert join_stores([store]) is store


def test_a_store_named_twice(uris):
    with pytest.raises(DataError, match="more than once; its cells would count twice"):
        join_stores([open_store(uris[0])] * 2)


def plan_of(data, **batch):
    cells = select_cells(data, ["cell_type"])
    section = BatchSection(**{"cells_global": 8, "cells_micro": 8, **batch})
    return cells, make_plan(cells, data, train=cells.joinids, lengths=None, batch=section, seed=0)


def test_weights_share_every_batch(uris):
    cells, plan = plan_of(DataSection(uri=uris, weights=[1, 3]))
    assert isinstance(plan, MixturePlan)
    assert len(cells.joinids) == 42
    rows = plan.rows(0, 0, plan.batches_per_epoch)
    assert {tuple(np.bincount(stores_of(batch))) for batch in rows} == {(2, 6)}


def test_without_weights_stores_count_by_their_cells(uris):
    _, plan = plan_of(DataSection(uri=uris))
    assert tuple(np.bincount(stores_of(plan.rows(0, 0, 1)[0]))) == (6, 2)


def test_a_store_of_which_nothing_is_selected(uris):
    with pytest.raises(DataError, match=r"no training cell is selected of .*store1"):
        plan_of(DataSection(uri=uris, obs_filter="obs_id in ['s0c1', 's0c2', 's0c3']"))


def test_weights_must_fit_the_stores(uris):
    with pytest.raises(ValueError, match="data.weights has 1 numbers for 2 stores"):
        DataSection(uri=uris, weights=[1.0])
    with pytest.raises(ValueError, match="every weight must be above 0"):
        DataSection(uri=uris, weights=[1.0, -1.0])
    with pytest.raises(ValueError, match=r"data.uri names no store"):
        DataSection(uri=[])


def test_held_out_datasets_are_never_seen(uris):
    data = DataSection(uri=uris[0], held_out=["t1"], held_out_by="cell_type")
    cells, plan = plan_of(data)
    assert set(cells.obs["cell_type"]) == {"t0", "t2"}
    assert not (plan.rows(0, 0, plan.batches_per_epoch) % 3 == 1).any()


def test_a_held_out_dataset_that_is_not_there(uris):
    with pytest.raises(DataError, match="held_out names 't9', which no selected cell has as"):
        select_cells(DataSection(uri=uris[0], held_out=["t9"], held_out_by="cell_type"))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"balance_by": "cell_typ"}, "data.balance_by = 'cell_typ' is no obs column"),
        ({"split": {"by": "donr"}}, "data.split.by = 'donr' is no obs column"),
        ({"held_out": ["x"], "held_out_by": "tissu"}, "data.held_out_by = 'tissu' is no obs"),
    ],
)
def test_a_misspelt_column_is_named_with_its_key(uris, keys, named):
    with pytest.raises(DataError, match=named):
        select_cells(DataSection.model_validate({"uri": uris[0], **keys}))


def test_a_run_on_another_measurement_selects_the_cells_that_have_it(tmp_path):
    """Lengths and the rule of detected features are those of the measurement."""
    rna = np.ones((6, 5), dtype="f4")
    atac = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 1, 1]], dtype="f4")
    for name, counts, prefix in (("rna", rna, "ENSG0000000000"), ("atac", atac, "peak")):
        cells = [f"c{i}" for i in range(len(counts))]
        genes = [f"{prefix}{i}" for i in range(counts.shape[1])]
        adata = ad.AnnData(
            sp.csr_matrix(counts), obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes)
        )
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    other = {"ATAC": {"files": [str(tmp_path / "atac.h5ad")]}}
    files = [str(tmp_path / "rna.h5ad")]
    ingest(
        IngestConfig.model_validate(
            {"files": files, "uri": str(tmp_path / "s"), "measurements": other}
        )
    )
    data = DataSection(uri=str(tmp_path / "s"), measurement="ATAC")
    cells = select_cells(data)
    assert cells.joinids.tolist() == [0, 1, 2, 3]
    assert cells.lengths(99).tolist() == [3, 1, 2, 3]
    enough = select_cells(data.model_copy(update={"min_genes_per_cell": 2}))
    assert enough.joinids.tolist() == [0, 2, 3]
    assert select_cells(DataSection(uri=str(tmp_path / "s"))).lengths(99).tolist() == [5] * 6


def test_balancing_by_a_column(uris):
    data = DataSection(uri=uris[0], obs_filter="cell_type != 't2' or obs_id == 's0c2'")
    cells = select_cells(data, ["cell_type"])
    assert cells.obs["cell_type"].value_counts().to_dict() == {"t0": 10, "t1": 10, "t2": 1}
    data = data.model_copy(update={"balance_by": "cell_type", "balance_max_repeats": 7})
    _, plan = plan_of(data, cells_global=7, cells_micro=7)
    seen = plan.rows(0, 0, 3) & 0xFFFF
    assert np.bincount((seen % 3).reshape(-1)).tolist() == [7, 7, 7]


def test_too_small_a_weight_is_refused_before_anything_starts(uris):
    with pytest.raises(ConfigError, match="is less than one of the 8 lanes"):
        plan_of(DataSection(uri=uris, weights=[1000, 1]))


def sides(uri, **split):
    """Cell id -> whether it is held for validation."""
    data = DataSection(uri=uri, split={"validation_fraction": 0.4, **split})
    cells = select_cells(data, ["obs_id"])
    return dict(zip(cells.obs["obs_id"].astype(str), validation_mask(cells, data), strict=True))


def test_no_cell_changes_sides_whatever_stores_come_or_in_which_order(uris, tmp_path):
    alone = sides(uris[0])
    assert 5 < sum(alone.values()) < 25
    for mixture in ([uris[0], uris[1]], [uris[1], uris[0]]):
        together = sides(mixture)
        assert len(together) == 42
        assert {c: together[c] for c in alone} == alone
    relayout(uris[0], str(tmp_path / "part"), obs_filter="only_in_0 > 9")  # other joinids
    part = sides(str(tmp_path / "part"))
    assert len(part) == 20
    assert part == {c: alone[c] for c in part}
    assert sides(uris[0], salt=1) != alone
