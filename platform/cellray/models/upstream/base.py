"""How published weights become a cellray checkpoint: rules by name, and nothing left over.

An adapter reads the sizes from the file, says which of its names become which of ours, and which it
leaves out and why. Everything else is an error that lists the keys. Rules run both ways, so that a
checkpoint can be written back under the published names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cellray.core import registry
from cellray.core.errors import CheckpointError, ConfigError, did_you_mean
from cellray.data.vocab import Vocab

__all__ = [
    "GeneList",
    "Imported",
    "Options",
    "Rule",
    "Upstream",
    "convert",
    "demand",
    "renamed",
    "revert",
    "same",
    "stacked",
    "strip_prefix",
    "tensors_of",
    "upstream",
]

Tensor = torch.Tensor
Weights = Mapping[str, Tensor]
_LISTED = 8


@dataclass(frozen=True)
class GeneList:
    """Genes of a published model, in its order.

    Attributes:
        names: ids or symbols.
        symbols: symbols, "" where unknown.
        tokens: name -> token id, specials included, where the file has them.
        medians: name -> non-zero median, where the file has them.
        source: the file, for messages.
    """

    names: tuple[str, ...]
    symbols: tuple[str, ...] = ()
    tokens: Mapping[str, int] | None = None
    medians: Mapping[str, float] | None = None
    source: str = ""


@dataclass(frozen=True)
class Options:
    """What a user says besides the file.

    Attributes:
        genes: the gene list, read; None if none was given or found.
        labels: class names in code order, for files with a classifier.
        entry: which of several models in one file.
        medians: gene -> non-zero median from a file of its own.
        heads: attention heads, for files that do not say; 0 takes the adapter's default.
        allow_code: read pickles that hold more than tensors and plain values.
    """

    genes: GeneList | None = None
    labels: tuple[str, ...] = ()
    entry: str = ""
    medians: Mapping[str, float] | None = None
    heads: int = 0
    allow_code: bool = False


@dataclass(frozen=True)
class Rule:
    """Names of the source to names of ours, and back.

    Attributes:
        ours: names in the model's state dict.
        theirs: names in the published file.
        forth: their tensors -> ours, in order.
        back: our tensors -> theirs, in order.
        optional: their names may be absent; what they hold is derived from other keys.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    forth: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple
    back: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple
    optional: bool = False


def same(ours: str, theirs: str, parts: Sequence[str] = ("weight", "bias")) -> list[Rule]:
    """One rule for each part (``weight``, ``bias``) of a layer; "" for a bare tensor."""
    return [
        Rule((f"{ours}.{part}" if part else ours,), (f"{theirs}.{part}" if part else theirs,))
        for part in parts
    ]


def stacked(
    ours: str, theirs: Sequence[str], parts: Sequence[str] = ("weight", "bias")
) -> list[Rule]:
    """Several layers of the source stacked into one of ours along the output axis."""

    def forth(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return (torch.cat(list(tensors)),)

    def back(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[0].chunk(len(theirs))

    return [
        Rule((f"{ours}.{part}",), tuple(f"{name}.{part}" for name in theirs), forth, back)
        for part in parts
    ]


def strip_prefix(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Names without ``prefix`` (``module.`` of a wrapped model), where all of them have it."""
    if weights and all(name.startswith(prefix) for name in weights):
        return {name.removeprefix(prefix): value for name, value in weights.items()}
    return dict(weights)


def renamed(weights: Weights, rename: Callable[[str], str], where: str) -> dict[str, Tensor]:
    """The tensors under other names.

    Raises:
        CheckpointError: two of their names become one.
    """
    origin: dict[str, str] = {}
    for name in weights:
        other = origin.setdefault(rename(name), name)
        if other != name:
            raise CheckpointError(
                f"{where} names one tensor twice, '{other}' and '{name}': which one is the model's "
                "cannot be told; save the file with one of them"
            )
    return {new: weights[name] for new, name in origin.items()}


def tensors_of(raw: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a table, and what else it holds: name -> what it is."""
    tensors = {str(name): value for name, value in raw.items() if isinstance(value, Tensor)}
    others = {
        str(name): f"{type(value).__name__}, no tensor"
        for name, value in raw.items()
        if not isinstance(value, Tensor)
    }
    return tensors, others


def demand(weights: Weights, names: Sequence[str], where: str, *, axes: int = 0) -> None:
    """Refuse weights without tensors that tell the model's sizes.

    Args:
        weights: the published tensors.
        names: those that must be there.
        where: the file, for messages.
        axes: how many axes they must have; 0 for any.

    Raises:
        CheckpointError: some are missing, or have more or fewer axes; they are listed.
    """
    lacking = [name for name in names if name not in weights]
    if lacking:
        raise CheckpointError(
            f"{where} does not fit: tensors are missing: {', '.join(lacking)}; it holds "
            f"{listed(sorted(weights))}"
        )
    odd = [f"{name} {tuple(weights[name].shape)}" for name in names if weights[name].ndim != axes]
    if axes and odd:
        raise CheckpointError(
            f"{where} does not fit: tensors without {axes} axes: {', '.join(odd)}"
        )


@dataclass(frozen=True)
class Imported:
    """A published model under our names.

    Attributes:
        model: keys of ``[model]``.
        tokenizer: keys of ``[tokenizer]``.
        objective: keys of ``[objective]``.
        vocab: the gene space.
        weights: our name -> float32 tensor (integers as they are).
        rules: how they were made, for the way back.
        ignored: their key -> why it was left out.
        covariates: name -> categories.
        classes: label names of the classifier, if there is one.
        classes_of: ``cell`` or ``gene``.
        notes: what a user should know.
    """

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    objective: Mapping[str, Any]
    vocab: Vocab
    weights: Weights
    rules: Sequence[Rule]
    ignored: Mapping[str, str] = field(default_factory=dict)
    covariates: Mapping[str, list[str]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    classes_of: str = "cell"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Upstream:
    """What an adapter's module exports as ``UPSTREAM``.

    Attributes:
        formats: what ``read`` takes, in words.
        signature: regular expression of a key that only files of this family have.
        read: (file or folder, options) -> the model; raises CellrayError.
        rules: (our model configuration, number of classes, vocabulary, what the classes are of) ->
            rules, for the way back.
        gene_files: names that the gene list may have beside the weights.
        median_files: the same of a file of medians.
        symbol_files: the same of a dictionary of symbols.
        takes: options that files of this family may need besides ``genes`` and ``allow_code``.
    """

    formats: str
    signature: str
    read: Callable[[Path, Options], Imported]
    rules: Callable[[Mapping[str, Any], int, Vocab, str], list[Rule]]
    gene_files: tuple[str, ...] = ()
    median_files: tuple[str, ...] = ()
    symbol_files: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


def upstream(name: str) -> Upstream:
    """The adapter of a family.

    Raises:
        ConfigError: there is no such family.
    """
    known = registry.names("cellray.models.upstream")
    if ":" not in name and name not in known:
        raise ConfigError(
            f"no family '{name}' whose published weights can be read.{did_you_mean(name, known)} "
            f"Allowed: {', '.join(known)}, or 'module.path:UPSTREAM' for your own"
        )
    found: Upstream = registry.find("cellray.models.upstream", name, "UPSTREAM")
    return found


def listed(keys: Sequence[str]) -> str:
    """Some keys, and how many more there are."""
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _kin(keys: Sequence[str]) -> str:
    """A remark on the family that the keys look like, "" if none."""
    for name in registry.names("cellray.models.upstream"):
        pattern = re.compile(upstream(name).signature)
        if any(pattern.search(key) for key in keys):
            return f" Its keys look like those of '{name}'."
    return ""


def check_kind(weights: Weights, signature: str, where: str, *, raw: Any = None) -> None:
    """Refuse a file whose keys show that it is of another family, or no model at all.

    Args:
        weights: the tensors that the family's reader found.
        signature: regular expression of a key that only files of this family have.
        where: the file, for messages.
        raw: all that the file holds, nested as it is.

    Raises:
        CheckpointError: no key has the family's signature, or tensors are of a kind that no
            published model has (sparse, complex, without values).
    """
    if not any(re.search(signature, name) for name in weights):
        table = weights if raw is None else raw
        keys = sorted(_names(table))
        for name, value in table.items():
            if any(re.search(signature, key) for key in _names(value)):
                raise CheckpointError(
                    f"{where} keeps its tensors one level down, in '{name}', and published files "
                    f"do not: save what is in '{name}' as a file of its own"
                )
        raise CheckpointError(
            f"{where} is not a published checkpoint of this family.{_kin(keys)} It holds "
            f"{listed(keys) or 'nothing'}"
        )
    odd = [
        f"{name} ({tensor.dtype}, {tensor.layout}, {tensor.device})".replace("torch.", "")
        for name, tensor in weights.items()
        if tensor.is_complex()
        or tensor.is_quantized
        or tensor.layout != torch.strided
        or tensor.device.type != "cpu"
    ]
    if odd:
        raise CheckpointError(f"{where} holds tensors that are no plain numbers: {listed(odd)}")


def _names(raw: Any, depth: int = 0) -> set[str]:
    """Keys of nested tables."""
    if not isinstance(raw, Mapping) or depth > 3:
        return set()
    found = {str(key) for key in raw}
    for value in raw.values():
        found |= _names(value, depth + 1)
    return found


def convert(
    weights: Weights, rules: Sequence[Rule], *, ignore: Mapping[str, str], where: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Our tensors from theirs, and what was left out.

    Args:
        weights: the published tensors.
        rules: of this model.
        ignore: regular expression of whole keys -> why they are left out.
        where: the file, for messages.

    Returns:
        Our name -> tensor, float32 where it is a float; their key -> reason.

    Raises:
        CheckpointError: keys that no rule takes, keys that are missing, or values that are not
            finite; they are listed.
    """
    taken: set[str] = set()
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    broken: list[str] = []
    for rule in rules:
        absent = [name for name in rule.theirs if name not in weights]
        taken.update(name for name in rule.theirs if name in weights)
        if absent:
            missing += [] if rule.optional else absent
            continue
        broken += [n for n in rule.theirs if not bool(torch.isfinite(_plain(weights[n])).all())]
        made = rule.forth([weights[name] for name in rule.theirs])
        ours |= dict(zip(rule.ours, (_plain(tensor) for tensor in made), strict=True))
    left = sorted(set(weights) - taken)
    reasons = {
        key: next((why for pattern, why in ignore.items() if re.fullmatch(pattern, key)), "")
        for key in left
    }
    unknown = [key for key, why in reasons.items() if not why]
    if unknown or missing or broken:
        problems = []
        if broken:
            problems.append(f"{len(broken)} tensors hold NaN or infinity: {listed(broken)}")
        if missing:
            problems.append(f"{len(missing)} tensors are missing: {listed(missing)}")
        if unknown:
            problems.append(f"{len(unknown)} tensors have no place: {listed(unknown)}")
        raise CheckpointError(f"{where} does not fit: {'; '.join(problems)}.{_kin(left)}")
    return ours, reasons


def revert(weights: Weights, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their tensors from ours: the way back of :func:`convert`."""
    theirs: dict[str, Tensor] = {}
    for rule in rules:
        made = rule.back([weights[name] for name in rule.ours])
        theirs |= dict(zip(rule.theirs, made, strict=True))
    return theirs


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32) if tensor.is_floating_point() else tensor.detach()


def class_names(given: Sequence[str], count: int, where: str) -> tuple[str, ...]:
    """The names of ``count`` classes: those that were given, or their numbers.

    Raises:
        CheckpointError: another number of names was given, or a name twice.
    """
    if not given:
        return tuple(str(number) for number in range(count))
    if len(given) != count:
        raise CheckpointError(
            f"{where} has a classifier of {count} classes, and {len(given)} labels were given: "
            f"{listed(list(given))}; give one a class, in code order"
        )
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise CheckpointError(f"the labels of {where} have a name twice: {listed(twice)}")
    return tuple(given)


def needed(options: Options, what: str) -> GeneList:
    """The gene list of the options.

    Raises:
        CheckpointError: none was given or found beside the weights.
    """
    if options.genes is None:
        raise CheckpointError(f"the weights come without their genes: give {what} with --genes")
    return options.genes
