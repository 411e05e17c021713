"""The truth of a synthetic atlas as tables, how it lies in the store, and reading it back.

Where it lies:
    <store>/ms/RNA/uns/truth/<table>           SOMA data frames, one for each table of Truth
    <store>/ms/RNA/uns/truth/<name>_log_fold   dense arrays, types or datasets x V
    experiment metadata ``cellray_synthetic``  the configuration, as JSON
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import tiledbsoma

from cellray.core.errors import DataError
from cellray.core.section import to_dict
from cellray.data import schema
from cellray.data.locate import local_path, refuse_missing
from cellray.data.storage import open_soma
from cellray.data.synthetic_biology import Biology
from cellray.data.synthetic_cells import labels
from cellray.data.synthetic_config import SynthesizeConfig
from cellray.data.writer import measurement_path, write_table

__all__ = ["META_SYNTHETIC", "Truth", "load_truth", "truth_of", "write_truth"]

META_SYNTHETIC = "cellray_synthetic"

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Truth:
    """What was planted. Genes are named by ``feature_id``; log folds are natural logarithms.

    Attributes:
        config: the configuration the atlas follows from.
        genes: all V in var's order: ``feature_id``, ``feature_name``, ``role``, ``share`` of the
            library size before all effects.
        types: ``cell_type``, ``lineage``.
        markers: ``of`` (a cell type or lineage), ``level`` (``type`` or ``lineage``),
            ``feature_id``, ``log_fold``.
        edges: ``regulator``, ``target`` (feature ids), ``weight``.
        activities: ``cell_type``, ``kind`` (``regulator`` or ``pathway``), ``name`` (feature id or
            pathway), ``mean`` of the activity in cells of the type.
        pathways: ``pathway``, ``feature_id``, ``loading``.
        knockouts: ``perturbation`` (as in obs), ``regulator``, ``target``, ``log_fold``: the
            planted change of the target's rate, mean over types.
        datasets: ``dataset_id``, ``tissue``, ``cells``, ``log_library``: shift of the log library
            size.
        donors: ``donor_id``, ``dataset_id``, ``diseased``.
        type_log_fold: (types, V) effect of each type on the log rate, markers included; types in
            the order of ``types``.
        batch_log_fold: (datasets, V) effect of each dataset; in the order of ``datasets``.
    """

    config: Mapping[str, Any]
    genes: pd.DataFrame
    types: pd.DataFrame
    markers: pd.DataFrame
    edges: pd.DataFrame
    activities: pd.DataFrame
    pathways: pd.DataFrame
    knockouts: pd.DataFrame
    datasets: pd.DataFrame
    donors: pd.DataFrame
    type_log_fold: F32
    batch_log_fold: F32


_TABLES = tuple(f.name for f in fields(Truth) if f.name != "config" and "fold" not in f.name)
_ARRAYS = ("type_log_fold", "batch_log_fold")


def _markers(atlas: Biology, ids: npt.NDArray[np.object_]) -> pd.DataFrame:
    words = labels(atlas)
    groups = [
        (name, level, rows)
        for level, names, sets in (
            ("lineage", words.lineages, atlas.lineage_markers),
            ("type", words.types, atlas.type_markers),
        )
        for name, rows in zip(names, sets, strict=True)
    ]
    sizes = [len(rows) for *_, rows in groups]
    return pd.DataFrame(
        {
            "of": np.repeat([name for name, *_ in groups], sizes),
            "level": np.repeat([level for _, level, _ in groups], sizes),
            "feature_id": ids[np.concatenate([rows for *_, rows in groups])],
            "log_fold": np.full(sum(sizes), atlas.config.marker_log_fold),
        }
    )


def _activities(atlas: Biology, ids: npt.NDArray[np.object_]) -> pd.DataFrame:
    words = labels(atlas)
    parts = (
        ("regulator", list(ids[atlas.regulators]), atlas.regulator_activity),
        ("pathway", words.pathways, atlas.pathway_activity),
    )
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "cell_type": np.repeat(words.types, len(names)),
                    "kind": kind,
                    "name": np.tile(np.array(names, dtype=object), len(words.types)),
                    "mean": means.reshape(-1),
                }
            )
            for kind, names, means in parts
        ],
        ignore_index=True,
    )


def _knockouts(atlas: Biology, ids: npt.NDArray[np.object_]) -> pd.DataFrame:
    words = labels(atlas)
    own = atlas.edge_regulator < atlas.config.num_knockouts
    regulator, weight = atlas.edge_regulator[own], atlas.edge_weight[own]
    mean = atlas.regulator_activity.mean(axis=0)
    return pd.DataFrame(
        {
            "perturbation": np.array(words.knockouts, dtype=object)[regulator],
            "regulator": ids[atlas.regulators[regulator]],
            "target": ids[atlas.edge_target[own]],
            "log_fold": -weight * mean[regulator],
        }
    )


def truth_of(atlas: Biology) -> Truth:
    """The planted truth of an atlas."""
    config, words = atlas.config, labels(atlas)
    ids = np.array(atlas.gene_ids, dtype=object)
    sizes = [len(g) for g in atlas.pathway_of]
    datasets = np.array(words.datasets, dtype=object)
    members = np.concatenate([np.zeros(0, np.int64), *atlas.pathway_of]).astype(np.int64)
    return Truth(
        config=to_dict(config),
        genes=pd.DataFrame(
            {
                "feature_id": ids,
                "feature_name": np.array(atlas.gene_names, dtype=object),
                "role": atlas.roles.astype(object),
                "share": atlas.base,
            }
        ),
        types=pd.DataFrame(
            {
                "cell_type": words.types,
                "lineage": np.array(words.lineages, dtype=object)[atlas.lineage_of],
            }
        ),
        markers=_markers(atlas, ids),
        edges=pd.DataFrame(
            {
                "regulator": ids[atlas.regulators[atlas.edge_regulator]],
                "target": ids[atlas.edge_target],
                "weight": atlas.edge_weight,
            }
        ),
        activities=_activities(atlas, ids),
        pathways=pd.DataFrame(
            {
                "pathway": np.repeat(np.array(words.pathways, dtype=object), sizes),
                "feature_id": ids[members],
                "loading": np.concatenate([np.zeros(0), *atlas.pathway_loading]),
            }
        ),
        knockouts=_knockouts(atlas, ids),
        datasets=pd.DataFrame(
            {
                "dataset_id": datasets,
                "tissue": np.array(words.tissues, dtype=object)[atlas.dataset_tissue],
                "cells": np.diff(atlas.dataset_starts),
                "log_library": atlas.dataset_log_library,
            }
        ),
        donors=pd.DataFrame(
            {
                "donor_id": words.donors,
                "dataset_id": np.repeat(datasets, config.donors_per_dataset),
                "diseased": atlas.donor_diseased(),
            }
        ),
        type_log_fold=atlas.type_log_fold,
        batch_log_fold=np.stack([atlas.batch_log_fold(d) for d in range(config.num_datasets)]),
    )


def _to_arrow(frame: pd.DataFrame) -> pa.Table:
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    texts = [
        pa.field(f.name, pa.large_string() if pa.types.is_string(f.type) else f.type)
        for f in table.schema
    ]
    return table.cast(pa.schema(texts))


def write_truth(place: Path, truth: Truth) -> None:
    """Write the truth into the experiment that is at ``place``."""
    folder = measurement_path(place) / "uns" / "truth"
    folder.mkdir(parents=True)
    names = [name for name in _TABLES if len(getattr(truth, name))]
    for name in names:
        write_table(folder / name, _to_arrow(getattr(truth, name)))
    for name in _ARRAYS:
        values = np.ascontiguousarray(getattr(truth, name), dtype=np.float32)
        where = str(folder / name)
        tiledbsoma.DenseNDArray.create(where, type=pa.float32(), shape=values.shape).close()
        with tiledbsoma.open(where, "w") as array:
            array.write(tuple(slice(0, n) for n in values.shape), pa.Tensor.from_numpy(values))
    with tiledbsoma.open(str(place), "w") as experiment:
        experiment.metadata[META_SYNTHETIC] = json.dumps(dict(truth.config))
        group = experiment.ms[schema.MEASUREMENT].add_new_collection("uns")
        inner = group.add_new_collection("truth")
        for name in [*names, *_ARRAYS]:
            with open_soma(str(folder / name)) as member:
                inner.set(name, member, use_relative_uri=True)


def _empty(name: str) -> pd.DataFrame:
    """A table without rows: what an atlas without, say, pathways has."""
    columns = {
        "markers": ["of", "level", "feature_id", "log_fold"],
        "edges": ["regulator", "target", "weight"],
        "activities": ["cell_type", "kind", "name", "mean"],
        "pathways": ["pathway", "feature_id", "loading"],
        "knockouts": ["perturbation", "regulator", "target", "log_fold"],
    }
    return pd.DataFrame({column: [] for column in columns[name]})


def load_truth(uri: str) -> Truth:
    """The planted truth of a synthetic atlas.

    A store that files were ingested into afterwards is no longer one: it has no truth.

    Args:
        uri: a store that ``cellray synthesize`` wrote: a local folder or an object-store URI.

    Raises:
        DataError: there is no store, or it is not a synthetic atlas.
    """
    path = local_path(uri)
    if path is not None:
        refuse_missing(path)
    where = str(path) if path is not None else uri
    with open_soma(where) as experiment:
        if META_SYNTHETIC not in experiment.metadata:
            raise DataError(
                f"'{uri}' is not a synthetic atlas: no truth was planted in it. "
                "`cellray synthesize` makes one"
            )
        config = json.loads(experiment.metadata[META_SYNTHETIC])
        stored = experiment.ms[schema.MEASUREMENT]["uns"]["truth"]
        found: dict[str, Any] = {}
        for name in _TABLES:
            if name not in stored:
                found[name] = _empty(name)
                continue
            frame = stored[name].read().concat().to_pandas().sort_values(schema.JOINID)
            found[name] = frame.drop(columns=schema.JOINID).reset_index(drop=True)
        for name in _ARRAYS:
            found[name] = stored[name].read().to_numpy()
    known = {k: v for k, v in config.items() if k in SynthesizeConfig.model_fields}
    return Truth(config=known, **found)
