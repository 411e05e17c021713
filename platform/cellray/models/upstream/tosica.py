"""TOSICA's training folders: ``model-N.pth``, ``pathway.csv``, ``label_dictionary.csv``.

There are no published weights; these are what its users have. The genes are the columns of the
reference matrix, which the folder does not keep. Its tokens are interleaved, and stay so.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.core.errors import CheckpointError
from cellray.data.vocab import Vocab
from cellray.models.upstream._reading import (
    as_text,
    find_file,
    fitting,
    one_of,
    read_tensors,
)
from cellray.models.upstream.base import (
    Imported,
    Options,
    Rule,
    Upstream,
    check_kind,
    class_names,
    convert,
    demand,
    needed,
    same,
    strip_prefix,
    tensors_of,
)

__all__ = ["UPSTREAM"]

Tensor = torch.Tensor
_SIGNATURE = r"(^|\.)feature_embed\.fe\.mask$"
_MASK = "feature_embed.fe.mask"
_HEADS = 4  # every model that the published code trains by default


def _members(vocab: Vocab) -> tuple[Tensor, Tensor]:
    """Pathway and gene of every membership, pathway by pathway."""
    assert vocab.gene_sets is not None
    lengths = [len(genes) for genes in vocab.gene_sets.values()]
    pathways = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    genes = [gene for members in vocab.gene_sets.values() for gene in members]
    return pathways, torch.tensor(genes, dtype=torch.int64)


def _projection(vocab: Vocab, width: int) -> list[Rule]:
    """The dense masked matrix (P W, G) to one row a membership (N, W), and back."""
    assert vocab.gene_sets is not None
    count, num_genes = len(vocab.gene_sets), len(vocab)
    pathways_N, genes_N = _members(vocab)

    def gather(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return (tensors[0].view(count, width, num_genes)[pathways_N, :, genes_N],)

    def spread(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        dense = tensors[0].new_zeros(count, width, num_genes)
        dense[pathways_N, :, genes_N] = tensors[0]
        return (dense.view(count * width, num_genes),)

    theirs = "feature_embed.fe"
    return [
        Rule(("projection.weight",), (f"{theirs}.weight",), gather, spread),
        Rule(
            ("projection.bias",),
            (f"{theirs}.bias",),
            lambda tensors: (tensors[0].view(count, width),),
            lambda tensors: (tensors[0].reshape(-1),),
        ),
    ]


def _rules(model: Mapping[str, Any], num_classes: int, vocab: Vocab, classes_of: str) -> list[Rule]:
    rules = [
        *_projection(vocab, int(model["width"])),
        Rule(
            ("cls",),
            ("cls_token",),
            lambda tensors: (tensors[0].reshape(-1),),
            lambda tensors: (tensors[0].reshape(1, 1, -1),),
        ),
    ]
    for number in range(int(model["num_layers"])):
        ours = theirs = f"blocks.{number}"
        rules += [
            *same(f"{ours}.attention_norm", f"{theirs}.norm1"),
            *same(f"{ours}.qkv", f"{theirs}.attn.qkv"),
            *same(f"{ours}.out", f"{theirs}.attn.proj"),
            *same(f"{ours}.mlp_norm", f"{theirs}.norm2"),
            *same(f"{ours}.expand", f"{theirs}.mlp.fc1"),
            *same(f"{ours}.contract", f"{theirs}.mlp.fc2"),
        ]
    rules += same("norm", "norm")
    if model.get("pre_logits"):
        rules += same("pre_logits", "pre_logits.fc")
    named = [
        Rule(tuple(f"backbone.{name}" for name in rule.ours), rule.theirs, rule.forth, rule.back)
        for rule in rules
    ]
    return [*named, *same("head", "head")]


def _column(path: Path | None, what: str, where: str) -> list[str]:
    """The first column after the index of one of TOSICA's tables."""
    if path is None:
        raise CheckpointError(f"{where} has no {what} beside the weights")
    rows = [row for row in csv.reader(as_text(path).splitlines()) if row]
    if any(len(row) < 2 for row in rows):
        raise CheckpointError(
            f"'{path}' has one column; TOSICA writes two with a header: a number and the name"
        )
    return [row[1] for row in rows[1:]]


def _mask(weights: Mapping[str, Tensor], width: int, where: str) -> tuple[Tensor, Tensor]:
    """Which weights are there, (P W, G) and (P, W, G), of 0 and 1 and alike within a pathway."""
    values, shape = weights[_MASK], tuple(weights["feature_embed.fe.weight"].shape)
    if tuple(values.shape) != shape or shape[0] % width:
        raise CheckpointError(
            f"{where}: {_MASK} is {tuple(values.shape)} and the weights it masks {shape}; both "
            f"must be (pathways x {width}, genes), {width} being the width of cls_token"
        )
    if not bool(((values == 0) | (values == 1)).all()):
        raise CheckpointError(f"{where}: {_MASK} holds more than 0 and 1; it is no mask")
    mask = values.bool()
    per_pathway = mask.view(shape[0] // width, width, shape[1])
    if not bool((per_pathway == per_pathway[:, :1]).all()):
        raise CheckpointError(f"{where}: the rows of a pathway have different genes in {_MASK}")
    return mask, per_pathway


def _read(path: Path, options: Options) -> Imported:
    where = f"'{path}'"
    folder = path if path.is_dir() else path.parent
    file = _latest(path) if path.is_dir() else path
    if file is None:
        raise CheckpointError(f"{where} has no model-*.pth")
    raw = read_tensors(file, allow_code=options.allow_code)
    tensors, others = tensors_of(raw)
    weights = strip_prefix(tensors, "module.")
    check_kind(weights, _SIGNATURE, where, raw=raw)
    demand(weights, ["cls_token"], where, axes=3)
    demand(weights, [_MASK, "feature_embed.fe.weight", "head.weight"], where, axes=2)
    width = int(weights["cls_token"].shape[-1])
    mask, per_pathway = _mask(weights, width, where)
    vocab = _vocab(options, folder, per_pathway[:, 0].numpy(), where)
    layers = {int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name))}
    model = {
        "width": width,
        "num_layers": len(layers),
        "num_heads": options.heads or _HEADS,
        "token_layout": "interleaved",
        "gene_sets": "",
        "pre_logits": "pre_logits.fc.weight" in weights,
    }
    labels = options.labels
    dictionary = folder / "label_dictionary.csv"
    if not labels and dictionary.is_file():
        labels = tuple(_column(dictionary, dictionary.name, where))
    classes = class_names(labels, int(weights["head.weight"].shape[0]), where)
    rules = _rules(model, len(classes), vocab, "cell")
    ignore = {re.escape(_MASK): "kept as the vocabulary's gene sets"}
    ours, ignored = convert(weights, rules, ignore=ignore, where=where)
    notes = []
    if not options.heads:
        notes.append(f"the file does not say how many heads it has; {_HEADS} are taken (--heads)")
    stray = int((weights["feature_embed.fe.weight"][~mask] != 0).sum())
    if not (folder / "pathway.csv").is_file():
        notes.append(
            "no pathway.csv names the pathways: they are called 'pathway 0', 'pathway 1' .."
        )
    if stray:
        notes.append(f"{stray} masked weights are not 0; they have no effect and are dropped")
    return Imported(
        model=model,
        tokenizer={"name": "lognorm"},
        objective={"name": "classification"},
        vocab=vocab,
        weights=ours,
        rules=rules,
        ignored=ignored | others,
        classes=classes,
        notes=tuple(notes),
    )


def _latest(folder: Path) -> Path | None:
    """The weights of the last epoch.

    Raises:
        CheckpointError: several files could be meant.
    """
    epochs = {
        path: int(found[1])
        for path in fitting(folder, ["*.pth"])
        if (found := re.search(r"-(\d+)$", path.stem))
    }
    if not epochs:
        return find_file(folder, ["*.pth"])
    last = [path for path, epoch in epochs.items() if epoch == max(epochs.values())]
    return one_of(last, "files of weights of the last epoch", "give one of them as SRC")


def _vocab(
    options: Options, folder: Path, mask_PG: np.ndarray[Any, np.dtype[np.bool_]], where: str
) -> Vocab:
    genes = needed(options, "the genes of the reference matrix (its h5ad, or a list in order)")
    count, num_genes = mask_PG.shape
    if len(genes.names) != num_genes:
        raise CheckpointError(
            f"'{genes.source}' lists {len(genes.names)} genes, the weights of {where} are of "
            f"{num_genes}: it is another gene list"
        )
    table = folder / "pathway.csv"
    names = _column(table, table.name, where) if table.is_file() else []
    if not table.is_file():
        names = [f"pathway {number}" for number in range(count)]
    if len(names) != count:
        raise CheckpointError(f"'{table}' names {len(names)} pathways, the weights have {count}")
    sets = {
        name: tuple(np.flatnonzero(row).tolist()) for name, row in zip(names, mask_PG, strict=True)
    }
    if len(sets) != count:
        raise CheckpointError(f"'{table}' names a pathway twice")
    return Vocab(
        gene_ids=genes.names,
        symbols=tuple(genes.symbols or genes.names),
        gene_tokens=np.arange(num_genes, dtype=np.int32) + 1,
        specials={"<pad>": 0},
        gene_sets=sets,
    )


UPSTREAM = Upstream(
    formats="a training folder with model-N.pth, pathway.csv and label_dictionary.csv, with "
    "--genes: the reference's h5ad, or its genes in order",
    signature=_SIGNATURE,
    read=_read,
    rules=_rules,
    gene_files=("genes.txt", "*.h5ad"),
    takes=("labels", "heads"),
)
