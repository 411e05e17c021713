"""Published weights to a cellray checkpoint, with every key accounted for, and back."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray import __version__
from cellray.core import registry
from cellray.core.errors import CheckpointError, ConfigError, DataError
from cellray.core.section import build_section, to_dict
from cellray.data.tokens import tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import family
from cellray.models.upstream._reading import (
    as_text,
    find_file,
    plain_numbers,
    read_json,
    read_plain_pickle,
)
from cellray.models.upstream.base import GeneList, Imported, Options, revert, upstream
from cellray.objectives.base import ObjectiveUnit
from cellray.train.checkpoint import Manifest, model_of, read_checkpoint, write_checkpoint

__all__ = ["ImportReport", "export_weights", "import_weights", "read_gene_list", "read_labels"]

# Column names of gene tables: of ids or symbols, places, token ids, medians, symbols.
_NAMES = ("token", "gene_id", "ensembl_id", "feature_id", "gene_name", "gene_symbol", "symbol")
_PLACES, _TOKENS = ("index",), ("token_id",)
_MEDIANS, _SYMBOLS = ("nonzero_median", "median"), ("symbol", "gene_symbol", "feature_name")


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        target: the checkpoint folder.
        family: its family.
        num_parameters: values of the model's parameters.
        num_tensors: published tensors that were taken.
        ignored: published key -> why it was left out.
        num_genes: genes of the vocabulary.
        notes: what else a user should know.
    """

    target: str
    family: str
    num_parameters: int
    num_tensors: int
    ignored: Mapping[str, str]
    num_genes: int
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What the command line prints."""
        told = [
            f"{self.target}: {self.family}, {self.num_parameters:,} parameters from "
            f"{self.num_tensors} tensors, {self.num_genes:,} genes"
        ]
        told += [f"left out: {key} ({why})" for key, why in self.ignored.items()]
        return told + [f"note: {note}" for note in self.notes]


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


def read_gene_list(path: str | Path, *, allow_code: bool = False) -> GeneList:
    """The genes of a published model.

    Args:
        path: a token dictionary (JSON or pickle of name -> id), a table with column names
            (``gene_name``, ``index``; ``token_id``, ``token``, ``nonzero_median``, ``symbol``), a
            list of one gene a line, a ``.npy`` of names, an h5ad (its var index), or a cellray
            vocabulary; text also as ``.gz``.
        allow_code: see :func:`cellray.models.upstream._reading.read_plain_pickle`.

    Raises:
        DataError: the file is missing or is none of these.
        CheckpointError: a pickle that holds code.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no gene list at '{path}'")
    if file.name.endswith(".json.gz"):
        vocab = Vocab.load(file)
        tokens = dict(zip(vocab.gene_ids, vocab.gene_tokens.tolist(), strict=True))
        medians = None
        if vocab.medians is not None:
            medians = dict(zip(vocab.gene_ids, vocab.medians.tolist(), strict=True))
        merged = {**tokens, **vocab.specials}
        return GeneList(vocab.gene_ids, vocab.symbols, merged, medians, source=str(path))
    if file.suffix == ".h5ad":
        return _from_h5ad(file)
    if file.suffix == ".npy":
        try:
            names = np.load(file, allow_pickle=False)
        except ValueError as error:
            raise DataError(f"'{path}' is no array of gene names: {error}") from error
        return GeneList(tuple(str(name) for name in names), source=str(path))
    if file.suffix in (".json", ".pkl", ".pickle"):
        raw = (
            read_json(file)
            if file.suffix == ".json"
            else read_plain_pickle(file, allow_code=allow_code)
        )
        if not isinstance(raw, Mapping):
            return GeneList(tuple(str(name) for name in raw), source=str(path))
        try:
            tokens = {str(name): int(token) for name, token in raw.items()}
        except (TypeError, ValueError) as error:
            raise DataError(f"'{path}' is no dictionary of gene -> token id: {error}") from error
        if not tokens:
            raise DataError(f"'{path}' lists no gene")
        return GeneList(tuple(tokens), tokens=tokens, source=str(path))
    return _table(file)


def _medians(path: Path, *, allow_code: bool) -> dict[str, float]:
    if not path.is_file():
        raise DataError(f"no file of medians at '{path}'")
    if path.suffix == ".json":
        return plain_numbers(read_json(path))
    if path.suffix in (".pkl", ".pickle"):
        return plain_numbers(read_plain_pickle(path, allow_code=allow_code))
    found = _table(path).medians
    if not found:
        raise DataError(f"'{path}' has no column {' or '.join(_MEDIANS)}")
    return dict(found)


def read_labels(path: str | Path, *, allow_code: bool = False) -> tuple[str, ...]:
    """Class names in code order: a JSON or pickle (list, or number -> name), or one a line.

    Raises:
        DataError: the file is missing.
        CheckpointError: a pickle that holds code.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no file of labels at '{path}'")
    raw: Any
    if file.suffix == ".json":
        raw = json.loads(as_text(file))
    elif file.suffix in (".pkl", ".pickle") or not file.suffix:
        raw = read_plain_pickle(file, allow_code=allow_code)
    else:
        raw = [line.strip() for line in as_text(file).splitlines() if line.strip()]
    if isinstance(raw, Mapping):
        if all(isinstance(value, int | np.integer) for value in raw.values()):
            raw = {code: name for name, code in raw.items()}
        raw = [raw[key] for key in sorted(raw, key=int)]
    return tuple(str(name) for name in raw)


def _options(
    name: str,
    source: Path,
    *,
    genes: str,
    medians: str,
    labels: str,
    entry: str,
    heads: int,
    allow_code: bool,
) -> Options:
    """What the user gave, and what lies beside the weights."""
    unit = upstream(name)
    folder = source if source.is_dir() else source.parent
    gene_file = Path(genes) if genes else find_file(folder, list(unit.gene_files))
    listed = None
    if gene_file is not None:
        listed = read_gene_list(gene_file, allow_code=allow_code)
    median_file = Path(medians) if medians else find_file(folder, list(unit.median_files))
    symbol_file = find_file(folder, list(unit.symbol_files))
    if listed is not None and symbol_file is not None and not listed.symbols:
        named = read_gene_list_pairs(symbol_file, allow_code=allow_code)
        listed = replace(listed, symbols=tuple(named.get(gene, "") for gene in listed.names))
    return Options(
        genes=listed,
        labels=read_labels(labels, allow_code=allow_code) if labels else (),
        entry=entry,
        medians=None if median_file is None else _medians(median_file, allow_code=allow_code),
        heads=heads,
        allow_code=allow_code,
    )


def read_gene_list_pairs(path: Path, *, allow_code: bool) -> dict[str, str]:
    """Id -> symbol, of a dictionary symbol -> id."""
    if path.suffix == ".json":
        raw: Mapping[Any, Any] = read_json(path)
    else:
        raw = read_plain_pickle(path, allow_code=allow_code)
    return {str(gene): str(symbol) for symbol, gene in raw.items()}


def _manifest(name: str, found: Imported, source: str) -> Manifest:
    """The manifest of an imported model, with every key filled in and checked."""
    unit = family(name)
    tokenizer = tokenizer_unit(found.tokenizer["name"])
    objective: ObjectiveUnit = registry.find(
        "cellray.objectives", found.objective["name"], "OBJECTIVE"
    )
    return Manifest(
        family=name,
        model=to_dict(build_section(unit.config, {"family": name, **found.model})),
        tokenizer=to_dict(build_section(tokenizer.config, found.tokenizer)),
        objective=to_dict(build_section(objective.config, found.objective)),
        vocab_fingerprint=found.vocab.fingerprint,
        data_fingerprint="",
        covariates=found.covariates,
        classes=list(found.classes),
        classes_of=found.classes_of,
        run={"imported_from": source},
        code_version=__version__,
    )


def _check_whole(manifest: Manifest, vocab: Vocab, weights: Mapping[str, torch.Tensor]) -> int:
    """Every parameter of the model is set, with its shape; gives their number of values.

    Raises:
        CheckpointError: a parameter stays unset or has another shape; they are listed.
    """
    with torch.device("meta"):
        model = model_of(manifest, vocab)
    own = dict(model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unset = sorted(set(own) - set(weights))
    extra = sorted(set(weights) - set(shapes))
    wrong = [
        f"{name} {tuple(value.shape)} for {shapes[name]}"
        for name, value in weights.items()
        if name in shapes and tuple(value.shape) != shapes[name]
    ]
    problems = []
    for kind, names in (("unset", unset), ("without a place", extra), ("of another size", wrong)):
        if names:
            problems.append(f"{len(names)} {kind}: {', '.join(names[:8])}")
    if problems:
        raise CheckpointError(f"the weights do not fit the model: {'; '.join(problems)}")
    return sum(parameter.numel() for parameter in own.values())


def import_weights(
    name: str,
    source: str | Path,
    target: str | Path,
    *,
    genes: str = "",
    medians: str = "",
    labels: str = "",
    entry: str = "",
    heads: int = 0,
    allow_code: bool = False,
) -> ImportReport:
    """Published weights to a checkpoint that every command takes.

    Args:
        name: the family.
        source: its published file or folder.
        target: folder to write; must not exist.
        genes: gene list, where none lies beside the weights; see :func:`read_gene_list`.
        medians: non-zero medians, where none lie beside the weights.
        labels: class names, for files with a classifier.
        entry: which of several models of a file.
        heads: attention heads, for files that do not say.
        allow_code: read pickles that hold more than tensors and plain values.

    Raises:
        CellrayError: the file is missing, of another family or size, truncated or holds code; the
            genes are of another generation; or a key is left over or missing (all are listed).
            Nothing is written then.
    """
    path, out = Path(source), Path(target)
    adapter = upstream(name)
    if not path.exists():
        raise CheckpointError(f"nothing at '{source}'; {name} is read from {adapter.formats}")
    if out.exists():
        raise ConfigError(f"'{target}' exists; name a folder that does not")
    options = _options(
        name,
        path,
        genes=genes,
        medians=medians,
        labels=labels,
        entry=entry,
        heads=heads,
        allow_code=allow_code,
    )
    found = adapter.read(path, options)
    manifest = _manifest(name, found, str(source))
    count = _check_whole(manifest, found.vocab, found.weights)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_of(manifest, found.vocab)
    model.load_state_dict({**model.state_dict(), **found.weights})
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_checkpoint(partial, manifest, vocab=found.vocab, weights=model.state_dict())
    os.replace(partial, out)
    taken = {key for rule in found.rules for key in rule.theirs}
    return ImportReport(
        target=str(target),
        family=name,
        num_parameters=count,
        num_tensors=len(taken),
        ignored=found.ignored,
        num_genes=len(found.vocab),
        notes=found.notes,
    )


def export_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under the names its family publishes them with.

    What published files hold besides (configuration, optimizer) is not made up. Keys that are
    derived from others (a tied decoder, a mask) are not all written.
    """
    manifest, vocab, weights = read_checkpoint(path)
    model = dict(manifest.model)
    if "domain_norm" in model:
        names = [name for name in weights if "domain_norm.norms." in name]
        model["num_domains"] = len({name.split("norms.")[1].split(".")[0] for name in names})
    adapter = upstream(manifest.family)
    rules = adapter.rules(model, len(manifest.classes), vocab, manifest.classes_of)
    return revert(weights, rules)
