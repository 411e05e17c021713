"""The families written out from their formulae over published state dicts: slow, plain, dense.

What tests compare with, and what the benchmark times as the plain PyTorch implementation. Nothing
here is shared with the package.

Legend: B cells, T tokens, S places, G genes, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn import functional as fn

Tensor = torch.Tensor
W = Mapping[str, Tensor]


def lin(w: W, name: str, x: Tensor) -> Tensor:
    return fn.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w: W, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return fn.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def split(x: Tensor, heads: int) -> Tensor:
    b, t, _ = x.shape
    return x.view(b, t, heads, -1).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return torch.softmax(logits, -1) @ v


def favor(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, key_max: str) -> Tensor:
    scale = q.shape[-1] ** -0.25

    def features(x: Tensor, query: bool) -> Tensor:
        dots = (x * scale) @ rows.T
        half = (x * scale).square().sum(-1, keepdim=True) / 2
        if query:
            top = dots.max(-1, keepdim=True).values
        else:
            top = dots.amax((1, 2, 3), keepdim=True) if key_max == "cell" else dots.max()
        return (torch.exp(dots - half - top) + 1e-4) / math.sqrt(rows.shape[0])

    fq, fk = features(q, True), features(k, False)
    sums = fq @ fk.sum(2)[..., None]
    return fq @ (fk.transpose(-1, -2) @ v) / sums


def performer(w: W, prefix: str, x: Tensor, *, layers: int, heads: int, key_max: str) -> Tensor:
    for n in range(layers):
        attn, ffn = f"{prefix}.net.layers.{n}.0", f"{prefix}.net.layers.{n}.1"
        inner = norm(w, f"{attn}.norm", x)
        q, k, v = (split(lin(w, f"{attn}.fn.to_{c}", inner), heads) for c in "qkv")
        rows = w[f"{attn}.fn.fast_attention.projection_matrix"]
        mixed = favor(q, k, v, rows, key_max).transpose(1, 2).flatten(2)
        x = x + lin(w, f"{attn}.fn.to_out", mixed)
        inner = fn.gelu(lin(w, f"{ffn}.fn.fn.w1", norm(w, f"{ffn}.norm", x)))
        x = x + lin(w, f"{ffn}.fn.fn.w2", inner)
    return x


def scbert_hidden(w: W, tokens: Tensor, *, layers: int, heads: int, key_max: str) -> Tensor:
    """(B, S) bins with a 0 at the end -> (B, S, D)."""
    x = w["token_emb.weight"][tokens] + w["pos_emb.emb.weight"].float()
    x = performer(w, "performer", x, layers=layers, heads=heads, key_max=key_max)
    return norm(w, "norm", x)


def scbert_classes(w: W, hidden: Tensor) -> Tensor:
    kernel = w["to_out.conv1.weight"]
    x = fn.relu(fn.conv2d(hidden[:, None], kernel, w["to_out.conv1.bias"])).flatten(1)
    x = fn.relu(lin(w, "to_out.fc1", x))
    return lin(w, "to_out.fc3", fn.relu(lin(w, "to_out.fc2", x)))


def torch_encoder_layer(w: W, name: str, x: Tensor, heads: int, keys: Tensor | None) -> Tensor:
    """A post-norm layer under torch's names; ``keys`` (B, T) True at real tokens."""
    joint = fn.linear(x, w[f"{name}.self_attn.in_proj_weight"], w[f"{name}.self_attn.in_proj_bias"])
    q, k, v = (split(part, heads) for part in joint.chunk(3, -1))
    mask = None if keys is None else keys[:, None, None, :]
    mixed = softmax_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    x = norm(w, f"{name}.norm1", x + lin(w, f"{name}.self_attn.out_proj", mixed))
    inner = fn.relu(lin(w, f"{name}.linear1", x))
    return norm(w, f"{name}.norm2", x + lin(w, f"{name}.linear2", inner))


def soft_bins(w: W, values: Tensor) -> Tensor:
    lifted = fn.leaky_relu(lin(w, "token_emb.mlp", values[..., None]), 0.1)
    weights = torch.softmax(lin(w, "token_emb.mlp2", lifted) + lifted, -1)
    return weights @ w["token_emb.emb.weight"]


def scfoundation_encoder(w: W, row: Tensor, *, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """One cell: (S,) values with T and S at the end; places that are read, and their states."""
    where = torch.nonzero(row > 0).squeeze(-1)
    x = (soft_bins(w, row[where]) + w["pos_emb.weight"][where])[None]
    for n in range(layers):
        x = torch_encoder_layer(w, f"encoder.transformer_encoder.{n}", x, heads, None)
    return where, norm(w, "encoder.norm", x)[0]


def scfoundation_decoder(
    w: W, row: Tensor, hidden: Tensor, *, layers: int, encoder_heads: int, decoder_layers: int
) -> Tensor:
    """One cell: values with 0 where ``hidden`` (S,) is True; (S, E) after the last norm."""
    seen = torch.where(hidden, torch.zeros_like(row), row)
    where, states = scfoundation_encoder(w, seen, layers=layers, heads=encoder_heads)
    x = soft_bins(w, seen)
    x[where] = states
    x[hidden] = w["token_emb.emb_mask.weight"][0]
    x = lin(w, "decoder_embed", x + w["pos_emb.weight"][: len(row)])[None]
    x = performer(w, "decoder.performer", x, layers=decoder_layers, heads=1, key_max="cell")
    return norm(w, "norm", norm(w, "decoder.norm", x))[0]


def tosica(
    w: W, x: Tensor, *, width: int, heads: int, layers: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, G) -> CLS (B, W), logits, rolled-out attention (B, P): the dense masked matrix."""
    fe = "feature_embed.fe"
    flat = fn.linear(x, w[f"{fe}.weight"] * w[f"{fe}.mask"], w[f"{fe}.bias"])
    count = flat.shape[1] // width
    if interleaved:
        tokens = flat.view(-1, width, count).transpose(1, 2)
    else:
        tokens = flat.view(-1, count, width)
    h = torch.cat([w["cls_token"].expand(len(x), -1, -1), tokens], 1)
    joint = None
    for n in range(layers):
        name = f"blocks.{n}"
        inner = lin(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", h, 1e-6))
        q, k, v = (split(part, heads) for part in inner.chunk(3, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        h = h + lin(w, f"{name}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        inner = fn.gelu(lin(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", h, 1e-6)))
        h = h + lin(w, f"{name}.mlp.fc2", inner)
        step = weights.mean(1) + torch.eye(weights.shape[-1])
        step = step / step.sum(-1, keepdim=True)
        joint = step if joint is None else step @ joint
    latent = norm(w, "norm", h, 1e-6)[:, 0]
    assert joint is not None
    return latent, lin(w, "head", latent), joint[:, 0, 1:]


def scgpt_hidden(
    w: W, genes: Tensor, values: Tensor, real: Tensor, *, layers: int, heads: int
) -> Tensor:
    """Every value known: (B, T) -> (B, T, D)."""
    x = norm(w, "encoder.enc_norm", w["encoder.embedding.weight"][genes])
    y = fn.relu(lin(w, "value_encoder.linear1", values.clamp(max=512)[..., None]))
    x = x + norm(w, "value_encoder.norm", lin(w, "value_encoder.linear2", y))
    for n in range(layers):
        x = torch_encoder_layer(w, f"transformer_encoder.layers.{n}", x, heads, real)
    return x
