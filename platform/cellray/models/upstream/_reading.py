"""Reading published files without running what they hold: pickles, safetensors, gene lists.

Pickles may run code when they are read. Tensors are read with torch's weights-only reader, and the
dictionaries of genes with a reader that knows plain values only; a file that asks for more is
refused with the names it asks for, unless the user allows it.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.core.errors import CheckpointError, DataError

__all__ = ["find_file", "one_of", "read_json", "read_plain_pickle", "read_tensors"]

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
# NumPy's scalars beside tensors, such as the loss that scBERT's files keep.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")},
]
# What torch itself puts into a file of tensors.
_TENSORS = re.compile(
    r"torch\._utils\._rebuild_\w+|torch\.(\w*Storage|Size|device|dtype)|"
    r"torch\.storage\.\w+Storage|torch\._tensor\._rebuild_\w+|torch\.nn\.parameter\.Parameter|"
    r"collections\.OrderedDict|_codecs\.encode|"
    r"numpy\.(dtype|dtypes\.\w+|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
)


def one_of(found: Sequence[Path], what: str, choose: str) -> Path | None:
    """The only file of ``found``, None if there is none.

    Args:
        found: files that would do.
        what: what they are, for the message.
        choose: what a user does to choose one, for the message.

    Raises:
        CheckpointError: there are several.
    """
    if len(found) > 1:
        raise CheckpointError(
            f"'{found[0].parent}' holds {len(found)} {what}: "
            f"{', '.join(path.name for path in found)}; {choose}"
        )
    return found[0] if found else None


def fitting(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of ``folder`` that fit any of the patterns, each once, by name."""
    return sorted({p for pattern in patterns for p in folder.glob(pattern) if p.is_file()})


def find_file(folder: Path, patterns: Sequence[str]) -> Path | None:
    """The weights of ``folder``: the file of the first pattern that any file fits.

    Raises:
        CheckpointError: several files fit that pattern.
    """
    for pattern in patterns:
        found = fitting(folder, [pattern])
        if found:
            return one_of(found, "files of weights", "give one of them as SRC")
    return None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose names must differ: JSON itself would take the last of two."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = sorted({name for name, _ in pairs if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
        raise ValueError(f"names occur twice in it: {', '.join(twice[:5])}")
    return table


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: the file is not one, or has a name twice.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"'{path}' holds {type(raw).__name__}, not an object of names")
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
            what = _no_weights(path, "safetensors")
            raise CheckpointError(f"'{path}' is {what}: {error}") from error
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            raw = torch.load(path, map_location="cpu", weights_only=not allow_code)
    except pickle.UnpicklingError as error:
        # Torch's own text advises to read the file without its safeguard, so it is not shown.
        found = _globals(path, str(error))
        if found and not allow_code:
            raise CheckpointError(
                f"'{path}' holds more than tensors ({', '.join(found[:6])}): {_CODE}"
            ) from error
        raise CheckpointError(f"'{path}' is {_no_weights(path, 'torch file')}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, ImportError) as error:
        # The first sentence; torch goes on about its own insides.
        told = str(error).partition("\n")[0].partition(". ")[0]
        what = _no_weights(path, "torch file")
        raise CheckpointError(f"'{path}' is {what}{told and ': '}{told}") from error
    except AttributeError as error:  # a class that the allowed code needs is not there
        raise CheckpointError(f"'{path}' needs code that is not installed: {error}") from error
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(raw).__name__}, not a table of tensors")
    return dict(raw)


def _no_weights(path: Path, kind: str) -> str:
    """What a file that is no file of weights is."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return f"no {kind} but git-lfs's pointer to it; fetch it with: git lfs pull"
    if start.startswith((b"<!doctype", b"<html")):
        return f"no {kind} but a web page; download the file itself"
    return f"truncated or no {kind}"


def _globals(path: Path, told: str) -> list[str]:
    """Names a pickle imports that plain tensors do not need, ``told`` being torch's verdict."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inner = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                data = archive.read(inner)
        else:
            data = path.read_bytes()
        found = _imports(data)
    except (OSError, StopIteration, zipfile.BadZipFile, ValueError):
        found = []
    named = re.findall(r"GLOBAL (\w+(?:\.\w+)+)", told)
    return [n for n in dict.fromkeys([*named, *found]) if not _TENSORS.fullmatch(n)]


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    """Opcodes of the pickles that follow each other in ``data``, as far as they can be read.

    Files of torch before 1.6 are four pickles and the values, which are none.
    """
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):
            for opcode, argument, _ in pickletools.genops(stream):
                yield opcode.name, argument
    except (ValueError, IndexError):
        return  # cut short: what was found so far


def _imports(data: bytes) -> list[str]:
    """Dotted names of what a pickle imports, in order, as far as it can be read."""
    found: dict[str, None] = {}
    strings: list[str] = []
    memo: dict[int, str] = {}
    top = ""  # the string on top of the stack, "" if it is none
    for name, argument in _opcodes(data):
        if name == "STOP":
            memo.clear()
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = top
            continue
        top = ""
        if name in ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE"):
            top = str(argument)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            top = memo.get(int(argument), "")
        elif name in ("GLOBAL", "INST"):
            found[".".join(str(argument).split(" "))] = None
        elif name == "STACK_GLOBAL" and len(strings) >= 2:
            found[".".join(strings[-2:])] = None
        if top:
            strings.append(top)
    return list(found)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``, as pickles of protocol 2 write bytes: this encoding and no other."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"_codecs.encode with '{encoding}'")
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    """Reads plain values; refuses everything that is not."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
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
        names = [n for n in _imports(path.read_bytes()) if not _TENSORS.fullmatch(n)]
        if names:
            raise CheckpointError(
                f"'{path}' holds more than plain values ({', '.join(names[:6])}): {_CODE}"
            ) from error
        raise CheckpointError(f"'{path}' is {_no_weights(path, 'pickle')}: {error}") from error
    except (
        OSError, EOFError, ValueError, AttributeError, ImportError, IndexError, KeyError, TypeError
    ) as error:  # fmt: skip
        raise CheckpointError(f"'{path}' is truncated or no pickle: {error}") from error


def as_text(path: Path) -> str:
    """A text file, also ``.gz``, without a byte order mark.

    Raises:
        DataError: it cannot be read as text.
    """
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read as text: {error}") from error


def plain_numbers(raw: Any, source: Path) -> dict[str, float]:
    """Name -> number, of a dictionary with NumPy numbers in it.

    Raises:
        DataError: it is no such dictionary.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"'{source}' holds {type(raw).__name__}, not a dictionary of numbers")
    try:
        return {str(name): float(np.asarray(value)) for name, value in raw.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"'{source}' is no dictionary of numbers: {error}") from error
