"""What cells a model's weights have seen, kept beside the model, and whether other cells are among.

Beside an exported model lie
    corpus.json       one stage for each training run the weights went through, oldest first: its
                      stores, data sets, donors, numbers of cells; and whether that is all
    corpus.<id>.npy   (H,) uint64 ascending, the distinct content hashes of a stage's training and
                      validation cells; named after what is in it, so that models can share it

A run that starts from a checkpoint takes that checkpoint's stages over and adds its own, also when
it fine-tunes: the file says what these weights have seen. Whether a benchmark's test cells were in
the pretraining is asked of the checkpoint that fine-tuning started from. Weights of others come
without it: then nobody knows.

Legend: N cells asked about, H distinct hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import CheckpointError
from cellray.core.ids import joinids_of, stores_of
from cellray.data import schema
from cellray.data.contents import content_hashes, keeps_hashes
from cellray.data.soma import Store
from cellray.data.stores import AnyStore, JoinedStore
from cellray.data.vocab import strip_version

__all__ = [
    "CORPUS",
    "READ_AT_MOST",
    "Corpus",
    "Overlap",
    "Selection",
    "Stage",
    "bring",
    "corpus_files",
    "overlap",
    "read_corpus",
    "record_corpus",
]

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Say = Callable[[str], None]
Flag = Literal["none", "partial", "full", "unknown"]

CORPUS = "corpus.json"
FORMAT = "cellray.corpus.v1"
READ_AT_MOST = 200_000  # cells whose counts are read for their hashes where obs does not keep them
_DONORS = ("donor_id", "donor")
WHOLE_GENES = 10_000  # a store with fewer holds a choice of genes, as far as anybody can tell


@dataclass(frozen=True)
class Stage:
    """One training run the weights went through.

    Attributes:
        kind: ``pretrain`` or ``finetune``.
        run: its name.
        stores: ``{"uri", "timestamp", "genes", "num_genes"}`` of each store it read; ``genes`` is
            a digest of their ids, in any order.
        num_cells: training and validation cells.
        datasets: dataset id -> cells; empty where obs has no ``dataset_id``.
        donors: dataset id ("" where there is none) -> donor -> cells.
        hashes: file with the content hashes, "" if they were not computed.
        num_hashes: how many it holds.
    """

    kind: str
    run: str
    stores: list[dict[str, Any]]
    num_cells: int
    datasets: dict[str, int] = field(default_factory=dict)
    donors: dict[str, dict[str, int]] = field(default_factory=dict)
    hashes: str = ""
    num_hashes: int = 0


@dataclass(frozen=True)
class Corpus:
    """Everything the weights have seen.

    Attributes:
        stages: oldest first.
        complete: False if they came from weights that nobody knows the training of.
        folder: where the files lie.
    """

    stages: tuple[Stage, ...]
    complete: bool
    folder: Path

    @property
    def id(self) -> str:
        """Each stage's run with the start of its file of hashes, oldest first."""
        named = [f"{s.run}:{s.hashes.split('.')[1][:8] if s.hashes else '?'}" for s in self.stages]
        return "+".join(named if self.complete else ["unknown", *named])

    def lines(self) -> list[str]:
        """What ``cellray show`` says, a line a stage."""
        told = []
        for stage in self.stages:
            named = f"{len(stage.datasets)} data sets" if stage.datasets else "unnamed data sets"
            hashes = f"{stage.num_hashes:,} content hashes" if stage.hashes else "no content hashes"
            told.append(
                f"seen in {stage.kind} '{stage.run}': {stage.num_cells:,} cells of {named}, "
                f"{hashes}, from {', '.join(store['uri'] for store in stage.stores)}"
            )
        return told if self.complete else ["seen before: unknown (weights of others)", *told]


@dataclass(frozen=True)
class Overlap:
    """How far cells are among those that a model's weights have seen.

    Attributes:
        flag: ``full`` if every cell was seen; ``partial`` if some were, or if cells of the same
            data set were; ``none``; ``unknown`` if nothing was found and something is not known.
        fraction: share of the cells whose content hash was seen, 0..1; None if unknown.
        by_dataset: shared dataset id -> how many of the N cells are of it.
        num_cells: N.
        remark: what the flag rests on, for people.
        corpus_id: names what the weights have seen, "unknown" if nobody knows.
    """

    flag: Flag
    fraction: float | None
    by_dataset: Mapping[str, int]
    num_cells: int
    remark: str
    corpus_id: str = "unknown"


def read_corpus(path: str | Path) -> Corpus | None:
    """What the weights of a model have seen; None if nothing beside them says so.

    Args:
        path: an exported model, a run directory, or a checkpoint within one.

    Raises:
        CheckpointError: the file is there but cannot be read, or one it names is missing.
    """
    place = Path(path)
    near = [place, place / "model", place.parent.parent]
    folder = next(
        (one for one in near[: 2 + (place.parent.name == "checkpoints")] if _in(one)), None
    )
    if folder is None:
        return None
    try:
        raw = json.loads((folder / CORPUS).read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}, not '{FORMAT}'")
        corpus = Corpus(tuple(Stage(**s) for s in raw["stages"]), bool(raw["complete"]), folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{folder / CORPUS}' cannot be read: {error}; without the file, what the model has "
            "seen counts as unknown"
        ) from error
    for stage in corpus.stages:
        if stage.hashes and not (folder / stage.hashes).is_file():
            raise CheckpointError(
                f"'{folder / CORPUS}' names '{stage.hashes}', which is not beside it; copy it from "
                "where the model came from, or remove corpus.json: what the model has seen then "
                "counts as unknown"
            )
    return corpus


def _in(folder: Path) -> bool:
    return (folder / CORPUS).is_file()


def corpus_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to its corpus, ``corpus.json`` last; [] if it has none."""
    if not _in(folder):
        return []
    corpus = read_corpus(folder)
    assert corpus is not None
    names = dict.fromkeys(stage.hashes for stage in corpus.stages if stage.hashes)
    return [*(folder / name for name in names), folder / CORPUS]


def bring(file: Path, folder: Path) -> None:
    """Put a file that is never changed in place into a folder: as a link where that can be."""
    partial = folder / f"{file.name}.{os.getpid()}.partial"
    partial.unlink(missing_ok=True)
    try:
        os.link(file, partial)
    except OSError:
        shutil.copyfile(file, partial)
    os.replace(partial, folder / file.name)


def record_corpus(
    folder: Path,
    store: AnyStore,
    joinids: I64,
    *,
    kind: str,
    run: str,
    timestamp: str = "",
    before: str = "",
    hashes: str = "auto",
    say: Say | None = None,
) -> None:
    """Write down what a run trains on; ``corpus.json``, last, makes it whole.

    Args:
        folder: of the run; must exist.
        store: where the cells are.
        joinids: (N,) its training and validation cells, distinct.
        kind: ``pretrain`` or ``finetune``.
        run: the run's name.
        timestamp: the moment at which the stores were looked at.
        before: checkpoint the weights come from, "" for none: its stages are taken over.
        hashes: ``auto`` computes the hashes where obs does not keep them for at most 200,000
            cells, which reads their counts; ``always``; ``never``.
        say: receives progress.

    Raises:
        CheckpointError: the corpus of ``before`` is torn.
    """
    stages: list[Stage] = []
    complete = True
    if before:
        known = read_corpus(before)
        complete = known is not None and known.complete
        if known is not None:
            for file in corpus_files(known.folder)[:-1]:
                bring(file, folder)
            stages += known.stages
    stores = store.stores if isinstance(store, JoinedStore) else (store,)
    datasets, donors = _counts(stores, joinids)
    name, num = "", 0
    reads = not keeps_hashes(store)
    if hashes != "never" and (not reads or hashes == "always" or len(joinids) <= READ_AT_MOST):
        name, num = _save(folder, content_hashes(store, joinids, say=say))
    elif say:
        say(
            f"what is trained on is noted without content hashes: '{store.uri}' keeps none"
            ' (data.corpus_hashes = "always" computes them, which reads all counts)'
        )
    stages.append(
        Stage(
            kind=kind,
            run=run,
            stores=[{"uri": one.uri, "timestamp": timestamp} | _genes(one) for one in stores],
            num_cells=len(joinids),
            datasets=datasets,
            donors=donors,
            hashes=name,
            num_hashes=num,
        )
    )
    text = {"format": FORMAT, "complete": complete, "stages": [asdict(s) for s in stages]}
    partial = folder / f"{CORPUS}.{os.getpid()}.partial"
    partial.write_text(json.dumps(text, indent=1))
    os.replace(partial, folder / CORPUS)


def _genes(store: Store) -> dict[str, Any]:
    """How many genes a store has, and a digest of their ids."""
    names = sorted(strip_version(gene) for gene in store.var()["feature_id"])
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
    return {"genes": digest, "num_genes": len(names)}


def _comparable(stages: Sequence[Stage], stores: Sequence[Store]) -> bool:
    """Whether a cell would have one hash in the stores of the stages and in these.

    It would where both have the same genes, or where neither is a choice of some genes.
    """
    ours = [_genes(store) for store in stores]
    return all(
        mine["genes"] == theirs.get("genes")
        or min(mine["num_genes"], theirs.get("num_genes", 0)) >= WHOLE_GENES
        for mine in ours
        for stage in stages
        for theirs in stage.stores
    )


def _save(folder: Path, hashes: U64) -> tuple[str, int]:
    distinct = np.unique(hashes[hashes != 0])
    name = f"corpus.{hashlib.sha256(distinct.astype('<u8').tobytes()).hexdigest()[:16]}.npy"
    partial = folder / f"{name}.{os.getpid()}.partial"
    with partial.open("wb") as file:
        np.save(file, distinct)
    os.replace(partial, folder / name)
    return name, len(distinct)


def _parts(stores: tuple[Store, ...], joinids: I64) -> list[tuple[Store, I64]]:
    """Each store with the joinids of its cells, ascending."""
    if len(stores) == 1:
        return [(stores[0], np.sort(joinids))]
    which = stores_of(joinids)
    return [
        (one, np.sort(joinids_of(joinids[which == number]))) for number, one in enumerate(stores)
    ]


def _named(store: Store, joinids: I64) -> pd.DataFrame:
    """Dataset and donor of cells as text, "" where obs does not say."""
    donor = next((c for c in _DONORS if store.has_obs(c)), "")
    columns = {
        "dataset": schema.DATASET_ID if store.has_obs(schema.DATASET_ID) else "",
        "donor": donor,
    }
    obs = store.obs([c for c in columns.values() if c])
    rows = np.searchsorted(obs[schema.JOINID].to_numpy(), joinids)
    return pd.DataFrame(
        {
            key: obs[column].astype("string").fillna("").to_numpy()[rows] if column else ""
            for key, column in columns.items()
        },
        index=np.arange(len(joinids)),
    )


def _counts(
    stores: tuple[Store, ...], joinids: I64
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    datasets: dict[str, int] = {}
    donors: dict[str, dict[str, int]] = {}
    for store, part in _parts(stores, joinids):
        for (dataset, donor), count in _named(store, part).value_counts(sort=False).items():
            if dataset:
                datasets[dataset] = datasets.get(dataset, 0) + int(count)
            if donor:
                inner = donors.setdefault(dataset, {})
                inner[donor] = inner.get(donor, 0) + int(count)
    return datasets, donors


class Selection(Protocol):
    """Cells of a store."""

    @property
    def store(self) -> AnyStore:
        """Where they are."""
        ...


def overlap(
    model: str | Path, cells: Selection, joinids: I64, *, say: Say | None = None
) -> Overlap:
    """Whether cells are among those that a model's weights have seen.

    By content hash, which knows a cell again in any store that kept all genes it has counts of;
    and by dataset id, which also knows it where genes were left out. Cells of the same data set
    make the flag ``partial`` even if no hash is met: other cells of one study are close kin. That
    no hash is met counts only between stores of the same genes, or of at least 10,000 each.

    Args:
        model: an exported model, a run directory, or a checkpoint within one.
        cells: a selection; only its store is looked at.
        joinids: (N,) the cells, e.g. the test cells.
        say: receives progress where counts are read.

    Raises:
        CheckpointError: the model's record is torn.
    """
    corpus, num, store = read_corpus(model), len(joinids), cells.store
    if corpus is None:
        return Overlap("unknown", None, {}, num, "nothing beside the model says what it has seen")
    stores = store.stores if isinstance(store, JoinedStore) else (store,)
    here, _ = _counts(stores, joinids)
    theirs = {name for stage in corpus.stages for name in stage.datasets}
    shared = {name: count for name, count in here.items() if name in theirs}
    hashed = [stage for stage in corpus.stages if stage.hashes]
    fraction = None
    if hashed and num:
        seen = _seen(corpus, hashed, content_hashes(store, joinids, say=say))
        fraction = float(seen.mean())
    met_nothing = fraction == 0 and not _comparable(hashed, stores)
    if met_nothing:  # ids of stores with hashes are cellray's own, after files: no evidence either
        fraction = None
    known = (
        not met_nothing
        and corpus.complete
        and (len(hashed) == len(corpus.stages) or _all_named(corpus, sum(here.values()), num))
    )
    return replace(_judged(fraction, shared, num, known=known), corpus_id=corpus.id)


def _seen(corpus: Corpus, stages: list[Stage], hashes: U64) -> npt.NDArray[np.bool_]:
    """(N,) whether a stage holds the hash; the files are looked into, not read whole."""
    found = np.zeros(len(hashes), dtype=bool)
    for stage in stages:
        held: Any = np.load(corpus.folder / stage.hashes, mmap_mode="r")
        if len(held):
            rows = np.minimum(np.searchsorted(held, hashes), len(held) - 1)
            found |= np.asarray(held[rows]) == hashes
    return np.asarray(found & (hashes != 0))


def _all_named(corpus: Corpus, named: int, num: int) -> bool:
    """Whether dataset ids alone can tell: every cell on both sides has one."""
    return named == num and all(sum(s.datasets.values()) == s.num_cells for s in corpus.stages)


def _judged(fraction: float | None, shared: Mapping[str, int], num: int, *, known: bool) -> Overlap:
    listed = ", ".join(list(shared)[:4])
    if fraction == 1.0:
        return Overlap("full", fraction, shared, num, "the model has seen every one of these cells")
    if fraction:
        remark = f"the model has seen {fraction:.1%} of these cells"
        return Overlap("partial", fraction, shared, num, remark)
    if shared:
        compared = (
            "none with the same counts (others of the study, or stored with genes left out)"
            if fraction == 0
            else "whether the same ones is not known (it keeps no content hashes)"
        )
        remark = f"the model has seen cells of {listed}: {compared}"
        return Overlap("partial", fraction, shared, num, remark)
    if not known:
        remark = "none of these cells is met, but not all that the model has seen is known"
        return Overlap("unknown", None, shared, num, remark)
    basis = "counts and dataset ids" if fraction == 0 else "dataset ids"
    return Overlap("none", 0.0, shared, num, f"no cell and no data set in common, by {basis}")
