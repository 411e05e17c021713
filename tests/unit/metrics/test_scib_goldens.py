"""Our metrics against scib-metrics 0.5.10 on stored arrays (tests/make_scib_goldens.py)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cellray.metrics.clustering import (
    agreement,
    kmeans_clusters,
    leiden_scan,
    score_best_clustering,
)
from cellray.metrics.graphs import connectivities
from cellray.metrics.kbet import acceptance_rate, kbet, kbet_by_label
from cellray.metrics.mixing import (
    clisi,
    graph_connectivity,
    ilisi,
    lisi,
    neighbour_weights,
    pcr,
    pcr_comparison,
)
from cellray.metrics.neighbours import Neighbours, nearest_neighbours
from cellray.metrics.silhouette import asw_batch, asw_label, bras, isolated_asw, silhouette_widths

DATA = Path(__file__).resolve().parents[2] / "data"
STORED = json.loads((DATA / "scib_goldens.json").read_text())
CASES = ("uneven", "duplicates", "islands")


@cache
def arrays(case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / "scib_goldens.npz") as stored:
        found = {
            name.removeprefix(f"{case}_"): stored[name]
            for name in stored.files
            if name.startswith(case)
        }
    for name in ("points", "before", "labels", "batches", "kmeans"):
        found[name] = found[name].astype(float if name in ("points", "before") else np.int64)
    return found


@cache
def near(case: str) -> Neighbours:
    return nearest_neighbours(arrays(case)["points"], 89)


def golden(case: str, name: str) -> float:
    return float(STORED["cases"][case][name])


def test_the_goldens_are_of_the_version_that_is_named() -> None:
    assert STORED["scib_metrics"] == "0.5.10"
    assert set(STORED["cases"]) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_silhouettes(case: str) -> None:
    a = arrays(case)
    widths = silhouette_widths(a["points"], a["labels"])
    ours = {
        "silhouette_label": asw_label(widths),
        "isolated_labels": isolated_asw(widths, a["labels"], a["batches"]),
        "silhouette_batch": asw_batch(a["points"], a["labels"], a["batches"]),
        "bras": bras(a["points"], a["labels"], a["batches"]),
    }
    for name, value in ours.items():
        assert value == pytest.approx(golden(case, name), abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_lisi_of_every_cell_and_scaled(case: str) -> None:
    a, found = arrays(case), near(case)
    weights = neighbour_weights(found, perplexity=30)
    of_labels, of_batches = (lisi(found, weights, a[kind]) for kind in ("labels", "batches"))
    np.testing.assert_allclose(of_labels, a["lisi_labels"], atol=1e-3)
    np.testing.assert_allclose(of_batches, a["lisi_batches"], atol=1e-3)
    num_labels, num_batches = (len(np.unique(a[kind])) for kind in ("labels", "batches"))
    assert clisi(of_labels, num_labels) == pytest.approx(golden(case, "clisi"), abs=1e-3)
    assert ilisi(of_batches, num_batches) == pytest.approx(golden(case, "ilisi"), abs=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_connectivity_and_principal_component_regression(case: str) -> None:
    a = arrays(case)
    directed = graph_connectivity(near(case).first(14).graph(), a["labels"], directed=True)
    assert directed == pytest.approx(golden(case, "graph_connectivity"), abs=1e-6)
    assert pcr(a["points"], a["batches"]) == pytest.approx(golden(case, "pcr"), abs=1e-6)
    compared = pcr_comparison(a["before"], a["points"], a["batches"])
    assert compared == pytest.approx(golden(case, "pcr_comparison"), abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_chi_square_test_of_given_neighbours(case: str) -> None:
    indices = near(case).first(49).with_self().indices
    ours = acceptance_rate(indices, arrays(case)["batches"])
    assert ours == pytest.approx(golden(case, "kbet_of_50_neighbours"), abs=1e-6)


@pytest.mark.parametrize("case", ["uneven", "islands"])
def test_kbet_of_every_label(case: str) -> None:
    """Not among duplicates: rounding decides there, and two runs of theirs gave 0.93 and 1.0."""
    a = arrays(case)
    graph = connectivities(near(case).first(49))
    ours = kbet_by_label(graph, a["labels"], a["batches"])
    theirs = np.array(STORED["cases"][case]["kbet_by_label"], dtype=float)
    np.testing.assert_allclose(list(ours.values()), theirs, atol=1e-6)
    total = kbet(graph, a["labels"], a["batches"])
    assert total == pytest.approx(np.nanmean(theirs), abs=1e-6)


def test_the_goldens_reach_the_special_cases_of_kbet() -> None:
    """A label in one batch is not judged; one that falls into islands is rejected."""
    assert np.isnan(STORED["cases"]["uneven"]["kbet_by_label"][4])
    assert STORED["cases"]["islands"]["kbet_by_label"][0] == 0.0


@pytest.mark.parametrize("case", CASES)
def test_the_weights_of_the_graph(case: str) -> None:
    """UMAP solves its scales to 1e-5 only, so the weights are compared to 1e-4."""
    sums = np.asarray(connectivities(near(case).first(14)).sum(axis=1)).ravel()
    np.testing.assert_allclose(sums, arrays(case)["connectivity_sums"], atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_nmi_and_ari_of_given_clusters_and_kmeans_no_worse(case: str) -> None:
    """scib-metrics takes one start of KMeans, we the best of ten: never a larger inertia."""
    a = arrays(case)
    nmi, ari = agreement(a["labels"], a["kmeans"])
    assert nmi == pytest.approx(golden(case, "nmi_kmeans"), abs=1e-6)
    assert ari == pytest.approx(golden(case, "ari_kmeans"), abs=1e-6)

    def inertia(clusters: np.ndarray) -> float:
        groups = (a["points"][clusters == c] for c in np.unique(clusters))
        return float(sum(((g - g.mean(axis=0)) ** 2).sum() for g in groups))

    ours = kmeans_clusters(a["points"], len(np.unique(a["labels"])))
    assert inertia(ours) <= inertia(a["kmeans"]) * (1 + 1e-9)


@pytest.mark.parametrize("case", ["uneven", "islands"])
def test_the_leiden_scan_at_their_resolutions_and_seed(case: str) -> None:
    """Not among duplicates: moves of equal gain there follow the order of the edges."""
    graph = connectivities(near(case).first(14))
    resolutions = [0.2 * step for step in range(1, 11)]
    scan = leiden_scan(graph, resolutions=resolutions, seed=42)
    ours = score_best_clustering(scan, arrays(case)["labels"])
    nmi, ari = golden(case, "nmi_leiden_10_resolutions"), golden(case, "ari_leiden_10_resolutions")
    assert ours["nmi.leiden_nmi_opt.v1"] == pytest.approx(nmi, abs=1e-6)
    assert ours["ari.leiden_nmi_opt.v1"] == pytest.approx(ari, abs=1e-6)
