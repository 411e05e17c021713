"""Published scBERT files: ``panglao_pretrain.pth``, or a fine-tuned one, with a gene list.

The weights name no genes; they belong to the 16,906 symbols of ``panglao_10000.h5ad``, in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.core.errors import CheckpointError
from cellray.data.vocab import Vocab
from cellray.models.upstream._reading import find_file, read_tensors
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
    stacked,
    strip_prefix,
    tensors_of,
)

__all__ = ["UPSTREAM", "performer_rules"]

Tensor = torch.Tensor
_SIGNATURE = r"(^|\.)token_emb\.weight$"
_STATE = "model_state_dict"


def performer_rules(ours: str, theirs: str, *, num_layers: int, bias: bool) -> list[Rule]:
    """Rules of a stack of FAVOR+ blocks, as scBERT and scFoundation name them."""
    rules = [Rule((f"{ours}.schedule.calls",), (f"{theirs}.calls_since_last_redraw",))]
    for number in range(num_layers):
        block, layer = f"{ours}.blocks.{number}", f"{theirs}.net.layers.{number}"
        heads = [f"{layer}.0.fn.to_{name}" for name in "qkv"]
        parts = ("weight", "bias") if bias else ("weight",)
        rules += [
            *same(f"{block}.attention_norm", f"{layer}.0.norm"),
            Rule(
                (f"{block}.attention.features",),
                (f"{layer}.0.fn.fast_attention.projection_matrix",),
            ),
            *stacked(f"{block}.attention.qkv", heads, parts),
            *same(f"{block}.attention.out", f"{layer}.0.fn.to_out"),
            *same(f"{block}.ffn_norm", f"{layer}.1.norm"),
            *same(f"{block}.expand", f"{layer}.1.fn.fn.w1"),
            *same(f"{block}.contract", f"{layer}.1.fn.fn.w2"),
        ]
    return rules


def _rules(model: Mapping[str, Any], num_classes: int, vocab: Vocab, classes_of: str) -> list[Rule]:
    prefix = "backbone." if num_classes else ""
    rules = [
        *same(f"{prefix}bins", "token_emb", ["weight"]),
        Rule((f"{prefix}genes.weight",), ("pos_emb.emb.weight",), back=_double),
        *performer_rules(
            f"{prefix}encoder", "performer", num_layers=int(model["num_layers"]), bias=False
        ),
        *same(f"{prefix}norm", "norm"),
    ]
    if not num_classes:
        return rules + same("to_bins", "to_out")
    head = Rule(("head.squeeze.weight",), ("to_out.conv1.weight",), _flat, _lifted)
    return [
        *rules,
        head,
        *same("head.squeeze", "to_out.conv1", ["bias"]),
        *same("head.layers.0", "to_out.fc1"),
        *same("head.layers.3", "to_out.fc2"),
        *same("head.layers.6", "to_out.fc3"),
    ]


def _double(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gene table is stored in float64."""
    return (tensors[0].double(),)


def _flat(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return (tensors[0].reshape(1, -1),)


def _lifted(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return (tensors[0].reshape(1, 1, 1, -1),)


def _read(path: Path, options: Options) -> Imported:
    where = f"'{path}'"
    file = find_file(path, ["*pretrain*.pth", "*.pth", "*.pt"]) if path.is_dir() else path
    if file is None:
        raise CheckpointError(f"{where} has no .pth file")
    raw = read_tensors(file, allow_code=options.allow_code)
    inner = raw.get(_STATE)
    state = inner if isinstance(inner, Mapping) else raw
    nested = state is not raw
    tensors, others = tensors_of(state)
    weights = strip_prefix(tensors, "module.")
    check_kind(weights, _SIGNATURE, where, raw=raw)
    demand(weights, ["token_emb.weight", "pos_emb.emb.weight"], where, axes=2)
    genes = needed(options, "the gene symbols (panglao_10000.h5ad, or a list, one a line)")
    places = int(weights["pos_emb.emb.weight"].shape[0])
    if len(genes.names) + 1 != places:
        raise CheckpointError(
            f"'{genes.source}' lists {len(genes.names)} genes, the weights of {where} are of "
            f"{places - 1}: it is another gene list"
        )
    model = _config(weights, where)
    head = weights.get("to_out.fc3.weight")
    classes = () if head is None else class_names(options.labels, int(head.shape[0]), where)
    if classes:
        model["masked_head"] = False
    symbols = genes.symbols or genes.names
    vocab = Vocab(
        gene_ids=genes.names,
        symbols=tuple(symbols),
        gene_tokens=np.arange(len(genes.names), dtype=np.int32),
        specials={"<pad>": len(genes.names)},
    )
    rules = _rules(model, len(classes), vocab, "cell")
    ours, ignored = convert(weights, rules, ignore={}, where=where)
    ignored |= {f"{_STATE}.{name}" if nested else name: why for name, why in others.items()}
    beside = sorted(str(name) for name in raw if name != _STATE) if nested else []
    ignored |= dict.fromkeys(beside, "of the training run, not of the model")
    table = weights["pos_emb.emb.weight"]
    rounded = bool((table.to(torch.float32).to(table.dtype) != table).any())
    return Imported(
        model=model,
        tokenizer={"name": "panel", "num_bins": model["num_bins"]},
        objective={"name": "masked_bins"},
        vocab=vocab,
        weights=ours,
        rules=rules,
        ignored=ignored,
        classes=classes,
        notes=("the gene table has more digits than float32: it was rounded",) if rounded else (),
    )


def _config(weights: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    layers = {int(m[1]) for n in weights if (m := re.match(r"performer\.net\.layers\.(\d+)\.", n))}
    first = "performer.net.layers.0"
    names = [
        f"{first}.0.fn.fast_attention.projection_matrix",
        f"{first}.0.fn.to_q.weight",
        f"{first}.1.fn.fn.w1.weight",
    ]
    demand(weights, names, where, axes=2)
    features, queries, inner = (weights[name] for name in names)
    return {
        "width": int(weights["token_emb.weight"].shape[1]),
        "num_layers": len(layers),
        "num_heads": int(queries.shape[0]) // int(features.shape[1]),
        "head_width": int(features.shape[1]),
        "ffn_width": int(inner.shape[0]),
        "num_bins": int(weights["token_emb.weight"].shape[0]) - 2,
        "freeze_genes": True,
    }


UPSTREAM = Upstream(
    formats="panglao_pretrain.pth (or a fine-tuned file), with --genes panglao_10000.h5ad or a "
    "list of its gene symbols",
    signature=_SIGNATURE,
    read=_read,
    rules=_rules,
    gene_files=("panglao*.h5ad", "genes.txt"),
    takes=("labels",),
)
