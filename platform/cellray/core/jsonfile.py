"""Reading JSON files that cellray wrote, and saying which one is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cellray.core.errors import DataError

__all__ = ["read_json", "read_table"]


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
    except (OSError, ValueError, RecursionError) as error:  # a ValueError: no text, no JSON
        raise DataError(f"'{file}' is damaged, no {what}: {error}; {cure}") from error


def read_table(file: Path, *keys: str, what: str, cure: str) -> dict[str, Any]:
    """A JSON object that has ``keys`` at least; arguments and errors as of :func:`read_json`."""
    found = read_json(file, what=what, cure=cure)
    if not isinstance(found, dict) or not set(keys) <= set(found):
        wanted = f"with {', '.join(keys)}" if keys else "of keys and values"
        raise DataError(f"'{file}' is damaged, no {what}: it is no table {wanted}; {cure}")
    return found
