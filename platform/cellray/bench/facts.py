"""What a table was made of, in words: data, split, genes, code, hardware, overlap."""

from __future__ import annotations

from collections.abc import Sequence

from cellray.bench.rows import ResultRow

__all__ = ["facts_of"]


def facts_of(rows: Sequence[ResultRow]) -> dict[str, str]:
    """Name -> value for the head of a table; what no row knows is left out.

    Args:
        rows: measured, of one task, data set and split.
    """
    first = next((row for row in rows if row.status == "ok"), rows[0])
    commits = sorted(
        {f"{row.git_commit}{' with changes' if row.git_dirty else ''}" for row in rows} - {""}
    )
    facts = {
        "task": first.task + (f" ({first.subtask})" if first.subtask else ""),
        "data": first.dataset_id + _in_brackets(_count(first.n_cells, "cells"), _genes(first)),
        "data SHA-256": first.dataset_sha256,
        "licence": first.dataset_license,
        "split": first.split_id + (f", held out by {first.split_unit}" if first.split_unit else ""),
        "split SHA-256": first.split_sha256,
        "cells": _listed(
            _count(first.n_train, "to train on"),
            _count(first.n_val, "to choose by"),
            _count(first.n_test, "to test on"),
        ),
        "classes": _listed(
            _count(first.n_classes_train, "in training"),
            _count(first.n_classes_test, "in the test set"),
            _count(first.n_classes_unseen, "of these unseen in training"),
        ),
        "genes matched": _matched(rows),
        "pretraining corpus": _listed(*sorted({r.pretrain_corpus_id for r in rows} - {""})),
        "hardware": _listed(*sorted({r.hardware for r in rows} - {""})),
        "code": _listed(*commits),
    }
    return {name: value for name, value in facts.items() if value}


def _count(number: int | None, what: str) -> str:
    return "" if number is None else f"{number:,} {what}"


def _genes(row: ResultRow) -> str:
    return _count(row.n_genes, "genes")


def _listed(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _in_brackets(*parts: str) -> str:
    told = _listed(*parts)
    return f" ({told})" if told else ""


def _matched(rows: Sequence[ResultRow]) -> str:
    """Genes that each model knew, methods of the same number together."""
    told: dict[str, list[str]] = {}
    for row in rows:
        if row.genes_in is None or row.genes_matched is None:
            continue
        text = f"{row.genes_matched:,} of {row.genes_in:,}"
        if row.umi_fraction_matched is not None:
            text += f" with {100 * row.umi_fraction_matched:.1f} % of all counts"
        methods = told.setdefault(text, [])
        if row.method not in methods:
            methods.append(row.method)
    return "; ".join(f"{', '.join(methods)}: {text}" for text, methods in told.items())
