"""cellray: a distributed data and training platform for single-cell foundation models, on Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellray.infer.load import LoadedModel

__all__ = ["__version__", "load", "run"]

__version__ = "0.1.0"


def load(path: str) -> LoadedModel:
    """Load a checkpoint folder or an MLflow model URI; see :mod:`cellray.infer.load`."""
    from cellray.infer.load import load as load_model

    return load_model(path)


def run(config: Any) -> Any:
    """Run any job from its section and return its result object; see :mod:`cellray.runs`."""
    from cellray.runs import run_job

    return run_job(config)
