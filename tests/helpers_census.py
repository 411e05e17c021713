"""A small release of the CELLxGENE Census: its collections, columns and tiling, known counts.

``census_info`` (summary, datasets, organisms), ``census_data/{homo_sapiens, mus_musculus}`` with
``obs``, ``ms/RNA/var``, ``ms/RNA/X/{raw, normalized}`` and the presence matrix, as schema 2.4 has
them: strings of obs dictionary-encoded, X in tiles of 2,048 x 2,048, capacity 65,536, zstd 9.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tiledbsoma
from scipy import sparse

F32 = npt.NDArray[np.float32]
TISSUES = ("blood", "lung", "liver")
TYPES = (("B cell", "CL:0000236"), ("T cell", "CL:0000084"), ("monocyte", "CL:0000576"))
NUM_DATASETS = 3
_ZSTD = {"_type": "ZstdFilter", "level": 9}
_X_OPTIONS = {
    "tiledb": {
        "create": {
            "capacity": 65_536,
            "allows_duplicates": True,
            "cell_order": "row-major",
            "tile_order": "row-major",
            "dims": {
                "soma_dim_0": {"tile": 2048, "filters": [_ZSTD]},
                "soma_dim_1": {"tile": 2048, "filters": ["ByteShuffleFilter", _ZSTD]},
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
        }
    }
}


def census_counts(num_cells: int = 300, num_genes: int = 80, seed: int = 0) -> F32:
    """(N, V) raw counts, about a third of them non-zero."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2.0, (num_cells, num_genes)) * (rng.random((num_cells, num_genes)) < 0.4)
    counts[np.arange(num_cells), rng.integers(0, num_genes, num_cells)] += 1
    return counts.astype(np.float32)


def _words(values: list[str]) -> pa.Array:
    encoded = pa.array(values, pa.large_string()).dictionary_encode()
    return encoded.cast(pa.dictionary(pa.int16(), pa.large_string()))


def census_obs(counts: F32, joinids: npt.NDArray[np.int64]) -> pa.Table:
    """obs of the given cells: datasets one after another, tissue by dataset, every fourth cell a
    duplicate of another data set (``is_primary_data`` false)."""
    num = len(counts)
    dataset = np.arange(num) * NUM_DATASETS // max(num, 1)
    kind = np.arange(num) % len(TYPES)
    nnz = (counts > 0).sum(axis=1)
    mean = counts.sum(axis=1) / np.maximum(nnz, 1)
    spread = (counts**2).sum(axis=1) / np.maximum(nnz, 1) - mean**2
    tissue = [TISSUES[d % len(TISSUES)] for d in dataset]
    return pa.table(
        {
            "soma_joinid": joinids,
            "dataset_id": _words([f"dataset-{d}" for d in dataset]),
            "assay": _words(["10x 3' v3"] * num),
            "assay_ontology_term_id": _words(["EFO:0009922"] * num),
            "cell_type": _words([TYPES[k][0] for k in kind]),
            "cell_type_ontology_term_id": _words([TYPES[k][1] for k in kind]),
            "development_stage": _words(["adult stage"] * num),
            "development_stage_ontology_term_id": _words(["HsapDv:0000258"] * num),
            "disease": _words(["normal"] * num),
            "disease_ontology_term_id": _words(["PATO:0000461"] * num),
            "donor_id": _words([f"donor-{i % 5}" for i in range(num)]),
            "is_primary_data": np.arange(num) % 4 != 3,
            "observation_joinid": pa.array([f"obs{j:08d}" for j in joinids], pa.large_string()),
            "self_reported_ethnicity": _words(["unknown"] * num),
            "self_reported_ethnicity_ontology_term_id": _words(["unknown"] * num),
            "sex": _words([("female", "male")[i % 2] for i in range(num)]),
            "sex_ontology_term_id": _words([f"PATO:000038{3 + i % 2}" for i in range(num)]),
            "suspension_type": _words(["cell"] * num),
            "tissue": _words(tissue),
            "tissue_ontology_term_id": _words([f"UBERON:{len(t):07d}" for t in tissue]),
            "tissue_type": _words(["tissue"] * num),
            "tissue_general": _words(tissue),
            "tissue_general_ontology_term_id": _words([f"UBERON:{len(t):07d}" for t in tissue]),
            "raw_sum": counts.sum(axis=1).astype(np.float64),
            "nnz": nnz.astype(np.int64),
            "raw_mean_nnz": mean.astype(np.float64),
            "raw_variance_nnz": spread.astype(np.float64),
            "n_measured_vars": np.full(num, counts.shape[1], dtype=np.int64),
        }
    )


def census_var(counts: F32) -> pa.Table:
    """var of the genes."""
    num = counts.shape[1]
    return pa.table(
        {
            "soma_joinid": np.arange(num),
            "feature_id": pa.array([f"ENSG{i:011d}" for i in range(num)], pa.large_string()),
            "feature_name": pa.array([f"GENE{i}" for i in range(num)], pa.large_string()),
            "feature_type": pa.array(["protein_coding"] * num, pa.large_string()),
            "feature_length": np.full(num, 1500, dtype=np.int64),
            "nnz": (counts > 0).sum(axis=0).astype(np.int64),
            "n_measured_obs": np.full(num, len(counts), dtype=np.int64),
        }
    )


def _frame(parent: Any, name: str, table: pa.Table, last: int | None = None) -> None:
    last = int(table.column("soma_joinid")[-1].as_py()) if last is None else last
    frame = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, last)]
    )
    frame.close()
    # TileDB finds the schema that knows the labels by its time: not in the same millisecond
    time.sleep(0.003)
    with tiledbsoma.open(frame.uri, "w") as frame:
        frame.write(table)


def _triples(counts: F32, joinids: npt.NDArray[np.int64]) -> pa.Table:
    coo = sparse.csr_matrix(counts).tocoo()
    return pa.table(
        {
            "soma_dim_0": joinids[coo.row],
            "soma_dim_1": coo.col.astype(np.int64),
            "soma_data": coo.data.astype(np.float32),
        }
    )


def write_organism(
    experiment: Any, counts: F32, *, joinids: npt.NDArray[np.int64] | None = None
) -> None:
    """Fill an experiment, open for writing, with cells as the Census does.

    Args:
        experiment: empty.
        counts: (N, V).
        joinids: (N,) ascending; default 0 .. N-1.
    """
    joinids = np.arange(len(counts)) if joinids is None else joinids
    _frame(experiment, "obs", census_obs(counts, joinids))
    rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
    _frame(rna, "var", census_var(counts))
    layers = rna.add_new_collection("X")
    shape = (int(joinids[-1]) + 1, counts.shape[1])
    sizes = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for name, values in (("raw", counts), ("normalized", counts / sizes)):
        x = layers.add_new_sparse_ndarray(
            name, type=pa.float32(), shape=shape, platform_config=_X_OPTIONS
        )
        x.write(_triples(values.astype(np.float32), joinids))
    presence = rna.add_new_sparse_ndarray(
        "feature_dataset_presence_matrix", type=pa.bool_(), shape=(NUM_DATASETS, shape[1])
    )
    every = np.indices((NUM_DATASETS, shape[1])).reshape(2, -1)
    presence.write(
        pa.table({"soma_dim_0": every[0], "soma_dim_1": every[1], "soma_data": every[0] >= 0})
    )


def write_census(
    root: str | Path, organisms: dict[str, F32], *, joinids: dict[str, Any] | None = None
) -> str:
    """Write a release at ``root``; returns ``root`` as text."""
    with tiledbsoma.Collection.create(str(root)) as census:
        info = census.add_new_collection("census_info")
        labels = {"census_schema_version": "2.4.0", "dataset_schema_version": "7.0.0"}
        summary = {
            "soma_joinid": np.arange(2),
            "label": pa.array(list(labels), pa.large_string()),
            "value": pa.array(list(labels.values()), pa.large_string()),
        }
        _frame(info, "summary", pa.table(summary))
        datasets = {
            "soma_joinid": np.arange(NUM_DATASETS),
            "dataset_id": pa.array(
                [f"dataset-{d}" for d in range(NUM_DATASETS)], pa.large_string()
            ),
        }
        _frame(info, "datasets", pa.table(datasets))
        data = census.add_new_collection("census_data")
        for name, counts in organisms.items():
            experiment = data.add_new_collection(name, tiledbsoma.Experiment)
            write_organism(experiment, counts, joinids=(joinids or {}).get(name))
    return str(root)
