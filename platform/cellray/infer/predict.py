"""A fine-tuned model in MLflow's registry: loads back in a fresh process and annotates."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import anndata as ad
import mlflow
import numpy as np
import pandas as pd
from mlflow.models import Model
from mlflow.pyfunc import PythonModel

from cellray import __version__
from cellray.core.errors import DataError
from cellray.infer.load import load
from cellray.train.tracking import Tracker

__all__ = ["Annotator", "register"]


def as_anndata(cells: Any) -> ad.AnnData:
    """AnnData as it is, a path to an h5ad file, or a DataFrame of cells x genes with raw counts.

    Raises:
        DataError: anything else.
    """
    if isinstance(cells, ad.AnnData):
        return cells
    if isinstance(cells, (str, Path)):
        if not Path(cells).is_file():
            raise DataError(f"no h5ad file at '{cells}'")
        return ad.read_h5ad(cells)
    if isinstance(cells, pd.DataFrame):
        matrix = cells.to_numpy(dtype=np.float32)
        names = pd.Index([str(name) for name in cells.index])
        genes = pd.DataFrame(index=pd.Index([str(name) for name in cells.columns]))
        return ad.AnnData(matrix, obs=pd.DataFrame(index=names), var=genes)
    raise DataError(
        f"cells are given as {type(cells).__name__}; give AnnData, the path of an h5ad file, or a "
        "DataFrame with a row a cell and a column a gene"
    )


class Annotator(PythonModel):  # type: ignore[misc]
    """MLflow's view of a fine-tuned model: cells in, label and probability out."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint that was logged with the model."""
        self._model = load(context.artifacts["checkpoint"])

    # without type hints: MLflow would take them for a schema of lists
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Annotate cells; see :func:`as_anndata` for what is taken."""
        return self._model.annotate(as_anndata(model_input))


def register(tracker: Tracker, model_dir: str | Path, *, name: str) -> str:
    """Log a fine-tuned model to a run and register it.

    Args:
        tracker: the run it belongs to.
        model_dir: exported model folder.
        name: registered name; "" logs without registering.

    Returns:
        The model's URI: ``models:/name/version``, or the logged model's own.
    """
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracker.uri)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        # by run id, not as the active run: whatever experiment the caller has set stays as it is
        info = Model.log(
            artifact_path=None,
            name="annotator",
            flavor=mlflow.pyfunc,
            run_id=tracker.run_id,
            registered_model_name=name or None,
            python_model=str(Path(__file__).with_name("registered.py")),
            artifacts={"checkpoint": str(model_dir)},
            pip_requirements=[f"cellray=={__version__}"],
        )
    finally:
        mlflow.set_tracking_uri(before)
    if name:
        return f"models:/{name}/{info.registered_model_version}"
    return str(info.model_uri)
