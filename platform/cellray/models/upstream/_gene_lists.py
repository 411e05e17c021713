"""Genes, medians and class names that lie beside published weights, in every form they come in."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellray.core.errors import DataError
from cellray.data.vocab import Vocab
from cellray.models.upstream._reading import as_text, plain_numbers, read_json, read_plain_pickle
from cellray.models.upstream.base import GeneList

__all__ = ["generation", "read_gene_list", "read_labels", "read_medians", "read_symbols"]

# Column names of gene tables: of ids or symbols, places, token ids, medians, symbols.
_NAMES = ("token", "gene_id", "ensembl_id", "feature_id", "gene_name", "gene_symbol", "symbol")
_PLACES, _TOKENS = ("index",), ("token_id",)
_MEDIANS, _SYMBOLS = ("nonzero_median", "median"), ("symbol", "gene_symbol", "feature_name")


def _table(path: Path) -> GeneList:
    """A text file: a table with known column names, or one gene a line."""
    text = as_text(path)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"'{path}' lists no gene")
    comma = "," in lines[0] and "\t" not in lines[0]
    rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter="," if comma else "\t"))
    header = [word.strip().lower() for word in rows[0]]

    def column(wanted: Sequence[str]) -> int | None:
        return next((header.index(name) for name in wanted if name in header), None)

    name = column(_NAMES)
    if name is None:
        if len(rows[0]) > 1:
            raise DataError(
                f"'{path}' has the columns {', '.join(rows[0][:6])}; a gene table needs one of "
                f"{', '.join(_NAMES)}, and a plain list one gene a line"
            )
        return GeneList(tuple(row[0].strip() for row in rows), source=str(path))
    body = [row for row in rows[1:] if len(row) > name]
    place, token = column(_PLACES), column(_TOKENS)
    median, symbol = column(_MEDIANS), column(_SYMBOLS)
    try:
        if place is not None:
            body = sorted(body, key=lambda row: int(row[place]))
            if [int(row[place]) for row in body] != list(range(len(body))):
                raise DataError(f"'{path}': the column 'index' is not 0 .. {len(body) - 1}")
        names = tuple(row[name].strip() for row in body)
        _check_names(names, path)
        return GeneList(
            names=names,
            symbols=tuple(row[symbol] for row in body) if symbol not in (None, name) else (),
            tokens={row[name]: int(row[token]) for row in body} if token is not None else None,
            medians=(
                {row[name]: float(row[median]) for row in body if row[median]}
                if median is not None
                else None
            ),
            source=str(path),
        )
    except DataError:
        raise
    except (ValueError, IndexError) as error:
        raise DataError(f"'{path}' is no gene table: {error}") from error


def _from_h5ad(path: Path) -> GeneList:
    import anndata as ad

    try:
        var = ad.read_h5ad(path, backed="r").var
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as h5ad: {error}") from error
    symbol = next((name for name in _SYMBOLS if name in var), None)
    symbols = () if symbol is None else tuple(var[symbol].astype(str))
    return GeneList(tuple(var.index.astype(str)), symbols, source=str(path))


def _check_names(names: Sequence[str], path: Path) -> None:
    """Refuse what cannot be a list of genes.

    Raises:
        DataError: there is none, one occurs twice, or they are the numbers of rows.
    """
    if not names:
        raise DataError(f"'{path}' lists no gene")
    if list(names) in ([str(i + first) for i in range(len(names))] for first in (0, 1)):
        raise DataError(
            f"'{path}' lists the numbers of its rows, {names[0]} .. {names[-1]}, instead of genes; "
            "give a file whose index (or plain lines, or a column such as gene_name) is the genes"
        )
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DataError(
            f"'{path}' lists genes more than once ({len(twice)}): {', '.join(twice[:5])}; a "
            "model knows each gene once, so this is not its list"
        )


def _plain_names(raw: Any, path: Path) -> GeneList:
    """A list or array of names."""
    names = raw.tolist() if isinstance(raw, np.ndarray) and raw.ndim == 1 else raw
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        kind = f"an array of {raw.dtype} {raw.shape}" if isinstance(raw, np.ndarray) else ""
        raise DataError(f"'{path}' holds {kind or type(raw).__name__}, not a list of gene names")
    return GeneList(tuple(str(name) for name in names), source=str(path))


def _token_ids(raw: Mapping[Any, Any], path: Path) -> GeneList:
    """A dictionary of gene -> token id; every id is a number of its own, 0 or more."""
    try:
        tokens = {str(name): int(token) for name, token in raw.items()}
        whole = all(token == tokens[str(name)] for name, token in raw.items())
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"'{path}' is no dictionary of gene -> token id: {error}") from error
    _check_names(list(tokens), path)
    if not whole or min(tokens.values()) < 0:
        bad = next(n for n, t in raw.items() if t != tokens[str(n)] or t < 0)
        raise DataError(f"'{path}' gives {bad!r} the token id {raw[bad]}; ids are 0, 1, 2, ...")
    shared = [token for token, times in Counter(tokens.values()).items() if times > 1]
    if shared:
        both = [name for name, token in tokens.items() if token == shared[0]]
        raise DataError(
            f"'{path}' gives {len(shared)} token ids to more than one gene: {shared[0]} to "
            f"{', '.join(both[:5])}"
        )
    return GeneList(tuple(tokens), tokens=tokens, source=str(path))


def _from_vocab(file: Path) -> GeneList:
    vocab = Vocab.load(file)
    tokens = dict(zip(vocab.gene_ids, vocab.gene_tokens.tolist(), strict=True))
    medians = None
    if vocab.medians is not None:
        medians = dict(zip(vocab.gene_ids, vocab.medians.tolist(), strict=True))
    merged = {**tokens, **vocab.specials}
    return GeneList(vocab.gene_ids, vocab.symbols, merged, medians, source=str(file))


def read_gene_list(path: str | Path, *, allow_code: bool = False) -> GeneList:
    """The genes of a published model.

    Args:
        path: a token dictionary (JSON or pickle of name -> id), a table with column names
            (``gene_name``, ``index``; ``token_id``, ``token``, ``nonzero_median``, ``symbol``), a
            list of one gene a line, a ``.npy`` of names, an h5ad (its var index), or a cellray
            vocabulary; text also as ``.gz``.
        allow_code: see :func:`cellray.models.upstream._reading.read_plain_pickle`.

    Raises:
        DataError: the file is missing, is none of these, lists a gene twice, or its numbers.
        CheckpointError: a pickle that holds code.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no gene list at '{path}'")
    if file.name.endswith(".json.gz"):
        found = _from_vocab(file)
    elif file.suffix == ".h5ad":
        found = _from_h5ad(file)
    elif file.suffix == ".npy":
        try:
            array = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"'{path}' is no array of gene names: {error}") from error
        found = _plain_names(array, file)
    elif file.suffix in (".json", ".pkl", ".pickle"):
        raw: Any = _dictionary(file, allow_code=allow_code)
        found = _token_ids(raw, file) if isinstance(raw, Mapping) else _plain_names(raw, file)
    else:
        found = _table(file)
        if found.tokens is not None:
            _token_ids(found.tokens, file)
    _check_names(found.names, file)
    return found


def _dictionary(path: Path, *, allow_code: bool) -> Any:
    if path.suffix == ".json":
        return read_json(path)
    return read_plain_pickle(path, allow_code=allow_code)


def generation(path: str | Path) -> str:
    """The corpus that a dictionary's file name speaks of (``gc104M``), "" if it says none."""
    found = re.search(r"gc\d+M", Path(path).name, re.IGNORECASE)
    return found[0][:-1].lower() + "M" if found else ""


def read_medians(path: Path, *, allow_code: bool) -> dict[str, float]:
    """Gene -> non-zero median, of a dictionary (JSON or pickle) or a table.

    Raises:
        DataError: the file is missing or is none of these.
        CheckpointError: a pickle that holds code.
    """
    if not path.is_file():
        raise DataError(f"no file of medians at '{path}'")
    if path.suffix in (".json", ".pkl", ".pickle"):
        return plain_numbers(_dictionary(path, allow_code=allow_code), path)
    found = _table(path).medians
    if not found:
        raise DataError(f"'{path}' has no column {' or '.join(_MEDIANS)}")
    return dict(found)


def read_symbols(path: Path, *, allow_code: bool) -> dict[str, str]:
    """Id -> symbol, of a dictionary symbol -> id.

    Raises:
        DataError: it is no dictionary.
        CheckpointError: a pickle that holds code.
    """
    raw = _dictionary(path, allow_code=allow_code)
    if not isinstance(raw, Mapping):
        raise DataError(f"'{path}' holds {type(raw).__name__}, not a dictionary symbol -> id")
    return {str(gene): str(symbol) for symbol, gene in raw.items()}


def read_labels(path: str | Path, *, allow_code: bool = False) -> tuple[str, ...]:
    """Class names in code order.

    Args:
        path: a JSON or pickle (list, number -> name, or name -> number), a table of two columns
            with a header (number, name), or one name a line.
        allow_code: see :func:`cellray.models.upstream._reading.read_plain_pickle`.

    Raises:
        DataError: the file is missing or is none of these, or its numbers are not 0, 1, 2, ...
        CheckpointError: a pickle that holds code.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no file of labels at '{path}'")
    raw: Any
    if file.suffix == ".json":
        try:
            raw = json.loads(as_text(file))
        except ValueError as error:
            raise DataError(f"'{path}' cannot be read as JSON: {error}") from error
    elif file.suffix in (".pkl", ".pickle") or not file.suffix:
        raw = read_plain_pickle(file, allow_code=allow_code)
    else:
        raw = _lines_or_table(file)
    if isinstance(raw, Mapping):
        return _by_code(raw, file)
    names = raw.tolist() if isinstance(raw, np.ndarray) else raw
    if not isinstance(names, list | tuple):
        raise DataError(f"'{path}' holds {type(raw).__name__}, not class names")
    if not all(isinstance(name, str) for name in names):
        raise DataError(
            f"'{path}' holds {', '.join(str(name) for name in names[:4])}, ...; class names are "
            "words in code order (scBERT writes them to 'label_dict', and the codes of its cells "
            "to 'label')"
        )
    return tuple(names)


def _lines_or_table(file: Path) -> Any:
    """One name a line, or number -> name of a table such as TOSICA's label_dictionary.csv."""
    lines = [line.strip() for line in as_text(file).splitlines() if line.strip()]
    if file.suffix not in (".csv", ".tsv"):
        return lines
    rows = list(csv.reader(lines, delimiter="\t" if file.suffix == ".tsv" else ","))
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    if any(len(row) != 2 for row in rows):
        raise DataError(f"'{file}' is no table of two columns, number and name of each class")
    return dict(rows[1:])


def _by_code(raw: Mapping[Any, Any], file: Path) -> tuple[str, ...]:
    """Names of number -> name or name -> number."""
    pairs = list(raw.items())
    if pairs and all(isinstance(code, int | np.integer) for _, code in pairs):
        pairs = [(code, name) for name, code in pairs]
    try:
        table = sorted((int(code), str(name)) for code, name in pairs)
    except (TypeError, ValueError) as error:
        raise DataError(f"'{file}' is no dictionary of number -> class name: {error}") from error
    if [code for code, _ in table] != list(range(len(table))):
        codes = ", ".join(str(code) for code, _ in table[:12])
        raise DataError(
            f"'{file}' numbers its {len(table)} classes {codes}; the classes of a model are 0 .. "
            f"{len(table) - 1}, each once"
        )
    return tuple(name for _, name in table)
