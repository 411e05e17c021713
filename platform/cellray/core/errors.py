"""The errors a user can meet: each says what was given, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CellrayError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "StoppedError",
    "TrackingError",
    "did_you_mean",
]


class CellrayError(Exception):
    """Base of every error that cellray raises for a reason the user can act on."""


class ConfigError(CellrayError, ValueError):
    """A configuration value, key or combination is not allowed."""


class DataError(CellrayError, ValueError):
    """Input cells, genes, labels or a store cannot be used as they are."""


class CheckpointError(CellrayError):
    """A checkpoint is missing, incomplete or does not fit what it is asked to continue."""


class StoppedError(CellrayError):
    """A training run stopped by itself, on all workers; to start it again would not help."""


class TrackingError(CellrayError):
    """The MLflow tracking store cannot be reached or refuses the run."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
