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

from cellray.core.errors import CheckpointError, ConfigError
from cellray.data.vocab import Vocab
from cellray.models.upstream._reading import find_file, read_json, read_tensors
from cellray.models.upstream._settings import agree, allowed, decimal, whole
from cellray.models.upstream.base import (
    GeneList,
    Imported,
    Options,
    Rule,
    Upstream,
    check_kind,
    class_names,
    convert,
    demand,
    needed,
    renamed,
    same,
    strip_prefix,
    tensors_of,
)

__all__ = ["UPSTREAM"]

Tensor = torch.Tensor
_SIGNATURE = r"(^|\.)encoder\.enc_norm\.weight$"
_SPECIALS = ("<pad>", "<cls>", "<eoc>")
_MLP = {0: "_decoder.0", 2: "_decoder.2", 3: "_decoder.3", 5: "_decoder.5", 6: "out_layer"}
_BATCH = "batch"
_TUNED = (
    "fine-tuned: tokenizer.cls_value is 0, as the source's tuning scripts have it beside <cls> "
    "(-2 in pretraining)"
)
_ASSUMED = "no args.json beside the weights: 51 bins, 1,200 tokens and post-norm are assumed"
_BUILT = {
    "input_style": "binned",
    "input_emb_style": "continuous",
    "norm_scheme": "post",
    "pre_norm": False,
    "cell_emb_style": "cls",
    "mask_value": -1,
}


def _renamed(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Names as torch's attention has them, whatever wrapper wrote the file."""

    def plain(name: str) -> str:
        return name.replace("._impl.", ".").replace("self_attn.Wqkv.", "self_attn.in_proj_")

    bare = strip_prefix(strip_prefix(weights, "module."), "_orig_mod.")
    return renamed(bare, plain, where)


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
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise CheckpointError(
            f"'{genes.source}': token ids are not 0 .. {len(tokens) - 1}, each once"
        )
    specials = {name: tokens.pop(name) for name in _SPECIALS if name in tokens}
    missing = [name for name in _SPECIALS if name not in specials]
    free = list(range(len(tokens) + len(specials), rows))
    if len(free) > len(missing):
        raise CheckpointError(
            f"'{genes.source}' names {rows - len(free)} of the {rows} rows of the weights of "
            f"{where}; only the specials {', '.join(_SPECIALS)} may be missing: it is the "
            "vocabulary of another model. Whole-human weights have 60,697 rows, organ ones 36,574"
        )
    specials |= dict(zip(missing, free, strict=False))
    without = [name for name in ("<pad>", "<cls>") if name not in specials]
    if without:
        raise CheckpointError(
            f"'{genes.source}' has no special token '{without[0]}', and all {rows} rows of the "
            "weights are genes: it is not the vocabulary of a published model"
        )
    others = {name: row for name, row in tokens.items() if re.fullmatch(r"<[^>]*>", name)}
    names = sorted((n for n in tokens if n not in others), key=lambda n: tokens[n])
    if not names:
        raise CheckpointError(f"'{genes.source}' names special tokens only, and no gene")
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
    told = f"args.json of {where}"
    # What no published model has, and other mathematics here.
    for key, value in _BUILT.items():
        allowed(args, key, (value,), told)
    narrow = weights.get("transformer_encoder.layers.0.linear1.weight")
    sizes = {"embsize": width, "nlayers": len(layers)}
    if narrow is not None:
        sizes["d_hid"] = int(narrow.shape[0])
    agree(args, sizes, told)
    domains = {int(m[1]) for n in weights if (m := re.match(r"dsbn\.bns\.(\d+)\.", n))}
    shared = any(name.startswith("bn.") for name in weights)
    first = weights.get("decoder.fc.0.weight")
    model: dict[str, Any] = {
        "width": width,
        "num_layers": len(layers),
        "num_heads": whole(args, "nheads", None, told),
        "ffn_width": sizes.get("d_hid", width),
        "dropout": decimal(args, "dropout", 0.2, told),
        "flag": "flag_encoder.weight" in weights,
        "gepc": "mvc_decoder.W.weight" in weights,
        "expressed": any(name.startswith("decoder.zero_logit.") for name in weights),
        "batch_labels": first is not None and int(first.shape[-1]) == 2 * width,
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
        demand(weights, ["batch_encoder.embedding.weight"], where, axes=2)
        counts.add(int(weights["batch_encoder.embedding.weight"].shape[0]))
    if model["domain_norm"] == "domain":
        counts.add(int(model["num_domains"]))
    if model["adversary"]:
        demand(weights, ["grad_reverse_discriminator.out_layer.weight"], where, axes=2)
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
    raw = read_tensors(file, allow_code=options.allow_code)
    tensors, others = tensors_of(raw)
    weights = _renamed(tensors, where)
    check_kind(weights, _SIGNATURE, where, raw=raw)
    demand(weights, ["encoder.embedding.weight"], where, axes=2)
    if any(name.startswith("pert_encoder.") for name in weights):
        raise CheckpointError(
            f"{where} is a perturbation model (it has a pert_encoder), which is not supported yet"
        )
    args = read_json(settings) if settings.is_file() else {}
    if options.heads and args.get("nheads", options.heads) != options.heads:
        raise ConfigError(
            f"args.json of {where} says that it has {args['nheads']} heads; leave out --heads "
            f"{options.heads}"
        )
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
    # Scripts that tune give <cls> the value 0, pretraining and zero-shot use the padding's.
    tuned = bool(count or batches)
    told = f"args.json of {where}"
    kept = {key: value for key, value in model.items() if key != "num_domains"}
    return Imported(
        model=kept,
        tokenizer={
            "name": "bins",
            "max_tokens": whole(args, "max_seq_len", 1200, told),
            "num_bins": whole(args, "n_bins", 51, told),
            "cls_value": 0.0 if tuned else decimal(args, "pad_value", -2.0, told),
        },
        objective={"name": "generative"},
        vocab=vocab,
        weights=ours,
        rules=rules,
        ignored=ignored | others,
        covariates={_BATCH: [str(i) for i in range(batches)]} if batches else {},
        classes=classes,
        notes=(*((_TUNED,) if tuned else ()), *(() if settings.is_file() else (_ASSUMED,))),
    )


UPSTREAM = Upstream(
    formats="a folder with best_model.pt, args.json and vocab.json",
    signature=_SIGNATURE,
    read=_read,
    rules=_rules,
    gene_files=("vocab.json",),
    takes=("labels", "heads"),
)
