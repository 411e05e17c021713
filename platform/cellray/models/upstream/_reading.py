"""Reading published files without running what they hold: pickles, safetensors, gene lists.

Pickles may run code when they are read. Tensors are read with torch's weights-only reader, and the
dictionaries of genes with a reader that knows plain values only; a file that asks for more is
refused with the names it asks for, unless the user allows it.
"""

from __future__ import annotations

import gzip
import json
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.core.errors import CheckpointError, DataError

__all__ = ["find_file", "read_json", "read_plain_pickle", "read_tensors"]

_CODE = (
    "reading it may run code of whoever made it. If you trust its source, give --allow-code; "
    "otherwise ask for the weights as safetensors"
)
# What a dictionary of plain values may need: NumPy's numbers and arrays, and no code.
_PLAIN = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("collections", "OrderedDict"),
}


def find_file(folder: Path, patterns: list[str]) -> Path | None:
    """The first file of ``folder`` that fits one of the patterns, in their order."""
    for pattern in patterns:
        found = sorted(p for p in folder.glob(pattern) if p.is_file())
        if found:
            return found[-1]
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: the file is not one.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"'{path}' holds a {type(raw).__name__}, not an object of names")
    return raw


def read_tensors(path: Path, *, allow_code: bool) -> dict[str, Any]:
    """What a safetensors file or a torch pickle (``.pt``, ``.pth``, ``.ckpt``, ``.bin``) holds.

    Raises:
        CheckpointError: the file is missing, truncated, no such file, or holds code and
            ``allow_code`` is False.
    """
    if not path.is_file():
        raise CheckpointError(f"no weight file at '{path}'")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{path}' is truncated or not safetensors: {error}") from error
    try:
        raw = torch.load(path, map_location="cpu", weights_only=not allow_code)
    except pickle.UnpicklingError as error:
        found = _globals(path)
        if found and not allow_code:
            raise CheckpointError(
                f"'{path}' holds more than tensors ({', '.join(found[:6])}): {_CODE}"
            ) from error
        raise CheckpointError(f"'{path}' is truncated or no torch file: {error}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"'{path}' is truncated or no torch file: {error}") from error
    except AttributeError as error:  # a class that the allowed code needs is not there
        raise CheckpointError(f"'{path}' needs code that is not installed: {error}") from error
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(raw).__name__}, not a table of tensors")
    return dict(raw)


def _globals(path: Path) -> list[str]:
    """Names a pickle imports that plain tensors do not need."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inner = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                data = archive.read(inner)
        else:
            data = path.read_bytes()
        return [name for name in _imports(data) if not name.startswith(("torch.", "collections."))]
    except (OSError, StopIteration, zipfile.BadZipFile, ValueError):
        return []


def _imports(data: bytes) -> list[str]:
    """Dotted names of what a pickle imports, in order, as far as it can be read."""
    found: dict[str, None] = {}
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE"):
                strings.append(str(argument))
            elif opcode.name == "GLOBAL":
                found[".".join(str(argument).split(" "))] = None
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                found[".".join(strings[-2:])] = None
    except (ValueError, IndexError):
        pass  # cut short: what was found so far
    return list(found)


class _Plain(pickle.Unpickler):
    """Reads plain values; refuses everything that is not."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_plain_pickle(path: Path, *, allow_code: bool) -> Any:
    """A pickle of plain values, such as a dictionary of genes.

    Raises:
        CheckpointError: it holds more and ``allow_code`` is False, or it is no pickle.
    """
    try:
        with path.open("rb") as file:
            if allow_code:
                return pickle.load(file)
            return _Plain(file).load()
    except pickle.UnpicklingError as error:
        names = [n for n in _imports(path.read_bytes()) if tuple(n.rsplit(".", 1)) not in _PLAIN]
        if names:
            raise CheckpointError(
                f"'{path}' holds more than plain values ({', '.join(names[:6])}): {_CODE}"
            ) from error
        raise CheckpointError(f"'{path}' is no pickle: {error}") from error
    except (OSError, EOFError, ValueError, AttributeError, ImportError, IndexError) as error:
        raise CheckpointError(f"'{path}' is truncated or no pickle: {error}") from error


def as_text(path: Path) -> str:
    """A text file, also ``.gz``.

    Raises:
        DataError: it cannot be read as text.
    """
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read as text: {error}") from error


def plain_numbers(raw: Mapping[Any, Any]) -> dict[str, float]:
    """Name -> number, of a dictionary with NumPy numbers in it."""
    return {str(name): float(np.asarray(value)) for name, value in raw.items()}
