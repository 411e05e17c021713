"""How many times faster the tokenizers are than a Python loop over cells, in one run.

Run: ``python tests/benchmarks/tokenizers.py [cells] [genes per cell]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix

from cellray.core.blocks import CellBlock
from cellray.core.draw import Draw
from cellray.data.vocab import Vocab
from cellray.tokenizers import bins, depth, panel, rank

NUM_GENES = 20_000


def make_block(num_cells: int, mean_genes: int) -> CellBlock:
    """Cells with log-normal numbers of genes and heavy-tailed counts, most of them 1."""
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(np.log(mean_genes) - 0.08, 0.4, num_cells), NUM_GENES)
    lengths = np.maximum(sizes.astype(np.int64), 1)
    genes = [np.sort(rng.choice(NUM_GENES, n, replace=False)).astype(np.int32) for n in lengths]
    counts = np.floor(rng.pareto(1.3, lengths.sum()) + 1).clip(1, 5_000).astype(np.float32)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return CellBlock(
        joinids=np.arange(num_cells, dtype=np.int64),
        indptr=indptr,
        genes=np.concatenate(genes),
        counts=counts,
        library_sizes=np.add.reduceat(counts, indptr[:-1]),
    )


def rank_loop(block: CellBlock, vocab: Vocab, max_tokens: int, kind: str = "quicksort") -> None:
    """One row of a sparse matrix after the other: normalise in float64, argsort, cut."""
    shape = (len(block), NUM_GENES)
    rows = csr_matrix((block.counts.astype(np.float64), block.genes, block.indptr), shape=shape)
    medians = vocab.medians.astype(np.float64)
    for i in range(len(block)):
        row = rows[i]
        scores = row.data / block.library_sizes[i] * 10_000 / medians[row.indices]
        order = np.argsort(-scores, kind=kind)[:max_tokens]
        _ = vocab.gene_tokens[row.indices[order]], scores[order]


def bins_loop(block: CellBlock, vocab: Vocab, max_tokens: int) -> None:
    """One cell after the other: quantiles, digitise twice, draw, sample."""
    rng = np.random.default_rng(0)
    levels = np.linspace(0, 1, 50)
    for i in range(len(block)):
        rows = slice(block.indptr[i], block.indptr[i + 1])
        genes, counts = block.genes[rows], block.counts[rows]
        edges = np.quantile(counts, levels)
        left, right = np.digitize(counts, edges), np.digitize(counts, edges, right=True)
        value = np.ceil(rng.random(len(counts)) * (right - left) + left)
        keep = slice(None)
        if len(genes) > max_tokens - 1:
            keep = np.sort(rng.permutation(len(genes))[: max_tokens - 1])
        _ = vocab.gene_tokens[genes[keep]], value[keep]


def scaled_rows(block: CellBlock, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Genes of a cell, and its counts scaled to 10,000."""
    rows = slice(block.indptr[i], block.indptr[i + 1])
    counts = block.counts[rows]
    return block.genes[rows], counts / counts.sum() * 10_000


def panel_loop(block: CellBlock, vocab: Vocab) -> None:
    """One cell after the other: scale, log2, cut, truncate, into a row of the whole panel."""
    for i in range(len(block)):
        genes, scaled = scaled_rows(block, i)
        row = np.zeros(NUM_GENES + 1, dtype=np.int64)
        row[genes] = np.minimum(np.log2(1 + scaled), 5).astype(np.int64)


def depth_loop(block: CellBlock, vocab: Vocab) -> None:
    """One cell after the other: scale, log, T and S behind a row of the whole panel, its values."""
    for i in range(len(block)):
        genes, scaled = scaled_rows(block, i)
        row = np.zeros(NUM_GENES + 2, dtype=np.float32)
        row[genes] = np.log1p(scaled)
        total = block.counts[block.indptr[i] : block.indptr[i + 1]].sum()
        row[-2:] = np.log10(total)
        where = np.flatnonzero(row > 0)
        _ = where, row[where]


def rate(function: Callable[[], object], num_cells: int, repeats: int) -> float:
    """Cells per second, median over repeats."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return num_cells / statistics.median(seconds)


def main() -> None:
    """Print one line per tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="?", type=int, default=4096)
    parser.add_argument("genes", nargs="?", type=int, default=1845)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    block = make_block(args.cells, args.genes)
    ids = [f"G{i}" for i in range(NUM_GENES)]
    specials = ("<pad>", "<mask>", "<cls>", "<eos>", "<T>", "<S>")
    medians = np.random.default_rng(1).lognormal(1, 0.7, NUM_GENES).astype(np.float32)
    vocab = Vocab.from_genes(ids, ids, specials=specials).with_medians(medians)
    draw = Draw(0)
    kernels = {
        "rank": rank.TOKENIZER.build(rank.RankConfig(), vocab),
        "rank, stable loop": rank.TOKENIZER.build(rank.RankConfig(), vocab),
        "bins": bins.TOKENIZER.build(bins.BinsConfig(), vocab),
        "bins, no sampling": bins.TOKENIZER.build(bins.BinsConfig(max_tokens=20_001), vocab),
        "panel": panel.TOKENIZER.build(panel.PanelConfig(), vocab),
        "depth": depth.TOKENIZER.build(depth.DepthConfig(), vocab),
    }
    loops = {
        "rank": lambda: rank_loop(block, vocab, 2048),
        "rank, stable loop": lambda: rank_loop(block, vocab, 2048, "stable"),
        "bins": lambda: bins_loop(block, vocab, 1200),
        "bins, no sampling": lambda: bins_loop(block, vocab, 20_001),
        "panel": lambda: panel_loop(block, vocab),
        "depth": lambda: depth_loop(block, vocab),
    }
    print(f"{args.cells} cells, {len(block.genes) / args.cells:.0f} genes per cell, one core")
    for name, kernel in kernels.items():
        start = time.perf_counter()
        kernel(block.take(np.arange(2)), draw)
        compile_s = time.perf_counter() - start
        fast = rate(lambda kernel=kernel: kernel(block, draw), args.cells, args.repeats)
        slow = rate(loops[name], args.cells, args.repeats)
        print(
            f"{name:18s} kernel {fast:9,.0f} cells/s   loop {slow:7,.0f} cells/s   "
            f"{fast / slow:5.1f}x   first call {compile_s:.2f} s"
        )


if __name__ == "__main__":
    main()
