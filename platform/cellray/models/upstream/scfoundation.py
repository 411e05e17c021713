"""Published scFoundation files: ``models.ckpt`` with the entries ``gene``, ``cell`` and ``rde``.

Each entry is a configuration and a state dict whose names carry ``model.``. The weights belong to
the 19,264 symbols of ``OS_scRNA_gene_index.19264.tsv``, in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.core.errors import CheckpointError, ConfigError, did_you_mean
from cellray.data.vocab import Vocab
from cellray.models.upstream._reading import find_file, read_tensors
from cellray.models.upstream._settings import agree, decimal, whole
from cellray.models.upstream.base import (
    Imported,
    Options,
    Rule,
    Upstream,
    check_kind,
    convert,
    demand,
    needed,
    renamed,
    same,
    strip_prefix,
    tensors_of,
)
from cellray.models.upstream.scbert import performer_rules

__all__ = ["UPSTREAM"]

Tensor = torch.Tensor
_SIGNATURE = r"(^|\.)token_emb\.emb_mask\.weight$"
_DEFAULT = "cell"


def _rules(model: Mapping[str, Any], num_classes: int, vocab: Vocab, classes_of: str) -> list[Rule]:
    rules = [
        *same("values.lift", "token_emb.mlp"),
        *same("values.mix", "token_emb.mlp2"),
        *same("values.table", "token_emb.emb", ["weight"]),
        Rule(("values.mask",), ("token_emb.emb_mask.weight",), _flat, _row),
        Rule(("values.pad",), ("token_emb.emb_pad.weight",), _flat, _row),
        *same("positions", "pos_emb", ["weight"]),
    ]
    for number in range(int(model["num_layers"])):
        ours, theirs = f"encoder.blocks.{number}", f"encoder.transformer_encoder.{number}"
        rules += [
            Rule((f"{ours}.attention.qkv.weight",), (f"{theirs}.self_attn.in_proj_weight",)),
            Rule((f"{ours}.attention.qkv.bias",), (f"{theirs}.self_attn.in_proj_bias",)),
            *same(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj"),
            *same(f"{ours}.expand", f"{theirs}.linear1"),
            *same(f"{ours}.contract", f"{theirs}.linear2"),
            *same(f"{ours}.attention_norm", f"{theirs}.norm1"),
            *same(f"{ours}.ffn_norm", f"{theirs}.norm2"),
        ]
    return [
        *rules,
        *same("encoder_norm", "encoder.norm"),
        *same("bridge", "decoder_embed"),
        *performer_rules(
            "decoder", "decoder.performer", num_layers=int(model["decoder_layers"]), bias=True
        ),
        *same("decoder_norm", "decoder.norm"),
        *same("output_norm", "norm"),
        *same("to_value", "to_final"),
    ]


def _flat(tensors: Any) -> tuple[Tensor, ...]:
    return (tensors[0].reshape(-1),)


def _row(tensors: Any) -> tuple[Tensor, ...]:
    return (tensors[0].reshape(1, -1),)


def _entry(
    raw: Mapping[str, Any], wanted: str, where: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Configuration and weights of one entry, or of a file that is an entry itself.

    Returns:
        The configuration, the weights, and what else the file holds: name -> why it is left out.
    """
    entries = [k for k, v in raw.items() if isinstance(v, Mapping) and "state_dict" in v]
    if not entries or "state_dict" in raw:
        if wanted:
            raise ConfigError(f"{where} is one model without entries; leave out --entry {wanted}")
        if "state_dict" not in raw:
            return {}, dict(raw), {}
        config, state = raw.get("config") or raw.get("hyper_parameters"), raw["state_dict"]
        kept = ("config", "hyper_parameters", "state_dict")
        others = {str(name): "not of the model" for name in raw if name not in kept}
    else:
        chosen = wanted or _DEFAULT
        if chosen not in entries:
            raise ConfigError(
                f"{where} has no entry '{chosen}'.{did_you_mean(chosen, entries)} It has: "
                f"{', '.join(sorted(entries))}; choose with --entry"
            )
        config, state = raw[chosen].get("config"), raw[chosen]["state_dict"]
        others = {
            str(name): "another entry" if name in entries else "not of the model"
            for name in raw
            if name != chosen
        }
    if not isinstance(state, Mapping) or not isinstance(config, Mapping | None):
        raise CheckpointError(
            f"{where}: 'state_dict' is a {type(state).__name__} and its configuration a "
            f"{type(config).__name__}; both must be tables"
        )
    return dict(config or {}), dict(state), others


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """The two levels of a configuration as one."""
    name = str(config.get("model") or "mae_autobin")
    inner = config.get("model_config") or {}
    sizes = inner.get(name, inner) if isinstance(inner, Mapping) else {}
    merged = {**config, **(sizes if isinstance(sizes, Mapping) else {})}
    for part in ("encoder", "decoder"):
        table = merged.get(part)
        merged[part] = table if isinstance(table, Mapping) else {}
    return merged


def _heads(config: Mapping[str, Any], given: int, where: str) -> tuple[int, float]:
    """Heads of the encoder, which the weights do not tell, and alpha of the value embedding."""
    merged = _flattened(config)
    if not given and "heads" not in merged["encoder"]:
        raise CheckpointError(
            f"{where}: its configuration does not say how many heads the encoder has "
            "(model_config.mae_autobin.encoder.heads); give the whole models.ckpt, or --heads 12"
        )
    told = whole(merged["encoder"], "heads", given or None, f"the encoder of {where}")
    if given and told != given:
        raise ConfigError(f"{where} says that it has {told} heads; leave out --heads {given}")
    return told, decimal(merged, "bin_alpha", 1.0, where)


def _prefixed(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Names after their first ``model.``, as the source's loader takes them."""
    if weights and all("model." in name for name in weights):
        return renamed(weights, lambda name: name.partition("model.")[2], where)
    return strip_prefix(weights, "model.")


def _read(path: Path, options: Options) -> Imported:
    where = f"'{path}'"
    file = find_file(path, ["models.ckpt", "*.ckpt", "*.pt"]) if path.is_dir() else path
    if file is None:
        raise CheckpointError(f"{where} has no models.ckpt")
    raw = read_tensors(file, allow_code=options.allow_code)
    config, state, beside = _entry(raw, options.entry, where)
    tensors, others = tensors_of(state)
    weights = _prefixed(tensors, where)
    check_kind(weights, _SIGNATURE, where, raw=raw)
    genes = needed(options, "OS_scRNA_gene_index.19264.tsv")
    demand(weights, ["pos_emb.weight"], where, axes=2)
    table = weights["pos_emb.weight"]
    if len(genes.names) + 3 != len(table):
        raise CheckpointError(
            f"'{genes.source}' lists {len(genes.names)} genes, the weights of {where} are of "
            f"{len(table) - 3}: it is another gene list"
        )
    model = _sizes(weights, _heads(config, options.heads, where), where)
    parts = _flattened(config)
    for part, width, depth in (
        ("encoder", "width", "num_layers"),
        ("decoder", "decoder_width", "decoder_layers"),
    ):
        sizes = {"hidden_dim": model[width], "depth": model[depth]}
        agree(parts[part], sizes, f"the {part} in the configuration of {where}")
    count = len(genes.names)
    vocab = Vocab(
        gene_ids=genes.names,
        symbols=tuple(genes.symbols or genes.names),
        gene_tokens=np.arange(count, dtype=np.int32),
        specials={"<T>": count, "<S>": count + 1, "<pad>": count + 2},
    )
    rules = _rules(model, 0, vocab, "cell")
    ours, ignored = convert(weights, rules, ignore={}, where=where)
    return Imported(
        model=model,
        tokenizer={"name": "depth", "max_tokens": 15_000},
        objective={"name": "depth"},
        vocab=vocab,
        weights=ours,
        rules=rules,
        ignored=ignored | others | beside,
        notes=("the published weights have a licence of their own: research, non-commercial",),
    )


def _sizes(weights: Mapping[str, Tensor], told: tuple[int, float], where: str) -> dict[str, Any]:
    names = {
        "table": "token_emb.emb.weight",
        "inner": "encoder.transformer_encoder.0.linear1.weight",
        "bridge": "decoder_embed.weight",
        "features": "decoder.performer.net.layers.0.0.fn.fast_attention.projection_matrix",
        "queries": "decoder.performer.net.layers.0.0.fn.to_q.weight",
        "decoder_inner": "decoder.performer.net.layers.0.1.fn.fn.w1.weight",
    }
    demand(weights, list(names.values()), where, axes=2)
    found = {key: tuple(weights[name].shape) for key, name in names.items()}
    heads, alpha = told

    def layers(pattern: str) -> int:
        return len({int(m[1]) for name in weights if (m := re.match(pattern, name))})

    return {
        "width": found["table"][1],
        "num_layers": layers(r"encoder\.transformer_encoder\.(\d+)\."),
        "num_heads": heads,
        "ffn_width": found["inner"][0],
        "decoder_width": found["bridge"][0],
        "decoder_layers": layers(r"decoder\.performer\.net\.layers\.(\d+)\."),
        "decoder_heads": found["queries"][0] // found["features"][1],
        "decoder_head_width": found["features"][1],
        "decoder_ffn_width": found["decoder_inner"][0],
        "value_bins": found["table"][0],
        "bin_alpha": alpha,
    }


UPSTREAM = Upstream(
    formats="models.ckpt (--entry gene, cell or rde), with OS_scRNA_gene_index.19264.tsv beside it "
    "or given with --genes",
    signature=_SIGNATURE,
    read=_read,
    rules=_rules,
    gene_files=("OS_scRNA_gene_index*.tsv", "genes.txt"),
    takes=("entry", "heads"),
)
