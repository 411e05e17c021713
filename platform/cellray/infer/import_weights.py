"""Published weights to a cellray checkpoint, with every key accounted for, and back."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cellray import __version__
from cellray.core import registry
from cellray.core.errors import CheckpointError, ConfigError
from cellray.core.section import build_section, to_dict
from cellray.data.tokens import tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import family
from cellray.models.upstream._gene_lists import (
    generation,
    read_gene_list,
    read_labels,
    read_medians,
    read_symbols,
)
from cellray.models.upstream._reading import fitting, one_of
from cellray.models.upstream.base import Imported, Options, Upstream, revert, upstream
from cellray.objectives.base import ObjectiveUnit
from cellray.train.checkpoint import Manifest, model_of, read_checkpoint, write_checkpoint

__all__ = ["ImportReport", "export_weights", "import_weights", "read_gene_list", "read_labels"]


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


def _beside(folder: Path, patterns: Sequence[str], what: str, option: str) -> Path | None:
    """The one file of ``folder`` that fits, None if none does; several are refused."""
    return one_of(fitting(folder, patterns), what, f"say which with {option}")


def _symbol_file(folder: Path, patterns: Sequence[str], gene_file: Path) -> Path | None:
    """The dictionary of symbols, of the gene file's generation where the names say it."""
    wanted = generation(gene_file)
    found = fitting(folder, patterns)
    same = [path for path in found if wanted and generation(path) == wanted]
    return one_of(same or found, "dictionaries of symbols", "leave one of them there")


def _check_generations(genes: Path, medians: Path) -> None:
    """Refuse dictionaries whose names say that they are of different corpora."""
    ours, theirs = generation(genes), generation(medians)
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"'{genes}' is of the generation {ours} and '{medians}' of {theirs}: both must be of "
            "the one that the weights were trained with; choose with --genes and --medians"
        )


def _options(
    unit: Upstream,
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
    folder = source if source.is_dir() else source.parent
    gene_file = Path(genes) if genes else None
    if gene_file is None:
        gene_file = _beside(folder, unit.gene_files, "gene lists", "--genes")
    listed = None
    if gene_file is not None:
        listed = read_gene_list(gene_file, allow_code=allow_code)
    median_file = Path(medians) if medians else None
    if median_file is None and (listed is None or not listed.medians):
        median_file = _beside(folder, unit.median_files, "files of medians", "--medians")
    if listed is not None and gene_file is not None:
        if median_file is not None:
            _check_generations(gene_file, median_file)
        symbol_file = _symbol_file(folder, unit.symbol_files, gene_file)
        if symbol_file is not None and not listed.symbols:
            named = read_symbols(symbol_file, allow_code=allow_code)
            listed = replace(listed, symbols=tuple(named.get(gene, "") for gene in listed.names))
    return Options(
        genes=listed,
        labels=read_labels(labels, allow_code=allow_code) if labels else (),
        entry=entry,
        medians=None if median_file is None else read_medians(median_file, allow_code=allow_code),
        heads=heads,
        allow_code=allow_code,
    )


def _check_used(name: str, unit: Upstream, given: Mapping[str, object]) -> None:
    """Refuse options that files of this family have no use for."""
    idle = [f"--{option}" for option, value in given.items() if value and option not in unit.takes]
    if idle:
        known = ", ".join(f"--{option}" for option in ("genes", *unit.takes))
        raise ConfigError(f"{name} has no use for {', '.join(idle)}; it takes {known}")


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
    whole = [
        f"{name} {value.dtype}".replace("torch.", "")
        for name, value in weights.items()
        if name in own and not value.is_floating_point()
    ]
    wrong = [
        f"{name} {tuple(value.shape)} for {shapes[name]}"
        for name, value in weights.items()
        if name in shapes and tuple(value.shape) != shapes[name]
    ]
    problems = []
    for kind, names in (
        ("unset", unset),
        ("without a place", extra),
        ("of another size", wrong),
        ("of integers where the model has fractions", whole),
    ):
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
            genes are of another generation, or several files could be meant; a key is left over,
            missing (all are listed) or not finite; or an option is of no use. Nothing is written
            then.
    """
    path, out = Path(source), Path(target)
    adapter = upstream(name)
    if not path.exists():
        raise CheckpointError(f"nothing at '{source}'; {name} is read from {adapter.formats}")
    if os.path.lexists(out):
        raise ConfigError(f"'{target}' exists; name a folder that does not")
    _check_used(
        name, adapter, {"medians": medians, "labels": labels, "entry": entry, "heads": heads}
    )
    options = _options(
        adapter,
        path,
        genes=genes,
        medians=medians,
        labels=labels,
        entry=entry,
        heads=heads,
        allow_code=allow_code,
    )
    found = adapter.read(path, options)
    if labels and not found.classes:
        raise ConfigError(f"'{source}' has no classifier that --labels could name; leave it out")
    manifest = _manifest(name, found, str(source))
    count = _check_whole(manifest, found.vocab, found.weights)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_of(manifest, found.vocab)
    model.load_state_dict({**model.state_dict(), **found.weights})
    _write(out, manifest, found.vocab, model.state_dict())
    taken = {key for rule in found.rules for key in rule.theirs}
    return ImportReport(
        target=str(target),
        family=name,
        num_parameters=count,
        num_tensors=len(taken),
        ignored=found.ignored,
        num_genes=len(found.vocab),
        notes=(*found.notes, *_unnamed(found, options)),
    )


def _unnamed(found: Imported, options: Options) -> list[str]:
    """A note on classes that are called by their numbers."""
    numbers = tuple(str(number) for number in range(len(found.classes)))
    if options.labels or not numbers or found.classes != numbers:
        return []
    return [
        f"nothing names the classes ({len(numbers)}): they are called by their numbers, as the "
        "classifier orders them; name them with --labels"
    ]


def _write(
    out: Path, manifest: Manifest, vocab: Vocab, weights: Mapping[str, torch.Tensor]
) -> None:
    """Write a checkpoint whole or not at all; what lies beside it is left alone."""
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"'{out}' cannot be written: {error}") from error
    try:
        write_checkpoint(partial, manifest, vocab=vocab, weights=weights)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under the names its family publishes them with.

    What published files hold besides (configuration, optimizer) is not made up. Keys that are
    derived from others (a tied decoder, a mask) are not all written. Parts that published models
    do not have (embeddings of conditions) are left out with a warning.
    """
    manifest, vocab, weights = read_checkpoint(path)
    model = dict(manifest.model)
    if "domain_norm" in model:
        names = [name for name in weights if "domain_norm.norms." in name]
        model["num_domains"] = len({name.split("norms.")[1].split(".")[0] for name in names})
    adapter = upstream(manifest.family)
    rules = adapter.rules(model, len(manifest.classes), vocab, manifest.classes_of)
    placed = {ours for rule in rules for ours in rule.ours}
    # The mask and its like are made from the configuration; only what was learnt can be lost.
    with torch.device("meta"):
        learnt = dict(model_of(manifest, vocab).named_parameters())
    lost = sorted(set(learnt) - placed)
    if lost:
        warnings.warn(
            f"{len(lost)} tensors of '{path}' have no published name and are left out: "
            f"{', '.join(lost[:8])}",
            stacklevel=2,
        )
    return revert(weights, rules)
