"""Each family's step on a CPU beside a plain PyTorch implementation of the same formulae.

Run: ``python tests/benchmarks/families.py [--rounds 5] [--out results/families.md]``

The plain side is written with torch's own functions (``scaled_dot_product_attention`` for exact
attention, a dense (T, T) mask where there is one, the masked dense matrix, FAVOR+ as its formula
reads), holds the same weights, and gives the same numbers: that is checked before anything is
timed. The two take turns, so that a busy machine slows both. Only ratios are printed for time;
memory is what autograd keeps between forward and backward.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
import reference_models as plain
from cellray.core.batch import CellBatch
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model, family
from cellray.models.upstream.base import revert, upstream
from cellray.nn.attention import generative_attention
from cellray.nn.favor import favor_attention, num_features, orthogonal_features

Tensor = torch.Tensor
Run = Callable[[], Tensor]


def fast_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Torch's kernel in the place of the written-out softmax."""
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


plain.softmax_attention = fast_attention


@dataclass
class Case:
    """One family in one size: ours and the plain one, over the same weights."""

    name: str
    size: str
    ours: Run
    other: Run


def build(name: str, num_genes: int, sets: int = 0, classes: int = 0, **keys: Any) -> Any:
    """A model in eval mode and its weights under the published names, as leaves."""
    unit = family(name)
    ids = [f"G{i}" for i in range(num_genes)]
    specials = ("<T>", "<S>", "<pad>") if name.startswith("scf") else ("<pad>", "<mask>", "<cls>")
    vocab = Vocab.from_genes(ids, ids, specials=specials)
    if sets:
        drawn = np.random.default_rng(0).random((sets - 1, num_genes)) < 0.03
        members = {f"P{i}": tuple(np.flatnonzero(row).tolist()) for i, row in enumerate(drawn)}
        vocab = vocab.with_gene_sets({**members, "node 0": tuple(range(num_genes))})
    config = build_section(unit.config, {"family": name, **keys})
    torch.manual_seed(0)
    context = BuildContext(vocab, max_tokens=2048)
    model = build_model(name, config, context, num_classes=classes).eval()
    raw = {**config.model_dump(), "num_domains": 1}
    rules = upstream(name).rules(raw, classes, vocab, "cell")
    with torch.no_grad():
        theirs = {k: v.detach().clone() for k, v in revert(model.state_dict(), rules).items()}
    leaves = {
        k: v.float().requires_grad_() if v.is_floating_point() else v for k, v in theirs.items()
    }
    return model, leaves, vocab


def batch_of(tokens: Tensor, values: Tensor) -> CellBatch:
    return CellBatch(
        cell_ids=torch.arange(len(tokens)),
        token_ids=tokens,
        values=values,
        attention_mask=torch.ones(tokens.shape, dtype=torch.bool),
    )


def geneformer() -> Case:
    model, w, _ = build("geneformer", 25_423, num_layers=6, width=256, num_heads=4, ffn_width=512)
    tokens = torch.stack([torch.randperm(25_000)[:2048] + 3 for _ in range(2)])
    batch = batch_of(tokens, torch.zeros(tokens.shape))

    def other() -> Tensor:
        e = "bert.embeddings"
        x = w[f"{e}.word_embeddings.weight"][tokens] + w[f"{e}.position_embeddings.weight"][:2048]
        x = plain.norm(w, f"{e}.LayerNorm", x + w[f"{e}.token_type_embeddings.weight"][0], 1e-12)
        for n in range(6):
            layer = f"bert.encoder.layer.{n}"
            heads = [f"{layer}.attention.self.{p}" for p in ("query", "key", "value")]
            q, k, v = (plain.split(plain.lin(w, head, x), 4) for head in heads)
            mixed = fast_attention(q, k, v, None).transpose(1, 2).flatten(2)
            out = f"{layer}.attention.output"
            x = plain.norm(w, f"{out}.LayerNorm", x + plain.lin(w, f"{out}.dense", mixed), 1e-12)
            inner = functional.relu(plain.lin(w, f"{layer}.intermediate.dense", x))
            out = f"{layer}.output"
            x = plain.norm(w, f"{out}.LayerNorm", x + plain.lin(w, f"{out}.dense", inner), 1e-12)
        return x

    return Case("Geneformer", "V1-10M, 2 x 2,048 tokens", lambda: model(batch).hidden, other)


def scgpt() -> Case:
    model, w, _ = build("scgpt", 60_000, num_layers=4)
    tokens = torch.stack([torch.randperm(60_000)[:1200] + 3 for _ in range(4)])
    values = torch.randint(1, 51, tokens.shape).float()
    unknown = torch.rand(tokens.shape) < 0.5
    batch = replace(batch_of(tokens, values), unknown_mask=unknown)

    def other() -> Tensor:
        x = plain.norm(w, "encoder.enc_norm", w["encoder.embedding.weight"][tokens])
        lifted = functional.relu(plain.lin(w, "value_encoder.linear1", values[..., None]))
        second = plain.norm(w, "value_encoder.norm", plain.lin(w, "value_encoder.linear2", lifted))
        x = x + torch.where(unknown[..., None], w["flag_encoder.weight"][1], second)
        itself = torch.eye(tokens.shape[1], dtype=torch.bool)
        mask = (~unknown[:, None, :] | itself)[:, None]
        for n in range(4):
            name = f"transformer_encoder.layers.{n}"
            joint = functional.linear(
                x, w[f"{name}.self_attn.in_proj_weight"], w[f"{name}.self_attn.in_proj_bias"]
            )
            q, k, v = (plain.split(part, 8) for part in joint.chunk(3, -1))
            mixed = fast_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            out = plain.lin(w, f"{name}.self_attn.out_proj", mixed)
            x = plain.norm(w, f"{name}.norm1", x + out)
            inner = functional.relu(plain.lin(w, f"{name}.linear1", x))
            x = plain.norm(w, f"{name}.norm2", x + plain.lin(w, f"{name}.linear2", inner))
        return x

    size = "4 blocks, 4 x 1,200 tokens, half unknown"
    return Case("scGPT", size, lambda: model(batch).hidden, other)


def scbert() -> Case:
    model, w, vocab = build("scbert", 16_906, num_layers=2)
    tokens = torch.from_numpy(vocab.gene_tokens[:2000].astype(np.int64))[None]
    values = torch.randint(1, 6, tokens.shape).float()
    dense = torch.zeros(1, 16_907, dtype=torch.int64)
    dense[0, :2000] = values.long()[0]
    sizes = {"layers": 2, "heads": 10, "key_max": "cell"}
    return Case(
        "scBERT",
        "2 blocks, 1 x 16,907 places",
        lambda: model(batch_of(tokens, values)).panel,
        lambda: plain.scbert_hidden(w, dense, **sizes),
    )


def scfoundation() -> Case:
    keys = {"num_layers": 2, "decoder_layers": 1, "decoder_heads": 1, "decoder_width": 512}
    model, w, vocab = build("scfoundation", 19_264, **keys)
    genes = torch.from_numpy(vocab.gene_tokens[:1500].astype(np.int64))
    tokens = torch.cat([genes, torch.tensor([0, 1])])[None]
    values = torch.rand(tokens.shape) * 3 + 0.1
    batch = batch_of(tokens, values)
    hidden = torch.zeros(tokens.shape, dtype=torch.bool)
    hidden[0, :450] = True
    masked = replace(batch, unknown_mask=hidden, target_mask=hidden)
    row = torch.zeros(19_266)
    row[:1500] = values[0, :1500]
    row[19_264:] = values[0, 1500:]
    at = torch.zeros(19_266, dtype=torch.bool)
    at[:450] = True
    sizes = {"layers": 2, "encoder_heads": 12, "decoder_layers": 1}

    def other() -> Tensor:
        states = plain.scfoundation_decoder(w, row, at, **sizes)
        return plain.lin(w, "to_final", states)[:450, 0]

    size = "2 + 1 blocks, 1,500 of 19,264 genes"
    return Case("scFoundation", size, lambda: model(masked).predictions["expression"], other)


def tosica() -> Case:
    model, w, vocab = build("tosica", 3_000, sets=300, classes=13)
    tokens = torch.from_numpy(vocab.gene_tokens.astype(np.int64))[None].expand(32, -1)
    values = torch.rand(32, 3_000)
    sizes = {"width": 48, "heads": 4, "layers": 2, "interleaved": False}
    assert vocab.gene_sets is not None
    mask = torch.zeros(300, 3_000)
    for number, genes in enumerate(vocab.gene_sets.values()):
        mask[number, list(genes)] = 1.0
    w["feature_embed.fe.mask"] = mask.repeat_interleave(48, dim=0)
    return Case(
        "TOSICA",
        "32 cells, 300 pathways x 3,000 genes",
        lambda: model(batch_of(tokens, values)).predictions["class_logits"],
        lambda: plain.tosica(w, values, **sizes)[1],
    )


def kept(run: Run) -> float:
    """Megabytes that autograd keeps after a forward pass, each storage once."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run().sum().backward()
    return sum(seen.values()) / 1e6


def timed(run: Run, backward: bool) -> float:
    started = time.perf_counter()
    if backward:
        run().square().sum().backward()
    else:
        with torch.no_grad():
            run()
    return time.perf_counter() - started


def compare(case: Case, rounds: int) -> str:
    """One line of the table; the two sides' numbers must agree first."""
    with torch.no_grad():
        torch.testing.assert_close(case.ours(), case.other(), atol=2e-3, rtol=2e-3)
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for backward, found in ratios.items():
            one, two = timed(case.other, backward), timed(case.ours, backward)
            if number:  # the first warms up
                found.append(one / two)
    forward, both = (float(np.median(ratios[b])) for b in (False, True))
    memory = f"{kept(case.ours):,.0f} | {kept(case.other):,.0f}"
    return f"| {case.name} | {case.size} | {forward:.2f} | {both:.2f} | {memory} |"


def favor_lengths(rounds: int) -> list[str]:
    """FAVOR+ at growing lengths: time a token, and what is kept, relative to the shortest."""
    lines, first = [], 0.0
    rows = orthogonal_features(num_features(64), 64, seed=0)
    for length in (2_408, 4_816, 9_633, 19_266):
        q, k, v = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))

        def run(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return favor_attention(q, k, v, rows)

        best = min(timed(run, True) for _ in range(rounds + 1)) / length
        first = first or best
        lines.append(f"| {length:,} | {best / first:.2f} | {kept(run) * 1e6 / length / 1e3:.1f} |")
    return lines


def generative_lengths() -> list[str]:
    """What the generative mask keeps for backward, beside a dense mask."""
    lines = []
    for length in (600, 1_200, 2_400):
        q, k, v = (torch.randn(2, 8, length, 64, requires_grad=True) for _ in range(3))
        keys = torch.ones(2, length, dtype=torch.bool)
        unknown = torch.rand(2, length) < 0.5

        def ours(
            q: Tensor = q, k: Tensor = k, v: Tensor = v, keys: Tensor = keys, u: Tensor = unknown
        ) -> Tensor:
            return generative_attention(q, k, v, keys, u)

        def dense(
            q: Tensor = q, k: Tensor = k, v: Tensor = v, n: int = length, u: Tensor = unknown
        ) -> Tensor:
            mask = ~u[:, None, None, :] | torch.eye(n, dtype=torch.bool)
            logits = (q @ k.transpose(-1, -2) / 8).masked_fill(~mask, -1e9)
            return torch.softmax(logits, -1) @ v

        lines.append(f"| {length:,} | {kept(ours):.1f} | {kept(dense):.1f} |")
    return lines


def main() -> None:
    """Print the tables, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    cpu = platform.processor() or platform.machine()
    told = [
        "# Families on a CPU beside plain PyTorch",
        "",
        f"`python tests/benchmarks/families.py --rounds {args.rounds}` on {os.cpu_count()} shared "
        f"virtual {cpu} cores, torch {torch.__version__}. Time: plain / ours, the median of "
        f"{args.rounds} rounds, the two taking turns; above 1 ours is faster. Memory: what "
        "autograd keeps between forward and backward.",
        "",
        "| family | size | forward | forward + backward | MB kept, ours | MB kept, plain |",
        "|---|---|---|---|---|---|",
    ]
    for make in (geneformer, scgpt, scbert, scfoundation, tosica):
        told.append(compare(make(), args.rounds))
        print(told[-1], flush=True)
    told += ["", "FAVOR+, 8 heads of 64, forward + backward:", ""]
    told += ["| tokens | time a token | KB kept a token |", "|---|---|---|"]
    told += favor_lengths(args.rounds)
    told += ["", "The generative mask, 2 cells, 8 heads of 64, MB kept:", ""]
    told += ["| tokens | ours | dense mask |", "|---|---|---|", *generative_lengths()]
    print("\n".join(told))
    if args.out:
        Path(args.out).write_text("\n".join(told) + "\n")


if __name__ == "__main__":
    main()
