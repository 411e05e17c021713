"""Make the demonstration cells: one small h5ad file a donor, from the full human pancreas set.

Run with CELLRAY_DATA set to the folder of public data sets:

    python tests/data/make_pancreas.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
from scipy import sparse

SOURCE = "cells/pancreas_baron_human_donors123.h5ad"
CELLS_PER_TYPE = 150
SEED = 20161026  # the day the paper appeared
LIMIT_BYTES = 7_500_000
OBS = ["cell_type", "cell_ontology_id", "donor", "library", "organism", "tissue", "assay"]


def pick(obs, rng):
    """Row numbers of at most CELLS_PER_TYPE cells of each type, in file order."""
    groups = obs.groupby("cell_type", observed=True, sort=True).indices
    picked = [
        rng.choice(rows, min(len(rows), CELLS_PER_TYPE), replace=False) for rows in groups.values()
    ]
    return np.sort(np.concatenate(picked))


def write(part, path):
    """Write ``part`` and repack it: matrix int32, byte-shuffled, gzip 9; var of fixed width.

    HDF5 keeps strings of variable length in a heap that no filter compresses: 1.4 MB a file.
    """
    part.write_h5ad(
        path, compression="gzip", compression_opts=9, convert_strings_to_categoricals=False
    )
    with h5py.File(path, "r+") as file:
        group = file["X"]
        for name in ("data", "indices", "indptr"):
            values = group[name][:].astype(np.int32)
            del group[name]
            group.create_dataset(
                name,
                data=values,
                chunks=(min(len(values), 1 << 18),),
                compression="gzip",
                compression_opts=9,
                shuffle=True,
                track_times=False,
            )
        for name in list(file["var"]):
            old = file["var"][name]
            attrs, texts = dict(old.attrs), np.array([t.encode() for t in old.asstr()[:]])
            del file["var"][name]
            new = file["var"].create_dataset(
                name, data=texts, compression="gzip", compression_opts=9, track_times=False
            )
            new.attrs.update(attrs)
    # deleted datasets leave holes in an HDF5 file: copy what is left into a fresh one
    packed = path.with_suffix(".packed")
    with h5py.File(path) as old, h5py.File(packed, "w") as new:
        new.attrs.update(old.attrs)
        for name in old:
            old.copy(name, new)
    packed.replace(path)


def main():
    root = os.environ.get("CELLRAY_DATA")
    if not root:
        sys.exit("set CELLRAY_DATA to the folder that holds " + SOURCE)
    target = Path(__file__).parent / "pancreas"
    target.mkdir(exist_ok=True)
    full = ad.read_h5ad(Path(root) / SOURCE)
    rng = np.random.default_rng(SEED)
    total = 0
    for donor in sorted(full.obs["donor"].unique()):
        cells = full[full.obs["donor"] == donor]
        part = cells[pick(cells.obs, rng)]
        seen = np.asarray((part.X > 0).sum(axis=0)).ravel() > 0
        obs = part.obs[OBS].copy()
        for name in OBS:
            obs[name] = obs[name].astype(str).astype("category")
        var = part.var.loc[seen, ["gene_symbol", "ensembl_id"]].astype(str)
        small = ad.AnnData(sparse.csr_matrix(part.X[:, seen]), obs=obs, var=var)
        path = target / f"{donor}.h5ad"
        write(small, path)
        total += path.stat().st_size
        types = small.obs["cell_type"].value_counts().to_dict()
        print(
            f"{path.name}: {small.n_obs} x {small.n_vars}, {path.stat().st_size:,} bytes, {types}"
        )
    print(f"together {total:,} bytes (limit {LIMIT_BYTES:,})")
    if total > LIMIT_BYTES:
        sys.exit("too large: lower CELLS_PER_TYPE")


if __name__ == "__main__":
    main()
