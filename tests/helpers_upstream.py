"""Fabricated published files: the names and shapes of each family, values seeded by name."""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import torch

Tensor = torch.Tensor
Shapes = dict[str, tuple[int, ...]]


def fill(shapes: Shapes, scale: float = 0.3) -> dict[str, Tensor]:
    """Deterministic values for each name; norms around 1."""
    made = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        value = torch.randn(shape, generator=generator) * scale
        is_norm = "norm" in name.lower() and name.endswith("weight")
        made[name] = value + 1.0 if is_norm else value
    return made


def linear(name: str, out: int, inner: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, inner), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# ---------------------------------------------------------------- Geneformer
GF = {"H": 32, "F": 48, "V": 44, "P": 24, "L": 2, "heads": 4}


def geneformer_shapes(kind: str = "mlm", classes: int = 3, rows: int = GF["V"]) -> Shapes:
    h, f, p = GF["H"], GF["F"], GF["P"]
    shapes: Shapes = {
        "bert.embeddings.word_embeddings.weight": (rows, h),
        "bert.embeddings.position_embeddings.weight": (p, h),
        "bert.embeddings.token_type_embeddings.weight": (2, h),
        **norm("bert.embeddings.LayerNorm", h),
    }
    for n in range(GF["L"]):
        layer = f"bert.encoder.layer.{n}"
        for name in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.self.{name}", h, h)
        shapes |= linear(f"{layer}.attention.output.dense", h, h)
        shapes |= norm(f"{layer}.attention.output.LayerNorm", h)
        shapes |= linear(f"{layer}.intermediate.dense", f, h)
        shapes |= linear(f"{layer}.output.dense", h, f)
        shapes |= norm(f"{layer}.output.LayerNorm", h)
    if kind == "mlm":
        shapes["cls.predictions.bias"] = (rows,)
        shapes |= linear("cls.predictions.transform.dense", h, h)
        shapes |= norm("cls.predictions.transform.LayerNorm", h)
    if kind == "sequence":
        shapes |= linear("bert.pooler.dense", h, h)
    if kind in ("sequence", "token"):
        shapes |= linear("classifier", classes, h)
    return shapes


def geneformer_folder(folder: Path, *, second: bool, kind: str = "mlm") -> dict[str, Tensor]:
    """A folder as published; returns the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    specials = ["<pad>", "<mask>", *(["<cls>", "<eos>"] if second else [])]
    tokens = {name: i for i, name in enumerate(specials)}
    genes = [f"ENSG{i:011d}" for i in range(40)]
    tokens |= {gene: len(specials) + i for i, gene in enumerate(genes)}
    weights = fill(geneformer_shapes(kind, rows=len(tokens)))
    save_file(weights, folder / "model.safetensors")
    config = {
        "hidden_size": GF["H"], "num_hidden_layers": GF["L"], "num_attention_heads": GF["heads"],
        "intermediate_size": GF["F"], "max_position_embeddings": GF["P"], "hidden_act": "relu",
        "hidden_dropout_prob": 0.02, "attention_probs_dropout_prob": 0.02,
        "layer_norm_eps": 1e-12, "vocab_size": len(tokens),
        "id2label": {"0": "nf", "1": "hcm", "2": "dcm"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generation = "gc104M" if second else "gc30M"
    medians = {gene: np.float64(0.5 + 0.1 * i) for i, gene in enumerate(genes)}
    with (folder / f"token_dictionary_{generation}.pkl").open("wb") as file:
        pickle.dump(tokens, file)
    with (folder / f"gene_median_dictionary_{generation}.pkl").open("wb") as file:
        pickle.dump(medians, file)
    return weights


# ---------------------------------------------------------------- scGPT
SG = {"D": 32, "F": 40, "L": 2, "heads": 4, "genes": 30}


def scgpt_shapes(
    *, flash: bool = True, batches: int = 0, classes: int = 0, flag: bool = True
) -> Shapes:
    d, f = SG["D"], SG["F"]
    wide = 2 * d if batches else d
    shapes: Shapes = {
        "encoder.embedding.weight": (SG["genes"] + 3, d),
        **norm("encoder.enc_norm", d),
        **linear("value_encoder.linear1", d, 1),
        **linear("value_encoder.linear2", d, d),
        **norm("value_encoder.norm", d),
    }
    if flag:
        shapes["flag_encoder.weight"] = (2, d)
    joint = ("Wqkv.weight", "Wqkv.bias") if flash else ("in_proj_weight", "in_proj_bias")
    for n in range(SG["L"]):
        layer = f"transformer_encoder.layers.{n}"
        shapes[f"{layer}.self_attn.{joint[0]}"] = (3 * d, d)
        shapes[f"{layer}.self_attn.{joint[1]}"] = (3 * d,)
        shapes |= linear(f"{layer}.self_attn.out_proj", d, d)
        shapes |= {**linear(f"{layer}.linear1", f, d), **linear(f"{layer}.linear2", d, f)}
        shapes |= {**norm(f"{layer}.norm1", d), **norm(f"{layer}.norm2", d)}
    heads = ["fc", *(["zero_logit"] if batches else [])]
    for head in heads:
        shapes |= linear(f"decoder.{head}.0", d, wide)
        shapes |= {**linear(f"decoder.{head}.2", d, d), **linear(f"decoder.{head}.4", 1, d)}
    shapes |= linear("mvc_decoder.gene2query", d, d)
    shapes["mvc_decoder.W.weight"] = (wide, d)
    if batches:
        shapes |= linear("mvc_decoder.W_zero_logit", wide, d)
        shapes["batch_encoder.embedding.weight"] = (batches, d)
        shapes |= norm("batch_encoder.enc_norm", d)
        shapes |= mlp("grad_reverse_discriminator", d, batches)
        for n in range(batches):
            for part, shape in (("running_mean", (d,)), ("running_var", (d,))):
                shapes[f"dsbn.bns.{n}.{part}"] = shape
            shapes[f"dsbn.bns.{n}.num_batches_tracked"] = ()
    if classes:
        shapes |= mlp("cls_decoder", d, classes)
    return shapes


def mlp(name: str, width: int, out: int) -> Shapes:
    return {
        **linear(f"{name}._decoder.0", width, width),
        **norm(f"{name}._decoder.2", width),
        **linear(f"{name}._decoder.3", width, width),
        **norm(f"{name}._decoder.5", width),
        **linear(f"{name}.out_layer", out, width),
    }


def scgpt_weights(**kind: int | bool) -> dict[str, Tensor]:
    weights = fill(scgpt_shapes(**kind))  # type: ignore[arg-type]
    for name in weights:
        if name.endswith("running_var"):
            weights[name] = weights[name].abs() + 0.5
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
    return weights


def scgpt_folder(folder: Path, weights: dict[str, Tensor], *, specials: bool = True) -> None:
    folder.mkdir(parents=True)
    torch.save(weights, folder / "best_model.pt")
    args = {"nheads": SG["heads"], "embsize": SG["D"], "nlayers": SG["L"], "d_hid": SG["F"],
            "dropout": 0.2, "n_bins": 51, "max_seq_len": 1200, "pad_value": -2,
            "input_emb_style": "continuous", "mask_value": -1}  # fmt: skip
    (folder / "args.json").write_text(json.dumps(args))
    vocab = {f"GENE{i}": i for i in range(SG["genes"])}
    if specials:
        vocab |= {name: SG["genes"] + i for i, name in enumerate(("<pad>", "<cls>", "<eoc>"))}
    (folder / "vocab.json").write_text(json.dumps(vocab))


# ---------------------------------------------------------------- scBERT and scFoundation
SB = {"D": 20, "heads": 2, "K": 16, "L": 3, "genes": 25, "F": 36}


def performer_shapes(
    prefix: str, *, width: int, heads: int, head_width: int, layers: int, ffn: int, bias: bool
) -> Shapes:
    inner, features = heads * head_width, int(head_width * np.log(head_width))
    shapes: Shapes = {}
    for n in range(layers):
        layer = f"{prefix}.net.layers.{n}"
        shapes |= norm(f"{layer}.0.norm", width)
        shapes[f"{layer}.0.fn.fast_attention.projection_matrix"] = (features, head_width)
        for name in "qkv":
            shapes |= linear(f"{layer}.0.fn.to_{name}", inner, width, bias)
        shapes |= linear(f"{layer}.0.fn.to_out", width, inner)
        shapes |= norm(f"{layer}.1.norm", width)
        shapes |= linear(f"{layer}.1.fn.fn.w1", ffn, width)
        shapes |= linear(f"{layer}.1.fn.fn.w2", width, ffn)
    return shapes


def scbert_weights(classes: int = 0) -> dict[str, Tensor]:
    d, places = SB["D"], SB["genes"] + 1
    shapes: Shapes = {
        "token_emb.weight": (7, d),
        "pos_emb.emb.weight": (places, d),
        **performer_shapes(
            "performer", width=d, heads=SB["heads"], head_width=SB["K"], layers=SB["L"],
            ffn=SB["F"], bias=False,
        ),
        **norm("norm", d),
    }  # fmt: skip
    if classes:
        shapes["to_out.conv1.weight"], shapes["to_out.conv1.bias"] = (1, 1, 1, d), (1,)
        shapes |= linear("to_out.fc1", 512, places)
        shapes |= {**linear("to_out.fc2", 128, 512), **linear("to_out.fc3", classes, 128)}
    else:
        shapes |= linear("to_out", 7, d)
    weights = fill(shapes)
    for name in weights:
        if name.endswith("projection_matrix"):
            weights[name] *= 4
    weights["performer.calls_since_last_redraw"] = torch.tensor(41)
    weights["pos_emb.emb.weight"] = weights["pos_emb.emb.weight"].double()
    return weights


def scbert_file(path: Path, weights: dict[str, Tensor], *, prefix: str = "") -> Path:
    """``panglao_pretrain.pth`` and, beside it, ``genes.txt``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"{prefix}{name}": value for name, value in weights.items()}
    raw = {
        "epoch": 5,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "scheduler_state_dict": {"cycle": 1},
        "losses": 0.5,
    }
    torch.save(raw, path)
    names = "\n".join(f"GENE{i}" for i in range(SB["genes"]))
    (path.parent / "genes.txt").write_text(names + "\n")
    return path


SF = {"D": 24, "heads": 2, "L": 2, "F": 40, "E": 16, "M": 2, "K": 16, "EF": 28, "genes": 25, "V": 9}


def scfoundation_weights() -> dict[str, Tensor]:
    d, e = SF["D"], SF["E"]
    shapes: Shapes = {
        **linear("token_emb.mlp", SF["V"], 1),
        **linear("token_emb.mlp2", SF["V"], SF["V"]),
        "token_emb.emb.weight": (SF["V"], d),
        "token_emb.emb_mask.weight": (1, d),
        "token_emb.emb_pad.weight": (1, d),
        "pos_emb.weight": (SF["genes"] + 3, d),
    }
    for n in range(SF["L"]):
        layer = f"encoder.transformer_encoder.{n}"
        shapes[f"{layer}.self_attn.in_proj_weight"] = (3 * d, d)
        shapes[f"{layer}.self_attn.in_proj_bias"] = (3 * d,)
        shapes |= linear(f"{layer}.self_attn.out_proj", d, d)
        shapes |= {
            **linear(f"{layer}.linear1", SF["F"], d),
            **linear(f"{layer}.linear2", d, SF["F"]),
        }
        shapes |= {**norm(f"{layer}.norm1", d), **norm(f"{layer}.norm2", d)}
    shapes |= norm("encoder.norm", d)
    shapes |= performer_shapes(
        "decoder.performer", width=e, heads=1, head_width=SF["K"], layers=SF["M"], ffn=SF["EF"],
        bias=True,
    )  # fmt: skip
    shapes |= {**norm("decoder.norm", e), **linear("decoder_embed", e, d)}
    shapes |= {**norm("norm", e), **linear("to_final", 1, e)}
    weights = fill(shapes)
    for name in weights:
        if name.endswith("projection_matrix"):
            weights[name] *= 4
    weights["decoder.performer.calls_since_last_redraw"] = torch.tensor(12)
    return weights


def scfoundation_file(path: Path, weights: dict[str, Tensor]) -> Path:
    """``models.ckpt`` with three entries, and the gene table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        "model": "mae_autobin",
        "model_config": {
            "mae_autobin": {
                "encoder": {"depth": SF["L"], "heads": SF["heads"], "hidden_dim": SF["D"]},
                "decoder": {"depth": SF["M"], "heads": 1, "dim_head": SF["K"]},
                "bin_num": SF["V"], "bin_alpha": 1.0,
            }
        },
        "dataset_config": {"rnaseq": {"mask_token_id": 102, "pad_token_id": 103}},
    }  # fmt: skip
    entries = {}
    for number, entry in enumerate(("gene", "cell", "rde")):
        state = {}
        for name, value in weights.items():
            moved = value + number if name == "to_final.bias" else value
            state[f"model.{name}"] = moved
        entries[entry] = {"config": config, "state_dict": state}
    torch.save(entries, path)
    rows = [f"GENE{i}\t{i}" for i in range(SF["genes"])]
    table = path.parent / "OS_scRNA_gene_index.19264.tsv"
    table.write_text("\n".join(["gene_name\tindex", *rows]) + "\n")
    return path


# ---------------------------------------------------------------- TOSICA
TO = {"W": 8, "P": 6, "genes": 30, "L": 2, "C": 3}


def tosica_weights() -> dict[str, Tensor]:
    w, p, g = TO["W"], TO["P"], TO["genes"]
    shapes: Shapes = {"cls_token": (1, 1, w)}
    shapes |= linear("feature_embed.fe", p * w, g)
    for n in range(TO["L"]):
        block = f"blocks.{n}"
        shapes |= {**norm(f"{block}.norm1", w), **linear(f"{block}.attn.qkv", 3 * w, w)}
        shapes |= {**linear(f"{block}.attn.proj", w, w), **norm(f"{block}.norm2", w)}
        shapes |= {**linear(f"{block}.mlp.fc1", 4 * w, w), **linear(f"{block}.mlp.fc2", w, 4 * w)}
    shapes |= {**norm("norm", w), **linear("head", TO["C"], w)}
    weights = fill(shapes)
    mask = (torch.rand(p, g, generator=torch.Generator().manual_seed(3)) < 0.3).float()
    mask[-1] = 1.0
    dense = mask.repeat_interleave(w, dim=0)
    weights["feature_embed.fe.mask"] = dense
    weights["feature_embed.fe.weight"] *= dense
    return weights


def tosica_folder(folder: Path, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    torch.save(weights, folder / "model-0.pth")
    torch.save(weights, folder / "model-10.pth")
    names = [f"SET{i}" for i in range(TO["P"] - 1)] + ["node 0"]
    rows = [f"{i},{name}" for i, name in enumerate(names)]
    (folder / "pathway.csv").write_text("\n".join([",0", *rows]) + "\n")
    labels = [f"{i},{name}" for i, name in enumerate(("alpha", "beta", "delta"))]
    (folder / "label_dictionary.csv").write_text("\n".join([",Celltype", *labels]) + "\n")
    (folder / "genes.txt").write_text("\n".join(f"GENE{i}" for i in range(TO["genes"])) + "\n")
