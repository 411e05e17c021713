"""cellray's training step beside Hugging Face's BERT and a padded ``nn.TransformerEncoder``.

Run: ``python tests/benchmarks/train_step.py [--full] [--device cuda] [--out FILE]``

Three comparisons, each with the same weights, cells, hidden positions, AdamW and clipping on both
sides, without dropout: ``geneformer`` against ``BertForMaskedLM`` (needs ``transformers``),
``scgpt`` under its generative mask and ``scgpt-full`` with full attention, both against an encoder
of torch's own layers with scGPT's embeddings and decoders around it.

Theirs are used as they are meant to be: micro-batches of random cells padded to the longest, every
head at every position, labels of -100 where nothing is hidden; a second row has them sorted by
length. Every form has a model and an optimizer of its own and sees the same cells; the forms take
turns, so that a busy machine slows all. The losses of a round must agree before a ratio counts.
On a CPU the clock is the process's CPU time, which other processes touch least; on a GPU the
wall's. Batches are made beforehand, as a loader's thread does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from _common import hardware
from _step_peers import HuggingFaceBert, OwnLoss, TorchScgpt, transformers
from torch import nn

from cellray.core.batch import CellBatch
from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.core.registry import find
from cellray.core.section import build_section
from cellray.data.collate import collate_tokens
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.infer.load import block_of
from cellray.models.base import BuildContext, CellModel, build_model, family
from cellray.models.upstream.base import revert, upstream
from cellray.objectives.base import Objective
from cellray.train.config import OptimSection
from cellray.train.engine import TorchEngine
from cellray.train.microbatch import Collator

Tensor = torch.Tensor

PANCREAS = Path(__file__).parents[1] / "data" / "pancreas" / "human1.h5ad"
LEARNING_RATE = 1e-4
# Trainer's LengthGroupedSampler sorts within so many micro-batches.
MEGA_BATCH = 50
# Dense bfloat16 peaks in FLOP/s, by a part of the GPU's name, from the makers' data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12}


# --------------------------------------------------------------------------------- the settings


@dataclass(frozen=True)
class Comparison:
    """One family in one shape, and who stands on the other side.

    Attributes:
        family: ours.
        other: theirs, in words.
        build: makes theirs from (configuration, vocabulary, published names -> weights).
        model: keys of ``[model]``.
        tokenizer: keys of ``[tokenizer]``.
        objective: keys of ``[objective]``.
        num_genes: of the vocabulary.
    """

    family: str
    other: str
    build: Callable[[Any, Vocab, dict[str, Tensor]], nn.Module]
    model: dict[str, Any]
    tokenizer: dict[str, Any]
    objective: dict[str, Any]
    num_genes: int


_BERT = {"width": 256, "num_heads": 4, "ffn_width": 512, "max_positions": 2048}
_SCGPT = {"width": 512, "num_heads": 8, "ffn_width": 512, "dropout": 0.0}
_BINS = {"name": "bins", "max_tokens": 1200}

COMPARISONS = {
    "geneformer": Comparison(
        "geneformer",
        "Hugging Face BertForMaskedLM",
        HuggingFaceBert,
        {**_BERT, "num_layers": 6, "dropout": 0.0},
        {"name": "rank", "max_tokens": 2048},
        {"name": "masked"},
        25_424,
    ),
    "scgpt": Comparison(
        "scgpt",
        "nn.TransformerEncoder with the generative mask",
        TorchScgpt,
        {**_SCGPT, "num_layers": 12},
        _BINS,
        {"name": "generative"},
        60_694,
    ),
    "scgpt-full": Comparison(
        "scgpt",
        "nn.TransformerEncoder with full attention",
        TorchScgpt,
        {**_SCGPT, "num_layers": 12},
        _BINS,
        {"name": "generative", "hide": "value"},
        60_694,
    ),
}


def vocabulary(comparison: Comparison, genes: list[str]) -> Vocab:
    """The genes of the file, and others up to the published size of the table."""
    filler = [f"other {i}" for i in range(comparison.num_genes - len(genes))]
    specials = tokenizer_unit(comparison.tokenizer["name"]).specials
    if comparison.family == "geneformer":
        specials = ("<pad>", "<mask>")
    vocab = Vocab.from_genes([*genes, *filler], [*genes, *filler], specials=specials)
    return vocab.with_medians(np.ones(len(vocab), dtype=np.float32))


def pancreas_cells(comparison: Comparison, vocab: Vocab, adata: ad.AnnData) -> TokenBlock:
    """The cells of the file in a keyed random order."""
    tokens = make_tokenizer(comparison.tokenizer, vocab)(block_of(adata, vocab), Draw(0))
    order = np.argsort(Draw(0).bits("benchmark", np.arange(len(tokens))))
    return tokens.take(order)


def mixture_cells(
    comparison: Comparison, vocab: Vocab, cells: int, *, mean: float, sigma: float, seed: int
) -> TokenBlock:
    """Cells of log-normally many genes, cut at ``max_tokens``, of random genes and bins."""
    rng = np.random.default_rng(seed)
    first = 1 if "<cls>" in vocab.specials else 0
    genes = np.maximum(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, cells).round(), 20)
    kept = np.minimum(genes.astype(np.int64), comparison.tokenizer["max_tokens"] - first)
    indptr = np.concatenate([[0], np.cumsum(kept + first)])
    parts = [rng.choice(vocab.gene_tokens, size, replace=False) for size in kept]
    if first:
        head = np.array([vocab.special("<cls>")], dtype=np.int32)
        parts = [np.concatenate([head, part]) for part in parts]
    values = rng.integers(1, 51, indptr[-1]).astype(np.float32)
    if first:
        values[indptr[:-1]] = -2.0
    ids = np.arange(cells, dtype=np.int64)
    return TokenBlock(ids, indptr, np.concatenate(parts).astype(np.int32), values)


# ------------------------------------------------------------------------------------ the forms


@dataclass
class Form:
    """A way to take a step, with a model and an optimizer of its own.

    Attributes:
        name: as the table has it.
        engine: takes the step.
        batches: a step's cells -> corrupted micro-batches.
        seconds: of each round; CPU-seconds on a CPU.
        wall: the same by the wall's clock.
        losses: of each round.
        slots: positions computed in all rounds, padding included.
        tokens: real tokens in all rounds.
        kept: bytes autograd keeps of the first cells as one micro-batch; on a GPU the peak of a
            step above what lay there before it.
    """

    name: str
    engine: TorchEngine
    batches: Callable[[TokenBlock], list[CellBatch]]
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    slots: int = 0
    tokens: int = 0
    kept: int = 0

    def measure(self, block: TokenBlock, device: torch.device) -> None:
        """One step, timed; batches are made before the clock starts, as a loader's thread does."""
        batches = self.batches(block)
        _wait(device)
        started, cpu = time.perf_counter(), time.process_time()
        stats = self.engine.step(batches, lr=LEARNING_RATE)
        _wait(device)
        self.wall.append(time.perf_counter() - started)
        on_cpu = device.type == "cpu"
        self.seconds.append(time.process_time() - cpu if on_cpu else self.wall[-1])
        self.losses.append(stats.loss)
        self.slots += sum(_slots(batch) for batch in batches)
        self.tokens += sum(batch.num_real_tokens for batch in batches)

    def warm_up(self, block: TokenBlock, device: torch.device) -> None:
        """One step that does not count, and what a micro-batch keeps for its backward pass."""
        batches = self.batches(block)
        if device.type == "cpu":
            self.kept = kept_bytes(self.engine.module, max(batches, key=_slots))
            self.engine.step(batches, lr=LEARNING_RATE)
            return
        self.engine.step(batches, lr=LEARNING_RATE)  # the optimizer's state is there from now on
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.engine.step(batches, lr=LEARNING_RATE)
        self.kept = torch.cuda.max_memory_allocated() - before


def kept_bytes(module: nn.Module, batch: CellBatch) -> int:
    """Bytes that autograd keeps after a forward pass beside the weights, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(batch)
    return sum(seen.values())


def _slots(batch: CellBatch) -> int:
    return batch.attention_mask.numel()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _engine(module: nn.Module, objective: Any, args: argparse.Namespace) -> TorchEngine:
    optim = OptimSection(lr=LEARNING_RATE)
    on_device = module.to(args.device)
    return TorchEngine(on_device, objective, optim=optim, precision=args.precision)


def forms(comparison: Comparison, vocab: Vocab, args: argparse.Namespace) -> list[Form]:
    """Theirs random and sorted, then ours: padded, sorted, packed; all with the same weights."""
    layers = args.layers or comparison.model["num_layers"]
    keys = {"family": comparison.family, **comparison.model, "num_layers": layers}
    config = build_section(family(comparison.family).config, keys)
    context = BuildContext(vocab, max_tokens=comparison.tokenizer["max_tokens"])
    unit = find("cellray.objectives", comparison.objective["name"], "OBJECTIVE")
    objective: Objective = unit.build(build_section(unit.config, comparison.objective), vocab)

    def ours() -> CellModel:
        torch.manual_seed(args.seed)
        return build_model(comparison.family, config, context)

    rules = upstream(comparison.family).rules(
        {**config.model_dump(), "num_domains": 1}, 0, vocab, "cell"
    )
    weights = {k: v.detach().clone() for k, v in revert(ours().state_dict(), rules).items()}
    micro = args.cells_micro

    def theirs() -> TorchEngine:
        return _engine(comparison.build(config, vocab, weights), OwnLoss(), args)

    def at_random(block: TokenBlock) -> list[CellBatch]:
        rows = np.arange(len(block))
        parts = [rows[first : first + micro] for first in range(0, len(block), micro)]
        padded = [collate_tokens(block.take(part), pad=vocab.pad) for part in parts]
        return [objective.corrupt(batch, Draw(args.seed, 0)) for batch in padded]

    def by(packed: bool) -> Callable[[TokenBlock], list[CellBatch]]:
        collator = Collator(objective, vocab.pad, micro, args.seed, packed=packed)
        return lambda block: collator(block, {}, epoch=0)

    made = [
        Form(f"{comparison.other}, random batches", theirs(), at_random),
        Form(f"{comparison.other}, sorted by length", theirs(), by(packed=False)),
        Form("cellray, padded, random batches", _engine(ours(), objective, args), at_random),
        Form("cellray, padded by length", _engine(ours(), objective, args), by(packed=False)),
        Form("cellray, packed", _engine(ours(), objective, args), by(packed=True)),
    ]
    return made if args.full else [made[0], *made[3:]]


# ----------------------------------------------------------------------------------- the report


def useful_flops(comparison: Comparison, config: Any, batches: list[CellBatch]) -> float:
    """Floating-point operations a step cannot do without, forward and backward.

    Blocks at real tokens, attention to the tokens that may be attended to, heads at targets only;
    embeddings, norms and the optimizer count as nothing.
    """
    width, layers = config.width, config.num_layers
    per_token = layers * (4 * width**2 + 2 * width * config.ffn_width)
    per_target = width**2 + width * comparison.num_genes
    if comparison.family == "scgpt":
        per_token, per_target = per_token + width**2, 4 * width**2
    products = 0.0
    for batch in batches:
        rows = batch.token_rows().reshape(-1)
        there = batch.attention_mask.reshape(-1)
        known = there if batch.unknown_mask is None else there & ~batch.unknown_mask.reshape(-1)
        queries, keys = (torch.bincount(rows, x.double(), len(batch)) for x in (there, known))
        products += batch.num_real_tokens * per_token + batch.num_targets * per_target
        products += 2 * layers * width * float((queries * keys).sum())
    return 3 * 2 * products


def compare(name: str, data: str, vocab: Vocab, tokens: TokenBlock, args: Any) -> list[str]:
    """Lines of the report: what was run, and a row for each form."""
    comparison, device = COMPARISONS[name], torch.device(args.device)
    made = forms(comparison, vocab, args)
    size, flops, making = args.cells_step, 0.0, 0.0
    config = made[-1].engine.module.config
    for form in made:
        form.warm_up(tokens.slice(0, args.cells_micro), device)
    for number in range(args.rounds):
        rows = np.arange(number * size, (number + 1) * size) % len(tokens)
        block = tokens.take(rows)
        for offset in range(len(made)):  # another one begins each round
            made[(offset + number) % len(made)].measure(block, device)
        started = time.perf_counter()
        batches = made[-1].batches(block)
        making += time.perf_counter() - started
        flops += useful_flops(comparison, config, batches)
    losses = np.array([form.losses for form in made])
    apart = np.abs(losses / losses[:1] - 1).max(0)
    limit = 1e-2 if args.precision == "bf16" else 1e-5
    if not apart[0] < limit:
        raise SystemExit(f"{name}, {data}: losses {losses[:, 0]} differ by more than {limit}")
    lengths = np.diff(tokens.indptr)
    low, middle, high = np.percentile(lengths, [5, 50, 95])
    gpu = " TFLOP/s | MFU |" if device.type == "cuda" else ""
    second = "s" if device.type == "cuda" else "CPU-s"
    told = [
        f"## {name}: {comparison.other}, {data}",
        "",
        f"{config.num_layers} layers, width {config.width}, {config.num_heads} heads, ffn "
        f"{config.ffn_width}, {vocab.num_tokens:,} tokens in the vocabulary. Cells of "
        f"{low:,.0f} / {middle:,.0f} / {high:,.0f} tokens (5, 50, 95 %), at most "
        f"{lengths.max():,}; {size} cells a step, {args.cells_micro} a micro-batch, "
        f"{args.rounds} rounds. Relative difference of the losses: {apart[0]:.1e} in the first "
        f"round, at most {apart.max():.1e} in any. Making the packed batches takes "
        f"{making / sum(made[-1].wall):.1%} of a step, beside it. {_mega_batch(lengths, args)}",
        "",
        f"| form | padding | cells/{second}, ratio | spread | by the wall | real tokens/{second} "
        f"| MB kept |{gpu}",
        "|---|---|---|---|---|---|---|" + "---|---|" * bool(gpu),
    ]
    return told + [_row(form, made[0], flops, device) for form in made] + [""]


def _row(form: Form, base: Form, flops: float, device: torch.device) -> str:
    ratios = np.array(base.seconds) / np.array(form.seconds)
    wall = np.median(np.array(base.wall) / np.array(form.wall))
    spread = f"{ratios.min():.2f} to {ratios.max():.2f}"
    line = (
        f"| {form.name} | {1 - form.tokens / form.slots:.1%} | {np.median(ratios):.2f} | {spread} "
        f"| {wall:.2f} | {form.tokens / sum(form.seconds):,.0f} | {form.kept / 1e6:,.0f} |"
    )
    if device.type == "cuda":
        rate = flops / sum(form.seconds)
        gpu = torch.cuda.get_device_name()
        peak = next((value for part, value in PEAKS.items() if part in gpu), 0.0)
        line += f" {rate / 1e12:.1f} | " + (f"{rate / peak:.1%} |" if peak else "unknown peak |")
    return line


def _mega_batch(lengths: np.ndarray, args: argparse.Namespace) -> str:
    """What sorting within as many cells as Trainer's sampler takes would leave of padding."""
    micro = args.cells_micro
    drawn = np.sort(np.random.default_rng(args.seed).choice(lengths, MEGA_BATCH * micro))
    share = 1 - drawn.sum() / (drawn.reshape(-1, micro).max(1).sum() * micro)
    return f"Sorted within {MEGA_BATCH} micro-batches, as Trainer can, {share:.1%} were padding."


def _machine(args: argparse.Namespace) -> str:
    machine = hardware()
    where = f"{machine['cpu']}, {machine['memory_gb']} GB, load {machine['load_before']} before"
    if args.device == "cuda":
        where = f"{torch.cuda.get_device_name()}, host {where}"
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    package = transformers()
    if package is not None:
        versions += f", transformers {package.__version__}"
    return f"{where}; {versions}; {args.precision} (weights in fp32)."


def arguments() -> argparse.Namespace:
    """The command line, with what ``--full`` and the device decide."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=COMPARISONS, help="one comparison")
    parser.add_argument("--data", choices=("mixture", "pancreas", "both"), default="mixture")
    parser.add_argument("--layers", type=int, default=0, help="0: all; scGPT on a CPU: 4")
    parser.add_argument("--cells-step", type=int, default=0, help="0: 16; on a GPU 64")
    parser.add_argument("--cells-micro", type=int, default=0, help="0: 4; on a GPU 16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mean", type=float, default=1200.0, help="genes a cell of the mixture")
    parser.add_argument("--sigma", type=float, default=0.7, help="of the mixture's log-normal")
    parser.add_argument("--full", action="store_true", help="all layers, rows and comparisons")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="on a GPU bf16, else fp32")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    args.full = args.full or gpu
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    args.cells_step = args.cells_step or (64 if gpu else 16)
    args.cells_micro = args.cells_micro or (16 if gpu else 4)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def cells_of(
    comparison: Comparison, data: str, vocab: Vocab, adata: ad.AnnData, args: argparse.Namespace
) -> TokenBlock:
    """The tokens that a comparison runs on."""
    if data == "pancreas":
        return pancreas_cells(comparison, vocab, adata)
    size = args.cells_step * args.rounds
    return mixture_cells(comparison, vocab, size, mean=args.mean, sigma=args.sigma, seed=args.seed)


def main() -> None:
    """Print the report, and write it if asked."""
    args = arguments()
    adata = ad.read_h5ad(PANCREAS)
    genes = [str(gene) for gene in adata.var_names]
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    told = ["# The training step beside Hugging Face's BERT and torch's encoder", ""]
    told += [_machine(args), "", f"`python tests/benchmarks/{command}`", ""]
    print("\n".join(told), flush=True)
    chosen = [args.only] if args.only else list(COMPARISONS)[: 3 if args.full else 2]
    layers = args.layers
    for name in chosen:
        comparison = COMPARISONS[name]
        if name == "geneformer" and transformers() is None:
            told += ["geneformer: transformers is not installed: pip install transformers", ""]
            print(told[-2], flush=True)
            continue
        args.layers = layers or (4 if comparison.family == "scgpt" and not args.full else 0)
        vocab = vocabulary(comparison, genes)
        for data in ("mixture", "pancreas") if args.data == "both" else (args.data,):
            tokens = cells_of(comparison, data, vocab, adata, args)
            lines = compare(name, data, vocab, tokens, args)
            print("\n".join(lines), flush=True)
            told += lines
    if args.out:
        Path(args.out).write_text("\n".join(told))


if __name__ == "__main__":
    main()
