"""Rewrite tests/data/scib_goldens.{npz,json}: small embeddings, and scib-metrics' values of them.

Run with a Python of its own, as scib-metrics brings 400 MB of JAX that the platform does not need:

    python3 -m venv /tmp/scib && /tmp/scib/bin/pip install 'scib-metrics==0.5.10'
    /tmp/scib/bin/python tests/make_scib_goldens.py

It prints every value that differs from the stored one. scib-metrics is fed what the definitions
say: double precision, the exact neighbours (the cell itself first, then by distance and index)
instead of pynndescent's, also within kBET's diffusion map; and kBET one label at a time, because in
a single call the number of diffusion components shrinks for all labels after a small one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

os.environ["JAX_ENABLE_X64"] = "1"

import jax
import numpy as np
import scib_metrics
from scib_metrics.nearest_neighbors import NeighborsResults
from scib_metrics.utils import _diffusion_nn as diffusion
from scipy.spatial.distance import cdist

DATA = Path(__file__).resolve().parent / "data"
WANTED = "0.5.10"


def uneven(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """600 cells, 5 labels, 3 uneven batches; label 4 is in batch 0 only."""
    labels = rng.choice(5, size=600, p=[0.4, 0.25, 0.15, 0.12, 0.08])
    batches = rng.choice(3, size=600, p=[0.6, 0.3, 0.1])
    batches[labels == 4] = 0
    points = rng.normal(size=(600, 10)) + 1.3 * rng.normal(size=(5, 10))[labels]
    return points + 0.5 * rng.normal(size=(3, 10))[batches], labels, batches


def duplicates(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """400 cells on 150 points of a grid of quarters: ties and duplicates everywhere, exactly."""
    labels = rng.choice(3, size=400, p=[0.5, 0.3, 0.2])
    batches = rng.choice(2, size=400, p=[0.7, 0.3])
    grid = np.round(4 * rng.normal(size=(150, 10))) / 4
    points = grid[50 * labels + rng.integers(0, 50, size=400) ** 2 // 50]
    return points + 2.0 * (labels[:, None] == np.arange(10)), labels, batches


def islands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """700 cells, 4 labels, 4 batches; label 0 is one island a batch, label 3 has 12 cells."""
    labels = np.repeat([0, 1, 2, 3], [300, 228, 160, 12])
    batches = rng.choice(4, size=700, p=[0.4, 0.3, 0.2, 0.1])
    points = rng.normal(size=(700, 10)) + 3.0 * rng.normal(size=(4, 10))[labels]
    points[labels == 0] += 12.0 * np.eye(10)[batches[labels == 0]]
    return points, labels, batches


CASES = {"uneven": (uneven, 11), "duplicates": (duplicates, 12), "islands": (islands, 13)}


def exact(points: np.ndarray, k: int) -> NeighborsResults:
    """The k nearest cells, the cell itself first, then by (distance, index)."""
    distances = cdist(points, points)
    np.fill_diagonal(distances, -1.0)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(distances, indices, axis=1)
    found[:, 0] = 0.0
    return NeighborsResults(indices=indices, distances=found)


def kbet_by_label(near: NeighborsResults, labels: np.ndarray, batches: np.ndarray) -> list[float]:
    scores = []
    for label in np.unique(labels):
        alone = np.where(labels == label, 0, 1)  # label 0 is judged first, nothing has shrunk
        _, table = scib_metrics.kbet_per_label(near, batches, alone, return_df=True)
        scores.append(float(table["kBET"][0]))
    return scores


def values_of(
    points: np.ndarray, labels: np.ndarray, batches: np.ndarray, before: np.ndarray
) -> tuple[dict[str, float | list[float]], dict[str, np.ndarray]]:
    near = exact(points, 90)
    near_15, near_50 = near.subset_neighbors(15), near.subset_neighbors(50)
    with jax.enable_x64(False):  # its KMeans works in single precision only
        single = points.astype(np.float32)
        kmeans = scib_metrics.nmi_ari_cluster_labels_kmeans(single, labels)
        clusters = scib_metrics.utils.KMeans(len(np.unique(labels))).fit(single).labels_
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(near_15, labels)
    values = {
        "nmi_kmeans": kmeans["nmi"],
        "ari_kmeans": kmeans["ari"],
        "nmi_leiden_10_resolutions": leiden["nmi"],
        "ari_leiden_10_resolutions": leiden["ari"],
        "silhouette_label": scib_metrics.silhouette_label(points, labels),
        "silhouette_batch": scib_metrics.silhouette_batch(points, labels, batches),
        "bras": scib_metrics.bras(points, labels, batches),
        "isolated_labels": scib_metrics.isolated_labels(points, labels, batches),
        "ilisi": scib_metrics.ilisi_knn(near, batches),
        "clisi": scib_metrics.clisi_knn(near, labels),
        "graph_connectivity": scib_metrics.graph_connectivity(near_15, labels),
        "pcr": scib_metrics.utils.principal_component_regression(points, batches, categorical=True),
        "pcr_comparison": scib_metrics.pcr_comparison(before, points, batches, categorical=True),
        "kbet_of_50_neighbours": scib_metrics.kbet(near_50, batches)[0],
    }
    numbers: dict[str, float | list[float]] = {k: float(v) for k, v in values.items()}
    if len(np.unique(points, axis=0)) == len(points):  # among duplicates it differs from run to run
        numbers["kbet_by_label"] = kbet_by_label(near_50, labels, batches)
    clusters = np.asarray(clusters)
    connectivities = near_15.knn_graph_connectivities.tocsr()
    arrays = {
        "lisi_labels": scib_metrics.lisi_knn(near, labels).astype(np.float32),
        "lisi_batches": scib_metrics.lisi_knn(near, batches).astype(np.float32),
        "kmeans": clusters.astype(np.int8),
        "connectivity_sums": np.asarray(connectivities.sum(axis=1)).ravel().astype(np.float32),
    }
    return numbers, arrays


def main() -> None:
    version = importlib.metadata.version("scib-metrics")
    if version != WANTED:
        raise SystemExit(f"scib-metrics {version} is installed; the goldens are of {WANTED}")
    diffusion.nearest_neighbors.pynndescent = lambda X, n_neighbors: exact(
        np.asarray(X, dtype=np.float64), n_neighbors
    )
    path = DATA / "scib_goldens.json"
    old = json.loads(path.read_text())["cases"] if path.exists() else {}
    arrays: dict[str, np.ndarray] = {}
    cases: dict[str, dict[str, float | list[float]]] = {}
    for name, (make, seed) in CASES.items():
        rng = np.random.default_rng(seed)
        points, labels, batches = make(rng)
        points = points.astype(np.float32)
        # a stronger batch effect before integration
        before = (points + 2.0 * rng.normal(size=(4, 10))[batches]).astype(np.float32)
        cells = {"points": points, "before": before}
        codes = {"labels": labels.astype(np.int8), "batches": batches.astype(np.int8)}
        cases[name], more = values_of(
            points.astype(np.float64), labels, batches, before.astype(np.float64)
        )
        arrays |= {f"{name}_{k}": v for k, v in (cells | codes | more).items()}
        for key, value in cases[name].items():
            if repr(old.get(name, {}).get(key)) != repr(value):  # NaN is NaN
                print(f"{name} {key}: {old.get(name, {}).get(key)} -> {value}")
    np.savez_compressed(DATA / "scib_goldens.npz", **arrays)
    note = "by tests/make_scib_goldens.py; see there how the arrays were made and what was fed"
    stored = {"scib_metrics": version, "note": note, "cases": cases}
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
