"""The way from a store to training batches, beside its floor, its limit and the peers.

Run: ``python tests/benchmarks/data_path.py STORE [--cells 50000] [--rounds 3] [--peers ENV ...]
[--no-ray] [--memory]``. STORE is one that cellray wrote (``cellray synthesize`` makes one with the
density of the Census); see README.md for the peers' environments. All ways read the same cells of
the same machine in interleaved rounds; figures are medians. Writes ``results/data_path.json`` and
``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _common import Meter, hardware

from cellray.core.ids import without_repeats
from cellray.core.memory import keep_freed_memory
from cellray.data.config import DataSection
from cellray.data.plan import EpochPlan, default_lanes
from cellray.data.soma import open_store
from cellray.data.tokens import TokenSource, make_tokenizer
from cellray.data.vocab import Vocab
from cellray.train.prepare import gene_map, select_cells

HERE = Path(__file__).resolve().parent
BATCH = 128
WINDOW = 16_384
RAY_EPOCHS = 8  # the first is not measured: the actors start in it
TOKENIZER = {"name": "bins", "max_tokens": 2048}
SPECIALS = ("<pad>", "<cls>", "<eoc>", "<mask>")
RAY = {1: "tokens, Ray Data, 1 actor on 1 core", 2: "tokens, Ray Data, 2 actors on 2 cores"}
STOCK = "raw SOMA read, sequential, stock settings"
Rows = Iterator[np.ndarray]


@dataclass
class Setup:
    """One selection of cells, its order and what tokenises it."""

    store: Any
    source: TokenSource
    plan: EpochPlan
    labels: dict[str, np.ndarray]
    folder: Path


def prepare(uri: str, cells: int, folder: Path, *, labelled: bool = True) -> Setup:
    """Select the first cells of a store."""
    known = open_store(uri).obs_columns() if labelled else []
    columns = [c for c in ("dataset_id", "cell_type") if c in known]
    found = select_cells(DataSection(uri=uri, obs_filter=f"soma_joinid < {cells}"), columns)
    var = found.store.var()
    vocab = Vocab.from_genes(list(var["feature_id"]), list(var["feature_name"]), specials=SPECIALS)
    plan = EpochPlan(
        joinids=found.joinids,
        lengths=None,
        seed=0,
        cells_global=BATCH,
        lanes=default_lanes(BATCH),
        window_batches=WINDOW // BATCH,
    )
    mapping = gene_map(found.store, vocab)
    source = TokenSource(found.store, mapping, vocab, TOKENIZER, found.joinids)
    labels = {c: np.unique(found.obs[c].astype(str), return_inverse=True)[1] for c in columns}
    return Setup(found.store, source, plan, labels, folder)


def raw(setup: Setup, *, stock: bool) -> Rows:
    """The floor: SOMA's own sequential read, nothing done with it."""
    import tiledbsoma

    from cellray.data.storage import context

    joinids = setup.plan.joinids
    settings = None if stock else context()
    place = f"{setup.store.uri}/ms/{setup.store.measurement}/X/{setup.store.layer}"
    with tiledbsoma.open(place, context=settings) as x:
        for first in range(0, len(joinids), 4096):
            part = joinids[first : first + 4096]
            for table in x.read((slice(int(part[0]), int(part[-1])),)).tables():
                table.column(2).to_numpy()
            yield part


def one_process(setup: Setup) -> Rows:
    """Read, shuffle and tokenise, here."""
    tokenizer = make_tokenizer(TOKENIZER, setup.source.vocab)
    plan, step = setup.plan, setup.plan.window_batches
    for first in range(0, plan.batches_per_epoch, step):
        rows = plan.rows(0, first, min(first + step, plan.batches_per_epoch))
        setup.source.tokens(rows.reshape(-1), epoch=0, tokenizer=tokenizer)
        yield from rows


def through_ray(setup: Setup, actors: int) -> Rows:
    """The stream a training worker gets, with all of Ray's processes counted.

    Its consumer takes every batch at once, so that nothing was produced ahead when the measuring
    begins, but for what the actors are at.
    """
    from cellray.data.pipeline import token_stream

    steps = RAY_EPOCHS * setup.plan.batches_per_epoch
    stream = token_stream(
        setup.source, setup.plan, first_step=0, last_step=steps, actors=actors, cpus_per_actor=1.0
    )
    for step in stream:
        yield step.block.joinids


def cached(setup: Setup) -> Rows:
    """The token cache, in the plan's order."""
    from cellray.data.pipeline import cached_stream

    source = replace(setup.source, cache=str(setup.folder / "tokens"))
    steps = setup.plan.batches_per_epoch
    for step in cached_stream(source, setup.plan, first_step=0, last_step=steps):
        yield step.block.joinids


def write_token_cache(setup: Setup) -> None:
    """Write the cache, shard by shard in this process."""
    from cellray.data.cache import TokenCache, cache_key, prepare_cache

    place = setup.folder / "tokens"
    cells = setup.plan.joinids
    mark = setup.store.fingerprint(cells)
    info = prepare_cache(place, cache_key(setup.source, cells=cells, fingerprint=mark), cells)
    cache = TokenCache(place, replace(setup.source, cache=str(place)))
    for shard in range(info.num_shards):
        cache.write(shard)


def memory_mapped(setup: Setup) -> Rows:
    """The limit: random rows of CSR arrays in memory-mapped files, copied into batches."""
    indptr = np.load(setup.folder / "indptr.npy")
    genes = np.load(setup.folder / "genes.npy", mmap_mode="r")
    counts = np.load(setup.folder / "counts.npy", mmap_mode="r")
    order = np.random.default_rng(0).permutation(len(indptr) - 1)
    for first in range(0, len(order) - BATCH + 1, BATCH):
        rows = order[first : first + BATCH]
        spans = [slice(indptr[r], indptr[r + 1]) for r in rows]
        np.concatenate([genes[s] for s in spans])
        np.concatenate([counts[s] for s in spans])
        yield setup.plan.joinids[rows]


def write_copies(setup: Setup, uri: str, *, peers: bool) -> None:
    """The same cells as memory-mapped CSR and, for the peers, as h5ad and in the Census layout."""
    from scipy import sparse

    joinids = setup.plan.joinids
    genes = np.arange(setup.store.num_genes, dtype=np.int32)
    blocks = [
        setup.store.read_block(joinids[i : i + 4096], genes) for i in range(0, len(joinids), 4096)
    ]
    lengths = np.concatenate([np.diff(b.indptr) for b in blocks])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([b.genes for b in blocks])
    counts = np.concatenate([b.counts for b in blocks])
    for name, array in (("indptr", indptr), ("genes", indices), ("counts", counts)):
        np.save(setup.folder / f"{name}.npy", array)
    if not peers:
        return
    import anndata
    import pandas as pd

    matrix = sparse.csr_matrix((counts, indices, indptr), shape=(len(joinids), len(genes)))
    names = [str(i) for i in range(len(joinids))]
    var = pd.DataFrame(index=setup.store.var()["feature_id"].astype(str).to_numpy())
    obs = pd.DataFrame({"row": np.arange(len(joinids))}, index=names)
    anndata.AnnData(matrix, obs=obs, var=var).write_h5ad(setup.folder / "cells.h5ad")
    write_soma(setup.folder / "census", Path(uri), matrix, census=True)
    write_soma(setup.folder / "rows", Path(uri), matrix, census=False)


def write_soma(place: Path, origin: Path, matrix: Any, *, census: bool) -> None:
    """A SOMA experiment of the cells, in our layout or in that of the Census."""
    import pyarrow as pa
    from layout import variants, write

    from cellray.data import schema
    from cellray.data.writer import create_groups, measurement_path, write_table, x_path

    count, num_genes = matrix.shape
    write_table(place / "obs", pa.table({"row": np.arange(count, dtype=np.int64)}))
    ids = pa.array([str(i) for i in range(num_genes)], pa.large_string())
    write_table(measurement_path(place) / "var", pa.table({"feature_id": ids}))
    path = x_path(place)
    path.parent.mkdir(parents=True)
    options = variants()["census"] if census else schema.x_options()["tiledb"]["create"]
    parts = [matrix[i : i + 4096] for i in range(0, count, 4096)]
    write(path, options, parts, count, num_genes=num_genes)
    create_groups(place, [])


def quality(batches: list[np.ndarray], setup: Setup) -> dict[str, float]:
    """How a batch looks beside a uniform draw: 1 is uniform; see data_path.md 1 for dispersion."""
    if not batches:
        return {}
    rng, joinids = np.random.default_rng(0), setup.plan.joinids
    size = len(batches[0])
    places = [np.searchsorted(joinids, b) for b in batches if len(b) == size]
    drawn = [rng.choice(len(joinids), size, replace=False) for _ in places]
    means = np.array([p.mean() for p in places])
    uniform = (len(joinids) ** 2 - 1) / 12 / size * (1 - size / len(joinids))
    spread = float(((means - (len(joinids) - 1) / 2) ** 2).mean() / uniform)
    found = {"dispersion": spread}
    for name, codes in setup.labels.items():
        ours = np.mean([len(np.unique(codes[p])) for p in places])
        even = np.mean([len(np.unique(codes[p])) for p in drawn])
        found[f"distinct {name}, of uniform"] = float(ours / even)
    return found


def measure(work: Callable[[], Rows], setup: Setup, *, skip: int = 0) -> dict[str, Any]:
    """One pass, without its first ``skip`` batches; what those took is told apart."""
    delivered, batches = 0, list[np.ndarray]()
    stream = iter(work())
    with Meter() as before:
        for _ in range(skip):
            next(stream)
    with Meter() as usage:
        for rows in stream:
            delivered += len(rows)
            if len(batches) < 200:
                batches.append(np.asarray(rows))
    start = {"start_wall": before.wall, "start_cpu": before.cpu} if skip else {}
    return {"cells": delivered, **asdict(usage), **start, "batches": batches}


def measure_peer(name: str, python: Path, setup: Setup) -> dict[str, Any] | str:
    """One pass of a peer in its own environment, or why there is none."""
    words = [str(python), str(HERE / "_peers.py"), name, str(setup.folder)]
    words += [str(len(setup.plan.joinids)), str(BATCH)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE, env={"PATH": "/usr/bin"})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        missing = "ModuleNotFoundError" in last
        return "not installed" if missing else f"failed: {last}"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["batches"] = [setup.plan.joinids[np.array(r)] for r in found.pop("rows")]
    return found


def summary(rounds: list[dict[str, Any]], setup: Setup) -> dict[str, Any]:
    """The medians of the rounds."""
    per_cpu = [r["cells"] / r["cpu"] for r in rounds]
    return {
        "cells_per_cpu_second": round(statistics.median(per_cpu)),
        "lowest": round(min(per_cpu)),
        "highest": round(max(per_cpu)),
        "cells_per_second": round(statistics.median(r["cells"] / r["wall"] for r in rounds)),
        **(
            {"first_epoch_s": round(statistics.median(r["start_wall"] for r in rounds), 1)}
            if "start_wall" in rounds[0]
            else {}
        ),
        "peak_rss_mb": round(max(r["peak_rss"] for r in rounds) / 1e6),
        "quality": {k: round(v, 3) for k, v in quality(rounds[-1]["batches"], setup).items()},
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"{report['cells']:,} cells, {report['rounds']} rounds, medians; "
        f"{report['hardware']['cpu']}; load {report['hardware']['load_before']} at the start.",
        "",
        "| Way | cells/CPU-s (lowest - highest) | cells/s | peak MB | quality |",
        "|---|---|---|---|---|",
    ]
    for name, found in report["ways"].items():
        if isinstance(found, str):
            lines.append(f"| {name} | {found} | | | |")
            continue
        mixed = ", ".join(f"{k} {v}" for k, v in found["quality"].items())
        rates = f"{found['cells_per_cpu_second']:,} ({found['lowest']:,} - {found['highest']:,})"
        wall, peak = f"{found['cells_per_second']:,}", f"{found['peak_rss_mb']:,}"
        lines.append(f"| {name} | {rates} | {wall} | {peak} | {mixed} |")
    slow = [
        f"{n}: {w['first_epoch_s']} s" for n, w in report["ways"].items() if "first_epoch_s" in w
    ]
    if slow:
        lines += ["", "First epoch, actors' start included, not measured above: " + "; ".join(slow)]
    return "\n".join(lines) + "\n"


def ways(setup: Setup) -> dict[str, Callable[[], Rows]]:
    """What is ours, by name; each runs in a process of its own."""
    return {
        STOCK: lambda: raw(setup, stock=True),
        "raw SOMA read, sequential, our settings": lambda: raw(setup, stock=False),
        "tokens, one process": lambda: one_process(setup),
        RAY[1]: lambda: through_ray(setup, 1),
        RAY[2]: lambda: through_ray(setup, 2),
        "token cache": lambda: cached(setup),
        "memory-mapped CSR, random rows": lambda: memory_mapped(setup),
    }


def measure_way(name: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One pass of one of our ways in a process of its own."""
    words = [sys.executable, __file__, given.store, "--cells", str(given.cells)]
    words += ["--way", name, "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    found["batches"] = [np.array(b) for b in found["batches"]]
    return found


def one_way(name: str, setup: Setup) -> None:
    """The child's side of :func:`measure_way`."""
    if name != STOCK:
        keep_freed_memory()
    work = ways(setup)[name]
    skip = 0
    if name in RAY.values():
        cores = sorted(os.sched_getaffinity(0))[: 1 if name == RAY[1] else 2]
        os.sched_setaffinity(0, cores)  # Ray's processes inherit it
        start_ray()
        skip = setup.plan.batches_per_epoch
    else:
        next(work())  # compile, open, fill the page cache
    found = measure(work, setup, skip=skip)
    found["batches"] = [without_repeats(b).tolist() for b in found["batches"]]
    print(json.dumps(found))


def start_ray() -> None:
    """A local Ray, so that its processes are children of this one."""
    import ray

    from cellray.ops.environment import local_ray_environment

    os.environ.update(local_ray_environment())
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)


def memory(uri: str, sizes: list[int]) -> dict[str, int]:
    """Peak bytes of streaming each number of cells, each in a process of its own."""
    found = {}
    held = select_cells(DataSection(uri=uri)).store.num_cells
    if held < max(sizes):
        raise SystemExit(f"--memory needs a store of {max(sizes):,} cells; '{uri}' has {held:,}")
    for size in sizes:
        words = [sys.executable, __file__, uri, "--cells", str(size), "--stream-only"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=HERE)
        found[f"{size} cells"] = int(done.stdout.strip().splitlines()[-1])
    return found


def run(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds of all ways."""
    setup = prepare(given.store, given.cells, folder)
    write_copies(setup, given.store, peers=bool(given.peers))
    write_token_cache(setup)
    rounds: dict[str, Any] = {}
    for _ in range(given.rounds):
        for name in ways(setup):
            if given.no_ray and name in RAY.values():
                continue
            rounds.setdefault(name, []).append(measure_way(name, given, folder))
        if given.peers:
            add_peers(rounds, given.peers, setup)
    return {
        "hardware": hardware(),
        "cells": len(setup.plan.joinids),
        "rounds": given.rounds,
        "batch": BATCH,
        "window_cells": WINDOW,
        "ways": {n: r if isinstance(r, str) else summary(r, setup) for n, r in rounds.items()},
    }


def add_peers(rounds: dict[str, Any], environments: list[str], setup: Setup) -> None:
    """One round of each peer, in the first environment that has it."""
    from _peers import PEERS

    for name in PEERS:
        if isinstance(rounds.get(name), str):
            continue
        found: dict[str, Any] | str = "not installed"
        for place in environments:
            found = measure_peer(name, Path(place) / "bin" / "python", setup)
            if found != "not installed":
                break
        if isinstance(found, str):
            rounds[name] = found
        else:
            rounds.setdefault(name, []).append(found)


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=[], help="virtual environments")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak of 20,000 and 500,000 cells")
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--stream-setup", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--stream-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(HERE / "results" / "data_path"))
    given = parser.parse_args()
    if given.way:
        one_way(given.way, prepare(given.store, given.cells, Path(given.folder)))
        return
    folder = Path(tempfile.mkdtemp(prefix="data_path"))
    try:
        if given.stream_only:
            # what streams is another process than what selects: an actor gets ids and lengths
            whole = pickle.dumps(prepare(given.store, given.cells, folder, labelled=False))
            (folder / "setup").write_bytes(whole)
            words = [sys.executable, __file__, str(folder / "setup"), "--stream-setup"]
            print(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
            return
        if given.stream_setup:
            keep_freed_memory()
            setup = pickle.loads(Path(given.store).read_bytes())
            print(measure(lambda: one_process(setup), setup)["peak_rss"])
            return
        report = run(given, folder)
        if given.memory:
            report["memory"] = memory(given.store, [20_000, 500_000])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Path(f"{given.out}.json").write_text(json.dumps(report, indent=1) + "\n")
    Path(f"{given.out}.md").write_text(table(report))
    print(table(report))
    if "memory" in report:
        print(report["memory"])


if __name__ == "__main__":
    main()
