"""Published Geneformer folders: ``config.json`` with the weights, safetensors or a torch pickle.

Names and shapes are those of Hugging Face's BERT: masked language model, sequence classifier or
token classifier. The first generation (gc30M, no special tokens) and the later ones (gc95M,
gc104M, with ``<cls>`` and ``<eos>``) have different dictionaries, which must not be mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cellray.core.errors import CheckpointError
from cellray.data.vocab import Vocab
from cellray.models.upstream._reading import find_file, read_json, read_tensors
from cellray.models.upstream._settings import allowed, decimal, whole
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
    same,
    stacked,
    strip_prefix,
    tensors_of,
)

__all__ = ["UPSTREAM"]

Tensor = torch.Tensor
_SIGNATURE = r"(^|\.)embeddings\.word_embeddings\.weight$"
_NORM = ("weight", "bias")
_IGNORED = {
    r"bert\.embeddings\.position_ids": "a counter, 0 .. P - 1",
    r"bert\.pooler\.dense\.(weight|bias)": "nothing that was trained reads this pooler",
}


def _rules(model: Mapping[str, Any], num_classes: int, vocab: Vocab, classes_of: str) -> list[Rule]:
    prefix = "backbone." if num_classes else ""
    embeddings = f"{prefix}embedding"
    rules = [
        *same(f"{embeddings}.token", "bert.embeddings.word_embeddings", ["weight"]),
        *same(f"{embeddings}.position", "bert.embeddings.position_embeddings", ["weight"]),
        *same(f"{embeddings}.token_type", "bert.embeddings.token_type_embeddings", ["weight"]),
        *same(f"{embeddings}.norm", "bert.embeddings.LayerNorm", _NORM),
    ]
    for number in range(int(model["num_layers"])):
        ours, theirs = f"{prefix}encoder.blocks.{number}", f"bert.encoder.layer.{number}"
        heads = [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")]
        rules += [
            *stacked(f"{ours}.attention.qkv", heads),
            *same(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
            *same(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm"),
            *same(f"{ours}.expand", f"{theirs}.intermediate.dense"),
            *same(f"{ours}.contract", f"{theirs}.output.dense"),
            *same(f"{ours}.ffn_norm", f"{theirs}.output.LayerNorm"),
        ]
    if model.get("masked_head", True):
        rules += [
            *same(f"{prefix}decoder", "cls.predictions", ["bias"]),
            *same(f"{prefix}decoder.dense", "cls.predictions.transform.dense"),
            *same(f"{prefix}decoder.norm", "cls.predictions.transform.LayerNorm"),
            _tied(f"{embeddings}.token.weight", "cls.predictions.decoder.weight"),
            _tied(f"{prefix}decoder.bias", "cls.predictions.decoder.bias"),
        ]
    if num_classes:
        if classes_of == "cell":
            rules += same("head.pooler", "bert.pooler.dense")
        rules += same("head.classifier", "classifier")
    return rules


def _tied(ours: str, theirs: str) -> Rule:
    """A second name for a tensor; files of the safetensors kind leave it out."""
    return Rule((ours,), (theirs,), optional=True)


def _check_tied(weights: Mapping[str, Tensor], where: str) -> None:
    pairs = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    for name, other in pairs.items():
        if name in weights and other in weights and not torch.equal(weights[name], weights[other]):
            raise CheckpointError(
                f"{where}: {name} differs from {other}, to which it is tied in every published "
                "model; this file was changed"
            )


def _vocab(genes: GeneList, options: Options, *, rows: int, where: str) -> Vocab:
    """The gene space of a token dictionary, which must be of the weights' generation."""
    tokens = genes.tokens
    if tokens is None:
        raise CheckpointError(
            f"'{genes.source}' names genes without token ids; give the token dictionary "
            "(token_dictionary_*.pkl, or a table with token_id and token)"
        )
    if len(tokens) != rows:
        raise CheckpointError(
            f"'{genes.source}' has {len(tokens)} tokens, the weights of {where} have {rows}: it is "
            "the dictionary of another generation. 25,426 tokens (gc30M) belong to V1, 20,275 "
            "(gc95M and gc104M, which are not the same) to the models of 4,096 positions"
        )
    specials = {name: tokens[name] for name in tokens if name.startswith("<")}
    for name in ("<pad>", "<mask>"):
        if name not in specials:
            raise CheckpointError(
                f"'{genes.source}' has no special token '{name}'; it has {sorted(specials)}"
            )
    if ("<cls>" in specials) != ("<eos>" in specials):
        raise CheckpointError(
            f"'{genes.source}' has one of '<cls>' and '<eos>' only; the dictionaries of V2 have "
            f"both, those of V1 none. It has {sorted(specials)}"
        )
    names = sorted((n for n in tokens if n not in specials), key=lambda n: tokens[n])
    ids = [tokens[name] for name in names]
    if sorted([*ids, *specials.values()]) != list(range(rows)):
        raise CheckpointError(f"'{genes.source}': token ids are not 0 .. {rows - 1}, each once")
    medians = options.medians or genes.medians
    if not medians:
        raise CheckpointError(
            "ranks need the corpus medians: put gene_median_dictionary_*.pkl beside the weights, "
            "or give it with --medians"
        )
    without = [name for name in names if name not in medians]
    if without:
        raise CheckpointError(
            f"the medians lack {len(without)} of the {len(names)} genes of '{genes.source}', e.g. "
            f"{', '.join(without[:3])}: they are of another generation"
        )
    bad = [name for name in names if not 0 < medians[name] < math.inf]
    if bad:
        raise CheckpointError(
            f"{len(bad)} medians are not above 0, e.g. {bad[0]} with {medians[bad[0]]}: non-zero "
            "medians divide the counts"
        )
    symbols = dict(zip(genes.names, genes.symbols, strict=True)) if genes.symbols else {}
    return Vocab(
        gene_ids=tuple(names),
        symbols=tuple(symbols.get(name, "") for name in names),
        gene_tokens=np.array(ids, dtype=np.int32),
        specials=specials,
        medians=np.array([medians[name] for name in names], dtype=np.float32),
    )


def _config(raw: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    keys = {
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_width": "intermediate_size",
        "max_positions": "max_position_embeddings",
    }
    where = f"config.json of {where}"
    lacking = [name for name in keys.values() if name not in raw]
    if lacking:
        raise CheckpointError(f"{where} has no {', '.join(lacking)}")
    allowed(raw, "model_type", ("bert",), where)
    allowed(raw, "position_embedding_type", ("absolute",), where)
    allowed(raw, "hidden_act", ("relu", "gelu"), where)
    allowed(raw, "is_decoder", (False,), where)
    if "classifier.weight" in weights:
        allowed(raw, "problem_type", (None, "single_label_classification"), where)
    model: dict[str, Any] = {ours: whole(raw, theirs, None, where) for ours, theirs in keys.items()}
    model["dropout"] = decimal(raw, "hidden_dropout_prob", 0.0, where)
    model["attention_dropout"] = decimal(
        raw, "attention_probs_dropout_prob", model["dropout"], where
    )
    model["activation"] = str(raw.get("hidden_act", "relu"))
    model["layer_norm_eps"] = decimal(raw, "layer_norm_eps", 1e-12, where)
    model["masked_head"] = "cls.predictions.bias" in weights
    return model


def _labels(
    raw: Mapping[str, Any], options: Options, count: int, where: str
) -> tuple[Sequence[str], list[str]]:
    """Names that were given, or those of config.json where they are of this many classes.

    Returns:
        The names, and what a user should know.
    """
    table = raw.get("id2label")
    if options.labels or not isinstance(table, dict):
        return options.labels, []
    if len(table) != count:
        told = f"config.json names {len(table)} classes, the classifier has {count}: left out"
        return (), [told]
    if set(table) != {str(number) for number in range(count)}:
        raise CheckpointError(
            f"config.json of {where}: id2label numbers its classes {', '.join(sorted(table)[:8])}; "
            f"they are 0 .. {count - 1}, each once"
        )
    return [str(table[str(number)]) for number in range(count)], []


def _classes_of(raw: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """What a classifier judges: as config.json says, else by whether it has a pooler."""
    names = raw.get("architectures")
    told = names if isinstance(names, list) else []
    if "BertForTokenClassification" in told:
        return "gene"
    if "BertForSequenceClassification" in told:
        return "cell"
    return "cell" if "bert.pooler.dense.weight" in weights else "gene"


def _weights(path: Path, options: Options, where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file or folder under the names of ``BertFor...``, and what else it holds."""
    file = path
    if path.is_dir():
        found = find_file(path, ["model.safetensors", "pytorch_model.bin"])
        if found is None:
            raise CheckpointError(f"{where} has no model.safetensors and no pytorch_model.bin")
        file = found
    held = read_tensors(file, allow_code=options.allow_code)
    tensors, others = tensors_of(held)
    weights = strip_prefix(tensors, "module.")
    check_kind(weights, _SIGNATURE, where, raw=held)
    if not any(name.startswith("bert.") for name in weights):
        weights = {f"bert.{name}": value for name, value in weights.items()}
    demand(weights, ["bert.embeddings.word_embeddings.weight"], where, axes=2)
    _check_tied(weights, where)
    return weights, others


def _read(path: Path, options: Options) -> Imported:
    folder = path if path.is_dir() else path.parent
    where = f"'{path}'"
    weights, others = _weights(path, options, where)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{where} has no config.json, which says how many heads there are")
    raw = read_json(folder / "config.json")
    model = _config(raw, weights, where)
    rows = int(weights["bert.embeddings.word_embeddings.weight"].shape[0])
    vocab = _vocab(needed(options, "the token dictionary"), options, rows=rows, where=where)
    allowed(raw, "pad_token_id", (vocab.pad,), f"config.json of {where}")
    second = "<cls>" in vocab.specials
    classes: tuple[str, ...] = ()
    classes_of = "cell"
    notes: list[str] = []
    if "classifier.weight" in weights:
        count = int(weights["classifier.weight"].shape[0])
        labels, notes = _labels(raw, options, count, where)
        classes = class_names(labels, count, where)
        classes_of = _classes_of(raw, weights)
    # A sequence classifier reads the first token, with or without <cls>.
    first = second or (bool(classes) and classes_of == "cell")
    model["cell_embedding"] = "cls" if first else "mean"
    rules = _rules(model, len(classes), vocab, classes_of)
    ours, ignored = convert(weights, rules, ignore=_IGNORED, where=where)
    limit = int(model["max_positions"])
    return Imported(
        model=model,
        tokenizer={"name": "rank", "max_tokens": limit, "specials": second},
        objective={"name": "masked"},
        vocab=vocab,
        weights=ours,
        rules=rules,
        ignored=ignored | others,
        classes=classes,
        classes_of=classes_of,
        notes=tuple(notes),
    )


UPSTREAM = Upstream(
    formats="a folder with config.json, model.safetensors (or pytorch_model.bin) and the "
    "dictionaries token_dictionary_*.pkl and gene_median_dictionary_*.pkl (or --genes, --medians)",
    signature=_SIGNATURE,
    read=_read,
    rules=_rules,
    gene_files=("token_dictionary*.pkl", "token_dictionary*.json"),
    median_files=("gene_median_dictionary*.pkl", "gene_median_dictionary*.json"),
    symbol_files=("gene_name_id_dict*.pkl", "gene_name_id_dict*.json"),
    takes=("medians", "labels"),
)
