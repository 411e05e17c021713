"""Gene sets from GMT files, laid on a vocabulary: which genes feed which pathway.

A line of a GMT file is tab-separated: name, description, genes. Genes are symbols or Ensembl ids;
they are found in the vocabulary by name, never by position.

Legend: P gene sets, G genes of the vocabulary.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np

from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.data.vocab import Vocab, strip_version

__all__ = ["SHIPPED", "choose_gene_sets", "random_gene_sets", "read_gmt"]

# Sets that come with the package, by name; see data/genes/PROVENANCE.md.
SHIPPED = ("hallmark",)


def read_gmt(path: str) -> dict[str, list[str]]:
    """Gene sets of a GMT file (also ``.gz``), in its order: name -> genes, each once.

    Args:
        path: a file, or the name of sets that ship with cellray (``hallmark``).

    Raises:
        ConfigError: there is no such file.
        DataError: the file is not GMT.
    """
    if path in SHIPPED:
        raw = files("cellray.data").joinpath(f"genes/{path}.gmt.gz").read_bytes()
        return _parse(gzip.decompress(raw).decode(), path)
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"no GMT file at '{path}'.{did_you_mean(path, SHIPPED)} Give a file of gene sets, or "
            f"the name of sets that ship with cellray: {', '.join(SHIPPED)}"
        )
    try:
        raw = file.read_bytes()
        text = gzip.decompress(raw) if file.suffix == ".gz" else raw
        return _parse(text.decode("utf-8-sig"), path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read as GMT: {error}") from error


def _parse(text: str, path: str) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = line.rstrip("\r\n").split("\t")
        if len(rest) < 2:
            raise DataError(
                f"'{path}' is not GMT: line {number} has {1 + len(rest)} tab-separated words; it "
                "needs a name, a description and genes"
            )
        if name in sets:
            raise DataError(f"'{path}' has the gene set '{name}' twice (line {number})")
        sets[name] = [gene for gene in dict.fromkeys(word.strip() for word in rest[1:]) if gene]
    if not sets:
        raise DataError(f"'{path}' holds no gene set")
    return sets


def choose_gene_sets(
    sets: dict[str, list[str]],
    vocab: Vocab,
    *,
    max_listed: int,
    min_present: int,
    max_sets: int,
    unannotated: int,
    source: str,
) -> dict[str, tuple[int, ...]]:
    """The sets a model is built with, as TOSICA chooses them (doi:10.1038/s41467-023-35923-4).

    Sets with more than ``max_listed`` genes in the file are left out; ``unannotated`` sets with all
    genes (``node 0`` ...) are added; sets with fewer than ``min_present`` genes in the vocabulary
    are left out; of the rest the ``max_sets`` largest stay (later ones where equal), in the
    file's order.

    Args:
        sets: from :func:`read_gmt`.
        vocab: the genes there are.
        max_listed: genes a set may list.
        min_present: genes of it that must be in the vocabulary.
        max_sets: P at most.
        unannotated: fully connected sets.
        source: the file, for messages.

    Returns:
        Name -> ascending positions in the vocabulary.

    Raises:
        DataError: none of the genes is in the vocabulary, no set is left or none fits, or a set
            has the name of one that is added.
    """
    names = list(dict.fromkeys(gene for genes in sets.values() for gene in genes))
    found = _positions(names, vocab)
    if not any(index >= 0 for index in found.values()):
        raise DataError(
            f"none of the {len(names)} genes of '{source}' ({', '.join(names[:3])}, ...) is among "
            f"the {len(vocab)} genes of the data ({', '.join(vocab.gene_ids[:3])}, symbols "
            f"{', '.join(s for s in vocab.symbols[:3] if s) or 'unknown'}, ...); give gene sets of "
            "the same organism, with symbols or Ensembl ids"
        )
    chosen = {
        name: tuple(sorted({found[g] for g in genes if found[g] >= 0}))
        for name, genes in sets.items()
        if len(genes) <= max_listed
    }
    taken = [f"node {i}" for i in range(unannotated) if f"node {i}" in chosen]
    if taken:
        raise DataError(
            f"'{source}' has a gene set '{taken[0]}', the name of a set of all genes that is added "
            "(model.unannotated); rename it, or set model.unannotated = 0"
        )
    everything = tuple(range(len(vocab)))
    chosen |= {f"node {i}": everything for i in range(unannotated)}
    kept = [name for name, members in chosen.items() if len(members) >= min_present]
    if len(kept) <= unannotated:
        raise DataError(
            f"no gene set of '{source}' lists at most {max_listed} genes (model.max_listed_genes) "
            f"of which at least {min_present} (model.min_present_genes) are among the {len(vocab)} "
            "genes of the data; take other sets, or more genes (data.vocab_genes)"
        )
    sizes = np.array([len(chosen[name]) for name in kept])
    if max_sets <= unannotated:
        raise DataError(
            f"model.max_sets = {max_sets} leaves no room for gene sets of '{source}' beside "
            f"{unannotated} of all genes (model.unannotated)"
        )
    largest = np.sort(np.argsort(sizes, kind="stable")[-max_sets:])
    return {kept[i]: chosen[kept[i]] for i in largest}


def _positions(names: list[str], vocab: Vocab) -> dict[str, int]:
    """Name -> position in the vocabulary, by id or by a symbol that only one gene has; else -1.

    A file may name a gene by its id in one set and by its symbol in another.
    """
    by_id = {strip_version(gene): i for i, gene in enumerate(vocab.gene_ids)}
    counts = Counter(symbol for symbol in vocab.symbols if symbol)
    by_symbol = {s: i for i, s in enumerate(vocab.symbols) if counts.get(s) == 1}
    return {n: by_id.get(strip_version(n), by_symbol.get(n, -1)) for n in names}


def random_gene_sets(
    vocab: Vocab, *, num_sets: int, fraction: float, seed: int
) -> dict[str, tuple[int, ...]]:
    """Sets without meaning, each gene in each with probability ``fraction``: TOSICA's control."""
    drawn = np.random.default_rng(seed).random((num_sets, len(vocab))) < fraction
    return {f"node {i}": tuple(np.flatnonzero(row).tolist()) for i, row in enumerate(drawn)}
