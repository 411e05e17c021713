"""Reading JSON files that cellray wrote, and saying which one is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cellray.core.errors import DataError

__all__ = ["read_json"]


def read_json(file: Path, *, what: str, cure: str) -> Any:
    """What a JSON file holds.

    Args:
        file: UTF-8.
        what: what it should be, e.g. ``result of a benchmark``.
        cure: what to do about a damaged one.

    Raises:
        DataError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise DataError(f"'{file}' is damaged, no {what}: {error}; {cure}") from error
