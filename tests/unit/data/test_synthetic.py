"""The synthetic atlas: what is planted can be found, and cells depend on seed and index alone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from cellray.core.section import build_section
from cellray.data.genes import gene_table
from cellray.data.synthetic import SynthesizeConfig, synthesize_anndata
from cellray.data.synthetic_biology import atlas_genes, biology
from cellray.data.synthetic_cells import cell_facts, draw_counts, find_library_size

KEYS = {
    "num_cells": 6000,
    "num_genes": 1200,
    "mean_genes_per_cell": 250.0,
    "num_lineages": 3,
    "num_types": 8,
    "markers_per_lineage": 10,
    "markers_per_type": 10,
    "num_datasets": 6,
    "num_tissues": 3,
    "num_regulators": 12,
    "targets_per_regulator": 15,
    "num_pathways": 6,
    "genes_per_pathway": 15,
    "num_knockouts": 4,
    "perturbed_fraction": 0.4,
}


def config(**keys) -> SynthesizeConfig:
    return build_section(SynthesizeConfig, KEYS | keys)


@pytest.fixture(scope="module")
def atlas():
    return synthesize_anndata(config())


@pytest.fixture(scope="module")
def truth(atlas):
    return atlas.uns["truth"]


@pytest.fixture(scope="module")
def logged(atlas):
    """log1p of counts per 1,000: (cells, genes)."""
    sums = np.maximum(atlas.obs["raw_sum"].to_numpy(), 1.0)
    return np.log1p((sp.diags(1000 / sums) @ atlas.X).toarray())


def mean_rate(atlas, rows) -> np.ndarray:
    """Counts of each gene as a share of the library, over some cells."""
    part = atlas.X[np.flatnonzero(rows)]
    return np.asarray(part.sum(axis=0)).reshape(-1) / part.sum()


def log_ratio(atlas, above, below) -> np.ndarray:
    return np.log((mean_rate(atlas, above) + 1e-6) / (mean_rate(atlas, below) + 1e-6))


def rows_of(atlas, ids) -> np.ndarray:
    return atlas.var_names.get_indexer(ids)


def test_cell_types_are_learnt_across_donors(atlas, logged):
    train = (atlas.obs["donor_id"].cat.codes % 2 == 0).to_numpy()
    types = atlas.obs["cell_type"].astype(str).to_numpy()
    model = LogisticRegression(C=0.01, max_iter=100).fit(logged[train], types[train])
    assert model.score(logged[~train], types[~train]) > 0.9


def test_markers_top_the_difference_between_their_type_and_the_others(atlas, truth):
    types, markers = atlas.obs["cell_type"], truth["markers"]
    lineage_of = dict(zip(truth["types"]["cell_type"], truth["types"]["lineage"], strict=True))
    for kind in types.cat.categories:
        same = types.map(lineage_of).astype(str) == lineage_of[kind]
        ratio = log_ratio(atlas, types == kind, ~same)
        planted = rows_of(atlas, markers[markers["of"].isin([kind, lineage_of[kind]])].feature_id)
        assert len(planted) == 20
        top = np.argsort(-ratio)[:25]
        assert np.isin(planted, top).mean() >= 0.8, kind
        assert ratio[planted].mean() == pytest.approx(2.5, abs=0.5)


def test_a_knockout_silences_its_gene_and_moves_its_targets_as_planted(atlas, truth):
    perturbation, knockouts = atlas.obs["perturbation"], truth["knockouts"]
    assert set(perturbation) == {"control", *knockouts["perturbation"]}
    found, planted = [], []
    for name, part in knockouts.groupby("perturbation"):
        own = rows_of(atlas, part["regulator"].unique())
        assert atlas.X[np.flatnonzero(perturbation == name)][:, own].nnz == 0
        assert atlas.X[np.flatnonzero(perturbation == "control")][:, own].nnz > 0
        ratio = log_ratio(atlas, perturbation == name, perturbation == "control")
        rows = rows_of(atlas, part["target"])
        seen = mean_rate(atlas, perturbation == "control")[rows] > 5e-4
        found += ratio[rows[seen]].tolist()
        planted += part["log_fold"][seen].tolist()
    assert len(found) > 25
    assert (np.sign(found) == np.sign(planted)).mean() > 0.9
    assert np.corrcoef(found, planted)[0, 1] > 0.8


def test_edges_correlate_by_their_sign_and_random_pairs_do_not(atlas, truth, logged):
    control = (atlas.obs["perturbation"] == "control").to_numpy()
    kinds = atlas.obs["cell_type"].cat.codes.to_numpy()[control]
    values = logged[control].copy()
    for kind in np.unique(kinds):  # within a type, so that types do not speak for the edges
        values[kinds == kind] -= values[kinds == kind].mean(axis=0)
    values /= values.std(axis=0) + 1e-9
    edges, genes = truth["edges"], truth["genes"]
    sources, targets = rows_of(atlas, edges["regulator"]), rows_of(atlas, edges["target"])
    both = (values[:, sources] * values[:, targets]).mean(axis=0)
    signed = both * np.sign(edges["weight"].to_numpy())
    others = np.flatnonzero(genes["role"] == "housekeeping")[: len(edges)]
    random = (values[:, sources[: len(others)]] * values[:, others]).mean(axis=0)
    is_edge = np.repeat([1, 0], [len(signed), len(random)])
    assert roc_auc_score(is_edge, np.concatenate([signed, random])) > 0.8
    assert signed.mean() > 4 * abs(random.mean())


def test_a_dataset_shifts_genes_and_library_size_as_planted(atlas, truth):
    datasets = truth["datasets"]
    frequent = np.flatnonzero(
        (truth["genes"]["role"] == "housekeeping") & (truth["genes"]["share"] > 1e-3)
    )
    shift = truth["batch_log_fold"] - truth["batch_log_fold"].mean(axis=0)
    for row, name in enumerate(datasets["dataset_id"]):
        inside = atlas.obs["dataset_id"] == name
        ratio = log_ratio(atlas, inside, ~inside)[frequent]
        assert np.corrcoef(ratio, shift[row][frequent])[0, 1] > 0.5
    library = np.log(atlas.obs["raw_sum"]).groupby(atlas.obs["dataset_id"], observed=True).mean()
    assert np.corrcoef(library, datasets["log_library"])[0, 1] > 0.8


def test_pathways_move_together_and_the_first_is_raised_in_disease(atlas, truth, logged):
    pathways, activities = truth["pathways"], truth["activities"]
    healthy = (atlas.obs["disease"] == "normal").to_numpy()
    assert 0 < healthy.sum() < len(healthy)
    for number, (name, part) in enumerate(pathways.groupby("pathway")):
        rows = rows_of(atlas, part["feature_id"])
        score = logged[:, rows].mean(axis=1)
        means = activities[activities["name"] == name].set_index("cell_type")["mean"]
        by_type = (
            atlas.obs.assign(score=score)[healthy]
            .groupby("cell_type", observed=True)["score"]
            .mean()
        )
        assert np.corrcoef(by_type, means.loc[by_type.index])[0, 1] > 0.85, name
        raised = log_ratio(atlas, ~healthy, healthy)[rows].mean()
        assert (raised > 0.35) == (number == 0), (name, raised)


def test_cells_lie_dataset_after_dataset_with_types_unevenly_spread(atlas, truth):
    codes = atlas.obs["dataset_id"].cat.codes.to_numpy()
    assert (np.diff(codes) >= 0).all()
    assert np.bincount(codes).tolist() == truth["datasets"]["cells"].tolist()
    assert truth["datasets"]["cells"].sum() == 6000
    pairs = atlas.obs[["donor_id", "dataset_id"]].drop_duplicates()
    assert len(pairs) == 24
    assert pairs["donor_id"].is_unique
    table = atlas.obs.groupby(["dataset_id", "cell_type"], observed=False).size().unstack()
    shares = table.to_numpy() / table.to_numpy().sum(axis=1, keepdims=True)
    assert shares.max(axis=0).mean() > 2 * shares.mean(axis=0).mean()


def test_genes_have_the_roles_and_shares_that_were_asked_for(atlas, truth):
    roles = truth["genes"]["role"].value_counts()
    assert roles["regulator"] == 12
    assert roles["target"] == 120
    assert roles["pathway"] == 90
    assert roles["type marker"] == 80
    assert roles["lineage marker"] == 30
    assert roles["mitochondrial"] == 13
    assert truth["genes"]["share"].sum() == pytest.approx(1.0)
    mitochondrial = (truth["genes"]["role"] == "mitochondrial").to_numpy()
    assert mean_rate(atlas, np.ones(6000, bool))[mitochondrial].sum() == pytest.approx(
        0.06, abs=0.03
    )
    edges = truth["edges"]
    assert len(edges) == 12 * 15
    assert not edges.duplicated(["regulator", "target"]).any()
    assert (edges["weight"] < 0).mean() == pytest.approx(0.3, abs=0.1)
    assert edges["weight"].abs().mean() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [({}, 250.0), ({"num_cells": 2000, "dispersion": 1.0, "mean_genes_per_cell": 600}, 600.0)],
)
def test_detected_genes_per_cell_are_as_asked_for(keys, wanted):
    found = synthesize_anndata(config(**keys))
    assert found.obs["nnz"].mean() == pytest.approx(wanted, rel=0.05)


def test_the_defaults_give_the_census_mean_of_detected_genes():
    atlas = biology(SynthesizeConfig(num_cells=20_000))
    size = find_library_size(atlas)
    cells = np.linspace(7, 19_900, 400).astype(np.int64)  # not those it was found with
    counts = draw_counts(atlas, cell_facts(atlas, cells), size)
    assert counts.shape == (400, 32_000)
    assert counts.nnz / 400 == pytest.approx(1845, rel=0.05)


def test_a_library_size_that_is_given_is_the_median():
    found = synthesize_anndata(
        config(library_size=400.0, batch_library_strength=0.0, num_regulators=0, num_knockouts=0,
               num_pathways=0)
    )  # fmt: skip
    assert np.median(found.obs["raw_sum"]) == pytest.approx(400, rel=0.03)
    assert np.log(found.obs["raw_sum"]).std() == pytest.approx(0.5, abs=0.03)


def test_a_cell_does_not_depend_on_the_cells_it_is_made_with(atlas):
    made = biology(config())
    size = find_library_size(made)
    cells = np.array([4711, 3, 5999, 0, 2500])
    alone = draw_counts(made, cell_facts(made, cells), size)
    assert (alone != atlas.X[cells]).nnz == 0


def test_the_seed_changes_everything_and_nothing_else_does(atlas):
    again, other = synthesize_anndata(config()), synthesize_anndata(config(seed=1))
    assert (again.X != atlas.X).nnz == 0
    assert again.obs.equals(atlas.obs)
    assert set(other.obs["cell_hash"]).isdisjoint(atlas.obs["cell_hash"])
    assert list(other.var_names) == list(atlas.var_names)


def test_genes_are_real_ones_first_and_made_up_ones_at_the_end():
    table = gene_table("human")
    ids, names = atlas_genes(1200, 13)
    assert all(table.symbols[i] == n for i, n in zip(ids, names, strict=True))
    assert all(n.startswith("MT-") for n in names[:13])
    assert not any(n.startswith("MT-") for n in names[13:])
    many, words = atlas_genes(50_000, 13)
    assert many[:1200] == ids
    assert len(set(many)) == 50_000
    assert many[-1].startswith("ENSG9")
    assert words[-1].startswith("SYN")
    assert not set(many[-100:]) & set(table.symbols)
    assert {len(g) for g in many} == {15}


def test_duplicates_repeat_a_cell_of_an_earlier_dataset_and_are_not_primary():
    plain = synthesize_anndata(config(num_cells=2000, library_size=400.0))
    found = synthesize_anndata(config(num_cells=2000, library_size=400.0, duplicated_fraction=0.3))
    assert plain.obs["is_primary_data"].all()
    primary = found.obs["is_primary_data"].to_numpy()
    first = (found.obs["dataset_id"] == "dataset_000").to_numpy()
    assert primary[first].all()
    assert (~primary[~first]).mean() == pytest.approx(0.3 * 0.75, abs=0.06)
    assert (found.X[primary] != plain.X[primary]).nnz == 0
    originals = found.obs[primary].set_index("cell_hash")
    repeated = found.obs[~primary]
    assert originals.index.is_unique
    origin = originals.loc[repeated["cell_hash"]]
    for column in ("donor_id", "cell_type", "perturbation", "raw_sum", "tissue", "assay"):
        assert origin[column].tolist() == repeated[column].tolist(), column
    assert (origin["dataset_id"].cat.codes.to_numpy()
            < repeated["dataset_id"].cat.codes.to_numpy()).all()  # fmt: skip


def test_an_atlas_without_regulation_pathways_and_markers():
    plain = synthesize_anndata(
        config(num_cells=50, num_regulators=0, num_knockouts=0, num_pathways=0, num_types=1,
               num_lineages=1, markers_per_type=0, markers_per_lineage=0, num_datasets=1)
    )  # fmt: skip
    assert set(plain.obs["perturbation"]) == {"control"}
    assert len(plain.uns["truth"]["edges"]) == 0
    assert plain.obs["nnz"].mean() == pytest.approx(250, rel=0.05)


def test_the_anndata_can_be_written_as_a_file(atlas, tmp_path):
    import anndata

    atlas.write_h5ad(tmp_path / "a.h5ad")
    found = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert (found.X != atlas.X).nnz == 0
    assert found.uns["truth"]["edges"]["weight"].sum() == pytest.approx(
        atlas.uns["truth"]["edges"]["weight"].sum()
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_genes": 200}, "genes have a role .* but num_genes = 200; raise num_genes"),
        ({"mean_genes_per_cell": 1000}, "more than 80 % of num_genes = 1200; lower it"),
        ({"num_lineages": 9}, "num_lineages = 9 is more than num_types = 8"),
        ({"num_knockouts": 13}, "only regulators are knocked out"),
        ({"num_cells": 5}, "num_datasets = 6 is more than num_cells = 5"),
        ({"num_cels": 5}, "unknown key 'num_cels'. Did you mean 'num_cells'"),
    ],
)
def test_what_does_not_fit_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        config(**keys)
