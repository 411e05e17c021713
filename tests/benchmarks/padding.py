"""What padding costs: one pass of training steps over the demo cells, padded, bucketed and packed.

Run: ``python tests/benchmarks/padding.py [family] [cells per step] [cells per forward]``

Every form sees the same steps of the same cells; forms take turns step by step, so that a busy
machine slows all of them. Only ratios are printed for time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
import torch

from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.collate import collate_tokens
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.infer.load import block_of
from cellray.models.base import BuildContext, CellModel, build_model, family
from cellray.objectives.base import Objective
from cellray.train.job import build_objective
from cellray.train.microbatch import Collator

PANCREAS = Path(__file__).parents[1] / "data" / "pancreas" / "human1.h5ad"
MAX_TOKENS = 3000
FORMS = ("padded, unbucketed", "padded, by length", "packed")
SIZES = {"width": 64, "num_layers": 2, "num_heads": 4, "ffn_width": 128, "dropout": 0.0}


def demo(name: str) -> tuple[TokenBlock, Vocab, Objective, CellModel]:
    """The tokenised demo cells in a keyed random order, and a small model of the family."""
    unit = family(name)
    adata = ad.read_h5ad(PANCREAS)
    genes = [str(gene) for gene in adata.var_names]
    vocab = Vocab.from_genes(genes, genes, specials=tokenizer_unit(unit.tokenizer).specials)
    vocab = vocab.with_medians(np.ones(len(genes), dtype=np.float32))
    tokenizer = make_tokenizer({"name": unit.tokenizer, "max_tokens": MAX_TOKENS}, vocab)
    tokens = tokenizer(block_of(adata, vocab), Draw(0))
    order = np.argsort(Draw(0).bits("benchmark", np.arange(len(tokens))))
    objective = build_objective({"name": unit.objective}, vocab)
    torch.manual_seed(0)
    config = build_section(unit.config, {"family": name, **SIZES})
    model = build_model(name, config, BuildContext(vocab, max_tokens=MAX_TOKENS)).train()
    return tokens.take(order), vocab, objective, model


def main() -> None:
    """Print one line per form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="?", default="scgpt")
    parser.add_argument("cells_step", nargs="?", type=int, default=16)
    parser.add_argument("cells_micro", nargs="?", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    tokens, vocab, objective, model = demo(args.family)
    slots, real, seconds = (np.zeros((len(FORMS), args.steps + 1)) for _ in range(3))
    for step in range(args.steps + 1):  # the first warms up
        first = step * args.cells_step % max(len(tokens) - args.cells_step, 1)
        block = tokens.take(np.arange(first, first + args.cells_step))
        for i, form in enumerate(FORMS):
            started = time.perf_counter()
            if form == "padded, unbucketed":
                rows = np.arange(len(block)).reshape(-1, args.cells_micro)
                parts = [collate_tokens(block.take(r), pad=vocab.pad) for r in rows]
                batches = [objective.corrupt(part, Draw(0)) for part in parts]
            else:
                make = Collator(objective, vocab.pad, args.cells_micro, 0, packed=form == "packed")
                batches = make(block, {}, epoch=0)
            model.zero_grad()
            for batch in batches:
                objective.loss(model(batch), batch).total.backward()  # type: ignore[no-untyped-call]
            seconds[i, step] = time.perf_counter() - started
            real[i, step] = sum(b.num_real_tokens for b in batches)
            slots[i, step] = sum(b.attention_mask.numel() for b in batches)
    lengths = np.diff(tokens.indptr)
    print(
        f"{args.family}, {len(tokens)} cells of {lengths.min()} to {lengths.max()} tokens, "
        f"{args.cells_step} a step, {args.cells_micro} a forward pass, {args.steps} steps"
    )
    print(f"{'form':<20}{'padding':>9}{'step time / unbucketed':>25}")
    for i, form in enumerate(FORMS):
        padding = 1 - real[i, 1:].sum() / slots[i, 1:].sum()
        ratio = np.median(seconds[i, 1:] / seconds[0, 1:])
        print(f"{form:<20}{padding:>9.3f}{ratio:>25.2f}")


if __name__ == "__main__":
    main()
