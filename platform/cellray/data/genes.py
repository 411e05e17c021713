"""Which gene a row of a file means: Ensembl ids where known, symbols otherwise.

Files name genes by Ensembl id, with or without version, or by symbol. A canonical id makes them
join: the Ensembl id without version from the file's index, else from an id column, else through
the shipped GENCODE table from the symbol, else the symbol itself.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import DataError, did_you_mean
from cellray.data.vocab import strip_version

__all__ = ["GeneMapping", "GeneTable", "detect_organism", "gene_table", "map_genes"]

ID_COLUMNS = (
    "ensembl_id",
    "gene_ids",
    "feature_id",
    "gene_id",
    "ensembl_gene_id",
    "ensembl",
    "ensg",
    "gene_ensembl",
    "id",
)
SYMBOL_COLUMNS = (
    "gene_symbol",
    "feature_name",
    "gene_symbols",
    "gene_name",
    "gene_names",
    "symbol",
    "gene_short_name",
    "hgnc_symbol",
)
_ENSEMBL = re.compile(r"^ENS[A-Z]*G\d{11}(\.\d+)?(_PAR_Y)?$")
_PREFIXES = {"human": "ENSG0", "mouse": "ENSMUSG0"}
_NAMES = {
    "homo sapiens": "human",
    "human": "human",
    "ncbitaxon:9606": "human",
    "mus musculus": "mouse",
    "mouse": "mouse",
    "ncbitaxon:10090": "mouse",
}
_MIN_SYMBOLS_FRACTION = 0.2  # fewer matches than this say nothing about the organism


@dataclass(frozen=True)
class GeneTable:
    """One organism's genes.

    Attributes:
        symbols: Ensembl id without version -> symbol, "" where it has none.
        ids: symbol -> Ensembl id, for symbols that name exactly one.
    """

    symbols: Mapping[str, str]
    ids: Mapping[str, str]


@lru_cache(maxsize=4)
def gene_table(organism: str) -> GeneTable:
    """The shipped GENCODE table of ``"human"`` or ``"mouse"``.

    Raises:
        DataError: no table is shipped for that organism.
    """
    if organism not in _PREFIXES:
        raise DataError(
            f"no gene table for organism '{organism}'.{did_you_mean(organism, _PREFIXES)} "
            f"Allowed: {', '.join(_PREFIXES)}"
        )
    file = resources.files("cellray.data").joinpath("genes", f"{organism}.tsv.gz")
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    symbols = dict(line.split("\t") for line in lines)
    seen = Counter(symbols.values())
    ids = {symbol: gene for gene, symbol in symbols.items() if symbol and seen[symbol] == 1}
    return GeneTable(symbols=symbols, ids=ids)


def _is_ensembl(values: Sequence[str]) -> npt.NDArray[np.bool_]:
    return np.array([_ENSEMBL.match(v) is not None for v in values], dtype=bool)


def detect_organism(
    index: Sequence[str], symbols: Sequence[str], stated: Sequence[str] = ()
) -> str:
    """Whose genes these are, to choose the symbol table.

    In this order: the prefix of Ensembl ids, what obs states (``organism`` and the like), and the
    table that knows more of the symbols (at least a fifth of them, and twice as many as the other).

    Args:
        index: V gene ids as the file has them.
        symbols: V symbols.
        stated: distinct values of the file's organism column.

    Returns:
        ``"human"``, ``"mouse"``, or ``""`` if none of the signs says so.
    """
    by_prefix = {o: sum(g.startswith(p) for g in index) for o, p in _PREFIXES.items()}
    best = max(by_prefix, key=lambda o: by_prefix[o])
    if by_prefix[best] * 2 > len(index):
        return best
    named = {_NAMES.get(str(s).strip().lower(), "") for s in stated}
    if len(named) == 1 and named != {""}:
        return named.pop()
    known = {o: sum(s in gene_table(o).ids for s in symbols) for o in _PREFIXES}
    first, second = sorted(known, key=lambda o: -known[o])
    enough = known[first] >= max(1.0, _MIN_SYMBOLS_FRACTION * len(symbols))
    return first if enough and known[first] >= 2 * known[second] else ""


@dataclass(frozen=True)
class GeneMapping:
    """Canonical genes of a file's V rows.

    Attributes:
        feature_ids: V canonical ids; rows that are summed share one.
        feature_names: V symbols.
        merged: canonical id -> the file's names of the rows that were added up under it.
        num_ensembl: rows whose canonical id is an Ensembl id.
        organism: whose symbol table was used, "" for none.
    """

    feature_ids: tuple[str, ...]
    feature_names: tuple[str, ...]
    merged: Mapping[str, tuple[str, ...]]
    num_ensembl: int
    organism: str


def _texts(values: pd.Series) -> list[str]:
    """A var column as strings, "" where missing."""
    missing = values.isna().to_numpy()
    return [
        "" if m else str(v).strip() for v, m in zip(values.astype(object), missing, strict=True)
    ]


def _is_counter(index: Sequence[str]) -> bool:
    """Whether an index is just 0 .. n-1, which names no gene."""
    return all(text == str(i) for i, text in enumerate(index))


def _find_ids(var: pd.DataFrame, given: str) -> list[str] | None:
    """The id column: the named one, else the first known one that holds Ensembl ids."""
    if given != "auto":
        if given not in var.columns:
            allowed = [str(c) for c in var.columns]
            raise DataError(
                f"ingest.gene_id_column = '{given}' is not in var."
                f"{did_you_mean(given, allowed)} var has: {', '.join(allowed) or 'no columns'}"
            )
        return _texts(var[given])
    lower = {str(c).lower(): c for c in reversed(var.columns)}
    for name in ID_COLUMNS:
        if name in lower:
            values = _texts(var[lower[name]])
            filled = [v for v in values if v]
            if filled and _is_ensembl(filled).mean() > 0.5:
                return values
    return None


def _find_symbols(var: pd.DataFrame) -> list[str] | None:
    lower = {str(c).lower(): c for c in reversed(var.columns)}
    found = next((lower[name] for name in SYMBOL_COLUMNS if name in lower), None)
    return None if found is None else _texts(var[found])


def _refuse_repeats(primary: Sequence[str], what: str) -> None:
    counts = Counter(primary)
    twice = [g for g, n in counts.items() if n > 1]
    if twice:
        more = f" and {len(twice) - 5} more" if len(twice) > 5 else ""
        raise DataError(
            f"gene ids occur more than once in {what} (versions stripped): "
            f"{', '.join(repr(g) for g in twice[:5])}{more}. Remove them, or set "
            "ingest.duplicate_genes = 'sum' to add their counts up"
        )


def _canonical(
    base: Sequence[str], annotated: Sequence[str], symbols: Sequence[str], organism: str
) -> list[str]:
    table = gene_table(organism).ids if organism else {}
    known, annotated_known = _is_ensembl(base), _is_ensembl(annotated)
    result = []
    for i, gene in enumerate(base):
        if known[i]:
            result.append(gene)
        elif annotated_known[i]:
            result.append(strip_version(annotated[i]))
        else:
            result.append(table.get(gene) or table.get(symbols[i]) or gene)
    return result


def _names(feature_ids: Sequence[str], symbols: Sequence[str]) -> list[str]:
    """GENCODE's symbol of a known id, whatever file it came from; else the file's; else the id."""
    tables = {prefix: gene_table(o).symbols for o, prefix in _PREFIXES.items()}
    result = []
    for gene, symbol in zip(feature_ids, symbols, strict=True):
        table = next((t for p, t in tables.items() if gene.startswith(p)), {})
        own = "" if _ENSEMBL.match(symbol) else symbol
        result.append(table.get(gene.removesuffix("_PAR_Y"), "") or own or gene)
    return result


def _primary(
    var: pd.DataFrame, annotated: list[str] | None, symbols: list[str] | None
) -> tuple[list[str], str]:
    """The file's own V ids without versions, and where they are from."""
    index = [str(g).strip() for g in var.index]
    source = "var's index"
    if _is_counter(index):
        if annotated is None and symbols is None:
            raise DataError(
                "var's index is only 0 .. n-1 and no column names the genes; set "
                "ingest.gene_id_column. var has: "
                f"{', '.join(map(str, var.columns)) or 'no columns'}"
            )
        ids, names = annotated or symbols or [], symbols or annotated or []
        index, source = [g or s for g, s in zip(ids, names, strict=True)], "var's gene id column"
    if "" in index:
        raise DataError(f"{index.count('')} genes have an empty id in {source}")
    return [strip_version(g) for g in index], source


def map_genes(
    var: pd.DataFrame,
    *,
    organism: str = "auto",
    id_column: str = "auto",
    stated: Sequence[str] = (),
    sum_duplicates: bool = False,
) -> GeneMapping:
    """Give every row of an AnnData var frame its canonical gene.

    The file's primary ids are its index, or the id column (else the symbols) where the index is
    only 0 .. n-1. They must be unique once versions are stripped. Distinct primary ids may still
    mean one gene (an old and a new symbol of one Ensembl id): those rows are to be added up, and
    ``merged`` says which.

    Args:
        var: V rows.
        organism: ``"human"``, ``"mouse"``, or ``"auto"`` (see :func:`detect_organism`).
        id_column: var column whose ids are preferred to the index where it has one, or ``"auto"``:
            a column of Ensembl ids, consulted where the index is none.
        stated: distinct values of the file's organism column in obs.
        sum_duplicates: allow primary ids that repeat.

    Raises:
        DataError: no such column; ids that repeat; an empty id; nothing that names the genes.
    """
    annotated = _find_ids(var, id_column)
    symbols = _find_symbols(var)
    primary, source = _primary(var, annotated, symbols)
    if not sum_duplicates:
        _refuse_repeats(primary, source)
    named = annotated if annotated is not None else [""] * len(primary)
    base = primary
    if id_column != "auto":
        base = [strip_version(a) or p for a, p in zip(named, primary, strict=True)]
    symbols = symbols if symbols is not None else primary
    symbols = [s or p for s, p in zip(symbols, primary, strict=True)]
    if organism == "auto":
        organism = detect_organism([*base, *(a for a in named if a)], symbols, stated)
    else:
        gene_table(organism)
    ids = _canonical(base, named, symbols, organism)
    groups: dict[str, list[str]] = {}
    for gene, name in zip(ids, primary, strict=True):
        groups.setdefault(gene, []).append(name)
    return GeneMapping(
        feature_ids=tuple(ids),
        feature_names=tuple(_names(ids, symbols)),
        merged={g: tuple(names) for g, names in groups.items() if len(names) > 1},
        num_ensembl=int(_is_ensembl(ids).sum()),
        organism=organism,
    )
