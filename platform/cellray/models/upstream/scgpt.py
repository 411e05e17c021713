"""Published scGPT folders: ``best_model.pt``, ``args.json`` and ``vocab.json``.

Flash-attention files call the joint projection ``Wqkv``, torch ones ``in_proj``; newer ones put
``_impl.`` between. Files fine-tuned for other tasks carry other parts: classifier, batch labels,
domain norm, zero probabilities, discriminator.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.core.errors import CheckpointError
from cellray.data.vocab import Vocab
from cellray.models.upstream._reading import find_file, read_json, read_tensors
from cellray.models.upstream.base import (
    GeneList,
    Imported,
    Options,
    Rule,
    Upstream,
    check_kind,
    class_names,
    convert,
    needed,
    same,
    strip_prefix,
)

__all__ = ["UPSTREAM"]

Tensor = torch.Tensor
_SIGNATURE = r"(^|\.)encoder\.enc_norm\.weight$"
_SPECIALS = ("<pad>", "<cls>", "<eoc>")
_MLP = {0: "_decoder.0", 2: "_decoder.2", 3: "_decoder.3", 5: "_decoder.5", 6: "out_layer"}
_BATCH = "batch"


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as torch's attention has them, whatever wrapper wrote the file."""
    result = {}
    for name, value in strip_prefix(weights, "module.").items():
        plain = name.replace("._impl.", ".")
        result[plain.replace("self_attn.Wqkv.", "self_attn.in_proj_")] = value
    return result


def _rules(model: Mapping[str, Any], num_classes: int, vocab: Vocab, classes_of: str) -> list[Rule]:
    prefix = "backbone." if num_classes else ""
    rules = [
        *same(f"{prefix}genes.table", "encoder.embedding", ["weight"]),
        *same(f"{prefix}genes.norm", "encoder.enc_norm"),
        *same(f"{prefix}values.lift", "value_encoder.linear1"),
        *same(f"{prefix}values.mix", "value_encoder.linear2"),
        *same(f"{prefix}values.norm", "value_encoder.norm"),
    ]
    if model["flag"]:
        rules += same(f"{prefix}flag", "flag_encoder", ["weight"])
    for number in range(int(model["num_layers"])):
        ours, theirs = f"{prefix}encoder.blocks.{number}", f"transformer_encoder.layers.{number}"
        attention = f"{ours}.attention.qkv"
        rules += [
            Rule((f"{attention}.weight",), (f"{theirs}.self_attn.in_proj_weight",)),
            Rule((f"{attention}.bias",), (f"{theirs}.self_attn.in_proj_bias",)),
            *same(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj"),
            *same(f"{ours}.expand", f"{theirs}.linear1"),
            *same(f"{ours}.contract", f"{theirs}.linear2"),
            *same(f"{ours}.attention_norm", f"{theirs}.norm1"),
            *same(f"{ours}.ffn_norm", f"{theirs}.norm2"),
        ]
    rules += _decoders(model, prefix) + _batch_parts(model, prefix, vocab)
    if num_classes:
        rules += _mlp("head", "cls_decoder")
    return rules


def _mlp(ours: str, theirs: str) -> list[Rule]:
    """A classifier of two hidden layers."""
    return [
        rule
        for number, name in _MLP.items()
        for rule in same(f"{ours}.layers.{number}", f"{theirs}.{name}")
    ]


def _decoders(model: Mapping[str, Any], prefix: str) -> list[Rule]:
    rules: list[Rule] = []
    for number in (0, 2, 4):
        rules += same(f"{prefix}expression.layers.{number}", f"decoder.fc.{number}")
        if model["expressed"]:
            rules += same(f"{prefix}expression.expressed.{number}", f"decoder.zero_logit.{number}")
    if model["gepc"]:
        name = f"{prefix}expression_from_cell"
        rules += same(f"{name}.query", "mvc_decoder.gene2query")
        rules += same(f"{name}.project", "mvc_decoder.W", ["weight"])
        if model["expressed"]:
            rules += same(f"{name}.expressed", "mvc_decoder.W_zero_logit")
    return rules


def _batch_parts(model: Mapping[str, Any], prefix: str, vocab: Vocab) -> list[Rule]:
    rules: list[Rule] = []
    if model["batch_labels"]:
        rules += same(f"{prefix}batch_labels.table", "batch_encoder.embedding", ["weight"])
        rules += same(f"{prefix}batch_labels.norm", "batch_encoder.enc_norm")
    if model["adversary"]:
        rules += _mlp(f"{prefix}adversary.classifier", "grad_reverse_discriminator")
    if model["domain_norm"] != "none":
        parts = ["running_mean", "running_var", "num_batches_tracked"]
        parts += ["weight", "bias"] if model["domain_affine"] else []
        count = int(model["num_domains"])
        for number in range(count):
            theirs = "bn" if model["domain_norm"] == "shared" else f"dsbn.bns.{number}"
            rules += same(f"{prefix}domain_norm.norms.{number}", theirs, parts)
    return rules


def _vocab(genes: GeneList, *, rows: int, where: str) -> Vocab:
    """The gene space of ``vocab.json``; specials that it lacks take the rows that are left."""
    if genes.tokens is None:
        raise CheckpointError(
            f"'{genes.source}' names genes without token ids; give the model's vocab.json"
        )
    tokens = dict(genes.tokens)
    if max(tokens.values()) >= rows:
        raise CheckpointError(
            f"'{genes.source}' has token ids up to {max(tokens.values())}, the weights of {where} "
            f"have {rows} rows: it is the vocabulary of another model"
        )
    specials = {name: tokens.pop(name) for name in _SPECIALS if name in tokens}
    taken = {*tokens.values(), *specials.values()}
    free = iter(row for row in range(rows) if row not in taken)
    for name in _SPECIALS:
        if name not in specials:
            row = next(free, None)
            if row is None and name != "<eoc>":
                raise CheckpointError(
                    f"'{genes.source}' has no special token '{name}', and all {rows} rows of the "
                    "weights are genes: it is not the vocabulary of a published model"
                )
            if row is not None:
                specials[name] = row
    specials |= {f"<unused{row}>": row for row in free}
    others = {name: row for name, row in tokens.items() if re.fullmatch(r"<[^>]*>", name)}
    names = sorted((n for n in tokens if n not in others), key=lambda n: tokens[n])
    return Vocab(
        gene_ids=tuple(names),
        symbols=tuple(names),
        gene_tokens=np.array([tokens[name] for name in names], dtype=np.int32),
        specials={**specials, **others},
    )


def _config(args: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    numbered = re.compile(r"transformer_encoder\.layers\.(\d+)\.")
    layers = {int(m[1]) for name in weights if (m := numbered.match(name))}
    width = int(weights["encoder.embedding.weight"].shape[1])
    if "nheads" not in args:
        raise CheckpointError(
            f"{where}: neither args.json nor --heads says how many attention heads there are"
        )
    style = str(args.get("input_emb_style", "continuous"))
    if style != "continuous":
        raise CheckpointError(
            f"{where} has input_emb_style '{style}'; only 'continuous' models are published and "
            "supported"
        )
    domains = {int(m[1]) for n in weights if (m := re.match(r"dsbn\.bns\.(\d+)\.", n))}
    shared = any(name.startswith("bn.") for name in weights)
    narrow = weights.get("transformer_encoder.layers.0.linear1.weight")
    first = weights.get("decoder.fc.0.weight")
    model: dict[str, Any] = {
        "width": width,
        "num_layers": len(layers),
        "num_heads": int(args["nheads"]),
        "ffn_width": int(args.get("d_hid", width) if narrow is None else narrow.shape[0]),
        "dropout": float(args.get("dropout", 0.2)),
        "flag": "flag_encoder.weight" in weights,
        "gepc": "mvc_decoder.W.weight" in weights,
        "expressed": any(name.startswith("decoder.zero_logit.") for name in weights),
        "batch_labels": first is not None and int(first.shape[1]) == 2 * width,
        "adversary": any(name.startswith("grad_reverse_discriminator.") for name in weights),
        "domain_norm": "domain" if domains else "shared" if shared else "none",
        "domain_affine": any(re.match(r"(dsbn\.bns\.\d+|bn)\.weight$", name) for name in weights),
        "num_domains": len(domains) or 1,
        # Published weights were trained without the output projection at hidden tokens.
        "gen_out_proj": False,
    }
    if model["batch_labels"] or domains or model["adversary"]:
        model["batch_key"] = _BATCH
    return model


def _num_batches(model: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> int:
    """Technical batches that the parts of the file speak of."""
    counts = set()
    if model["batch_labels"]:
        counts.add(int(weights["batch_encoder.embedding.weight"].shape[0]))
    if model["domain_norm"] == "domain":
        counts.add(int(model["num_domains"]))
    if model["adversary"]:
        counts.add(int(weights["grad_reverse_discriminator.out_layer.weight"].shape[0]))
    if len(counts) > 1:
        raise CheckpointError(f"{where}: its parts speak of {sorted(counts)} technical batches")
    return counts.pop() if counts else 0


def _read(path: Path, options: Options) -> Imported:
    where = f"'{path}'"
    file = find_file(path, ["best_model.pt", "model.pt", "*.pt"]) if path.is_dir() else path
    if file is None:
        raise CheckpointError(f"{where} has no best_model.pt")
    settings = (path if path.is_dir() else path.parent) / "args.json"
    weights = _renamed(read_tensors(file, allow_code=options.allow_code))
    check_kind(weights, _SIGNATURE, where)
    if any(name.startswith("pert_encoder.") for name in weights):
        raise CheckpointError(
            f"{where} is a perturbation model (it has a pert_encoder), which is not supported yet"
        )
    args = read_json(settings) if settings.is_file() else {}
    if options.heads:
        args["nheads"] = options.heads
    model = _config(args, weights, where)
    rows = int(weights["encoder.embedding.weight"].shape[0])
    vocab = _vocab(needed(options, "vocab.json"), rows=rows, where=where)
    batches = _num_batches(model, weights, where)
    head = weights.get("cls_decoder.out_layer.weight")
    count = 0 if head is None or head.shape[0] < 2 else int(head.shape[0])
    classes = class_names(options.labels, count, where) if count else ()
    rules = _rules(model, len(classes), vocab, "cell")
    ignore = {} if count else {r"cls_decoder\..*": "a classifier of one class"}
    ours, ignored = convert(weights, rules, ignore=ignore, where=where)
    kept = {key: value for key, value in model.items() if key != "num_domains"}
    return Imported(
        model=kept,
        tokenizer={
            "name": "bins",
            "max_tokens": int(args.get("max_seq_len", 1200)),
            "num_bins": int(args.get("n_bins", 51)),
            "cls_value": float(args.get("pad_value", -2)),
        },
        objective={"name": "generative"},
        vocab=vocab,
        weights=ours,
        rules=rules,
        ignored=ignored,
        covariates={_BATCH: [str(i) for i in range(batches)]} if batches else {},
        classes=classes,
    )


UPSTREAM = Upstream(
    formats="a folder with best_model.pt, args.json and vocab.json",
    signature=_SIGNATURE,
    read=_read,
    rules=_rules,
    gene_files=("vocab.json",),
)
