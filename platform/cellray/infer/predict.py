"""A fine-tuned model in MLflow's registry: loads back in a fresh process and annotates.

MLflow's input schemas know tensors and tables of named columns, and refuse anything else before the
model sees it. Cells come as AnnData, as a file, or as a table with the columns of whatever panel
was measured, so a registered model declares what it returns and what it may be asked
(``refuse_below``, ``layer``), and checks its input itself; its genes are the artifact
``vocab.json.gz``.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import anndata as ad
import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from packaging.requirements import Requirement

from cellray import __version__
from cellray.core.errors import DataError
from cellray.core.section import flatten
from cellray.infer.load import LoadedModel, load
from cellray.train.tracking import Tracker

__all__ = ["Annotator", "as_anndata", "register", "requirements", "signature"]

_DIGEST = "cellray.model_sha256"


def as_anndata(cells: Any) -> ad.AnnData:
    """AnnData as it is, a path to an h5ad file, or a DataFrame of cells x genes with raw counts.

    Raises:
        DataError: anything else, a file that cannot be read, or a column that holds no numbers.
    """
    if isinstance(cells, ad.AnnData):
        return cells
    if isinstance(cells, (str, Path)):
        if not Path(cells).is_file():
            raise DataError(f"no h5ad file at '{cells}'")
        try:
            return ad.read_h5ad(cells)
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f"'{cells}' cannot be read as h5ad: {error}") from error
    if isinstance(cells, pd.DataFrame):
        return _of_table(cells)
    raise DataError(
        f"cells are given as {type(cells).__name__}; give AnnData, the path of an h5ad file, or a "
        "DataFrame with a row a cell and a column a gene"
    )


def _of_table(cells: pd.DataFrame) -> ad.AnnData:
    texts = [str(c) for c, kind in cells.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    if texts:
        raise DataError(
            f"{len(texts)} columns of the DataFrame hold no numbers: {', '.join(texts[:5])}; give "
            "a row a cell and a column a gene, with raw counts and nothing else"
        )
    names = pd.Index([str(name) for name in cells.index])
    genes = pd.DataFrame(index=pd.Index([str(name) for name in cells.columns]))
    matrix = cells.to_numpy(dtype=np.float32)
    return ad.AnnData(matrix, obs=pd.DataFrame(index=names), var=genes)


class Annotator(PythonModel):  # type: ignore[misc]
    """MLflow's view of a fine-tuned model: cells in, label and probability out."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint that was logged with the model."""
        self._model = load(context.artifacts["checkpoint"])

    # without type hints: MLflow would take them for a schema of lists
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Annotate cells; see :func:`as_anndata` for what is taken.

        Args:
            context: MLflow's.
            model_input: the cells.
            params: ``refuse_below`` and ``layer``, see
                :meth:`cellray.infer.load.LoadedModel.annotate`; a layer of "" is ``X``.
        """
        asked = params or {}
        return self._model.annotate(
            as_anndata(model_input),
            layer=asked.get("layer") or None,
            refuse_below=asked.get("refuse_below"),
        )


def signature(model: LoadedModel) -> ModelSignature:
    """What a registered model returns and may be asked; see the module for why no input is named.

    The default of ``refuse_below`` is the model's own cutoff.
    """
    return ModelSignature(
        outputs=Schema([ColSpec("string", "label"), ColSpec("double", "probability")]),
        params=ParamSchema(
            [
                ParamSpec("refuse_below", "double", float(model.cutoff)),
                ParamSpec("layer", "string", ""),
            ]
        ),
    )


def requirements() -> list[str]:
    """Cellray and what it needs to run, at the versions installed here, as pip wants them."""
    pinned = [f"cellray=={__version__}"]
    try:
        declared = metadata.requires("cellray") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return pinned
    for text in declared:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = metadata.version(wanted.name).partition("+")[0]  # a local build is on no index
        pinned.append(f"{wanted.name}=={version}")
    return pinned


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 over names and contents."""
    sha = hashlib.sha256()
    for file in sorted(files):
        sha.update(file.name.encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(8 << 20):
                sha.update(chunk)
    return sha.hexdigest()


def _tags(model: LoadedModel) -> dict[str, str]:
    """What a registry is searched by."""
    manifest = model.manifest
    run = flatten(manifest.run)
    uri = run.get("data.uri", "")
    facts = {
        "family": manifest.family,
        "task": run.get("task.name", ""),
        "label": run.get("task.label", ""),
        "corpus": ", ".join(uri) if isinstance(uri, list) else uri,
        "init_from": run.get("init_from", ""),
        "adapt": run.get("adapt.mode", ""),
        "data_fingerprint": manifest.data_fingerprint,
        "vocab_fingerprint": manifest.vocab_fingerprint,
        "num_classes": len(manifest.classes),
        "code": manifest.code_version,
    }
    return {f"cellray.{key}": str(value) for key, value in facts.items() if value}


def register(
    tracker: Tracker,
    model_dir: str | Path,
    *,
    name: str,
    config: str | Path | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Log a fine-tuned model to a run and register it; the same model of a run only once.

    Args:
        tracker: the run it belongs to.
        model_dir: exported model folder.
        name: registered name; "" logs without registering.
        config: file of the run's configuration, kept with the model.
        metrics: of the model on cells that were held out; those of validation are in its manifest.

    Returns:
        The model's URI: ``models:/name/version``, or the logged model's own.
    """
    client = MlflowClient(tracking_uri=tracker.uri)
    folder = Path(model_dir)
    model = load(str(folder))
    tags = {**_tags(model), _DIGEST: _digest(folder.iterdir())}
    known = _registered(client, tracker.run_id, name, tags[_DIGEST]) if name else ""
    if known:
        return known
    artifacts = {"checkpoint": str(folder), "vocabulary": str(folder / "vocab.json.gz")}
    if config is not None:
        artifacts["config"] = str(config)
    info = _log(tracker, model, name=name, tags=tags, artifacts=artifacts)
    _link_metrics(client, tracker.run_id, info.model_id, model, metrics or {})
    if not name:
        return str(info.model_uri)
    for key, value in tags.items():
        client.set_model_version_tag(name, str(info.registered_model_version), key, value)
    return f"models:/{name}/{info.registered_model_version}"


def _log(
    tracker: Tracker,
    model: LoadedModel,
    *,
    name: str,
    tags: Mapping[str, str],
    artifacts: Mapping[str, str],
) -> Any:
    """Log by run id, not as the active run: whatever experiment the caller has set stays."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracker.uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        with warnings.catch_warnings():
            # an example is for checking the input schema, of which there is none
            warnings.filterwarnings("ignore", message=".*input example was not provided")
            return Model.log(
                artifact_path=None,
                name="annotator",
                flavor=mlflow.pyfunc,
                run_id=tracker.run_id,
                registered_model_name=name or None,
                tags=dict(tags),
                step=model.manifest.step,
                signature=signature(model),
                python_model=str(Path(__file__).with_name("registered.py")),
                artifacts=dict(artifacts),
                pip_requirements=requirements(),
            )
    finally:
        mlflow.set_tracking_uri(before)


def _registered(client: MlflowClient, run_id: str, name: str, digest: str) -> str:
    """URI of the version of a name that this run has registered with these very files, or ""."""
    for version in client.search_model_versions(f"name='{name}'"):
        if version.run_id == run_id and version.tags.get(_DIGEST) == digest:
            return f"models:/{name}/{version.version}"
    return ""


def _link_metrics(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    model: LoadedModel,
    held_out: Mapping[str, float],
) -> None:
    """Log metrics of validation and test so that MLflow shows them with the model."""
    found = {k: v for k, v in model.manifest.metrics.items() if k.startswith("validation/")}
    now, step = int(time.time() * 1000), model.manifest.step
    client.log_batch(
        run_id,
        metrics=[
            Metric(key, float(value), now, step, model_id=model_id, run_id=run_id)
            for key, value in {**found, **held_out}.items()
        ],
    )
