"""What a training run works out on the driver before any worker starts.

Everything that can be wrong with a configuration against real data is found here: the store, the
selection, the vocabulary, the label column, the checkpoint to start from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.draw import Draw
from cellray.core.errors import CheckpointError, ConfigError, DataError, did_you_mean
from cellray.core.ids import stores_of
from cellray.core.section import Section, to_dict
from cellray.data import schema
from cellray.data.balance import Balance
from cellray.data.cache import cache_key, check_cache
from cellray.data.config import DataSection
from cellray.data.mixing import measure_mixing
from cellray.data.mixture import MixturePlan, deal_lanes
from cellray.data.plan import EpochPlan, Plan, default_lanes, window_batches
from cellray.data.soma import open_store
from cellray.data.split import key_unit, split_by
from cellray.data.stats import check_coverage, coverage, nonzero_medians
from cellray.data.storage import iso, now_ms
from cellray.data.stores import AnyStore, JoinedStore, join_stores
from cellray.data.tokens import TokenSource, tokenizer_unit
from cellray.data.variable import GeneMoments, choose_variable
from cellray.data.vocab import Vocab
from cellray.train.config import BatchSection, TrainSection

__all__ = [
    "Cells",
    "TrainingData",
    "check_vocab",
    "encode",
    "make_plan",
    "make_training_data",
    "sample_cells",
    "select_cells",
    "store_vocab",
    "total_steps",
]

I64 = npt.NDArray[np.int64]
_BLOCK_CELLS = 4096
# labels by which the shuffle is judged, the first ones that a store has
_MIXING_COLUMNS = ("dataset_id", "cell_type", "donor_id", "donor", "tissue")
_MIXING_SHOWN = 2


@dataclass(frozen=True)
class Cells:
    """The selected cells of a store.

    Attributes:
        store: where they are: one store, or several read as one.
        obs: one row a cell, sorted by ``soma_joinid`` (with several stores: the cell id), with the
            columns a run asked for.
        timestamp: the moment at which the stores were looked at, ISO 8601.
    """

    store: AnyStore
    obs: pd.DataFrame
    timestamp: str = ""

    @property
    def joinids(self) -> I64:
        """(N,) ascending int64."""
        return np.asarray(self.obs["soma_joinid"].to_numpy(), dtype=np.int64)

    def keys(self) -> npt.NDArray[np.uint64]:
        """(N,) hash of each cell's own id, see :meth:`cellray.data.soma.Store.cell_keys`."""
        return self.store.cell_keys(self.joinids)

    def keyed(self) -> pd.DataFrame:
        """``obs`` with :meth:`keys` as column ``cellray_cell_key``."""
        return self.obs.assign(**{schema.CELL_KEY: self.keys()})

    def lengths(self, max_tokens: int) -> I64 | None:
        """(N,) expected tokens per cell from obs ``nnz``; None if the store does not know it."""
        if "nnz" not in self.obs:
            return None
        return np.asarray(np.minimum(self.obs["nnz"].to_numpy(dtype=np.int64), max_tokens))


def select_cells(
    data: DataSection, columns: Sequence[str] | Callable[[list[str]], list[str]] = ()
) -> Cells:
    """Open the store and apply the obs filter.

    Args:
        data: the section.
        columns: obs columns the run needs besides those the section names, or a function from the
            columns there are to those.

    Raises:
        DataError: no such store, measurement, layer or column, a bad filter, or nothing selected.
    """
    looked = data.timestamp or iso(now_ms())
    store = join_stores(
        [
            open_store(
                uri,
                measurement=data.measurement,
                layer=data.layer,
                timestamp=data.timestamp,
                tiledb=data.tiledb,
            )
            for uri in data.uris
        ]
    )
    known = store.obs_columns()
    named = columns(known) if callable(columns) else columns
    keys = {"data.split.by": data.split.by, "data.balance_by": data.balance_by}
    if data.held_out:
        keys["data.held_out_by"] = data.held_out_by
    for key, column in keys.items():
        if column and column not in known:
            raise DataError(
                f"{key} = '{column}' is no obs column of '{store.uri}'."
                f"{did_you_mean(column, known)} It has: {', '.join(known)}"
            )
    wanted = [*data.covariates, *named, *(column for column in keys.values() if column)]
    nnz, present = schema.num_nonzero(data.measurement), schema.presence(data.measurement)
    if data.min_genes_per_cell and nnz not in known:
        raise DataError(
            f"data.min_genes_per_cell needs an obs column '{nnz}', which the store does not have; "
            "set it to 0 or ingest the store with cellray"
        )
    wanted += [c for c in (nnz, present, *_MIXING_COLUMNS) if c in known]
    obs = store.obs(list(dict.fromkeys(wanted)), value_filter=data.obs_filter or None)
    if present in obs:  # cells without the measurement have no row in it
        obs = obs[obs[present].fillna(False).astype(bool)].reset_index(drop=True)
    if nnz in obs and nnz != schema.NUM_NONZERO:
        obs = obs.drop(columns=schema.NUM_NONZERO, errors="ignore")
        obs = obs.rename(columns={nnz: schema.NUM_NONZERO})
    if data.held_out:
        obs = _without(obs, data.held_out_by, data.held_out)
    if data.min_genes_per_cell:
        obs = obs[obs["nnz"] >= data.min_genes_per_cell].reset_index(drop=True)
    if obs.empty:
        held = f" and held_out = {data.held_out}" if data.held_out else ""
        raise DataError(
            f"data.obs_filter = '{data.obs_filter}' with min_genes_per_cell = "
            f"{data.min_genes_per_cell}{held} selects none of the {store.num_cells} cells of "
            f"{store.uri}"
        )
    return Cells(store, obs, looked)


def _without(obs: pd.DataFrame, column: str, values: Sequence[str]) -> pd.DataFrame:
    """The cells of other datasets.

    Raises:
        DataError: no cell of the selection is of a dataset that is named: a typing error would
            silently train on what should be held out.
    """
    names = obs[column].astype("string")
    there = sorted(names.dropna().unique().tolist())
    for value in values:
        if value not in there:
            raise DataError(
                f"data.held_out names '{value}', which no selected cell has as '{column}'."
                f"{did_you_mean(value, there)} There are: {', '.join(there[:8])}"
            )
    return obs[~names.isin(list(values)).fillna(False).to_numpy()].reset_index(drop=True)


def encode(
    obs: pd.DataFrame, columns: Sequence[str], categories: Mapping[str, list[str]] | None = None
) -> tuple[dict[str, I64], dict[str, list[str]]]:
    """Codes of obs columns: name -> (N,) int64, and the categories in code order.

    Given categories (from a checkpoint) are kept; a value they lack is an error.

    Raises:
        DataError: a value outside the given categories.
    """
    codes, names = {}, {}
    for column in columns:
        values = obs[column].astype("string").fillna("unknown")
        levels = list((categories or {}).get(column) or sorted(values.unique().tolist()))
        code = pd.Categorical(values, categories=levels).codes.astype(np.int64)
        if (code < 0).any():
            extra = sorted(set(values[code < 0]))
            raise DataError(
                f"covariate '{column}' has values the model was not trained with: "
                f"{', '.join(extra[:5])}; it knows {', '.join(levels[:8])}"
            )
        codes[column], names[column] = code, levels
    return codes, names


def store_vocab(cells: Cells, data: DataSection, tokenizer: str, train: I64, seed: int) -> Vocab:
    """The vocabulary a new model starts with: the store's genes, or the file the section names.

    A tokenizer that needs corpus medians gets them from the training cells, unless the vocabulary
    file carries its own.
    """
    unit = tokenizer_unit(tokenizer)
    chosen = sample_cells(train, data.statistics_cells, seed)
    if data.vocab == "store":
        var = cells.store.var()
        if data.vocab_genes:
            var = var.iloc[_variable(cells.store, chosen, data.vocab_genes)]
        vocab = Vocab.from_genes(
            var["feature_id"].tolist(), var["feature_name"].tolist(), specials=unit.specials
        )
    else:
        vocab = Vocab.load(data.vocab)
    if unit.needs_medians and vocab.medians is None:
        if data.statistics == "store":
            medians = _stored_medians(cells.store, vocab)
        else:
            mapping = gene_map(cells.store, vocab)
            medians = nonzero_medians(cells.store, chosen, mapping, len(vocab))
        vocab = vocab.with_medians(medians)
    return vocab


def _stored_medians(store: AnyStore, vocab: Vocab) -> npt.NDArray[np.float32]:
    """(G,) non-zero medians as ingest has kept them."""
    if isinstance(store, JoinedStore):
        raise ConfigError(
            "data.statistics = 'store' reads the medians of one store, and data.uri names "
            f"{len(store.stores)}; take 'train', or give a vocabulary file with medians"
        )
    stored = store.nonzero_medians()
    mapping = gene_map(store, vocab)
    medians = np.ones(len(vocab), dtype=np.float32)
    medians[mapping[mapping >= 0]] = stored[mapping >= 0]
    return medians


def sample_cells(train: I64, most: int, seed: int) -> I64:
    """At most ``most`` of the training cells, chosen by keyed draws, ascending."""
    if len(train) <= most:
        return train
    keys = Draw(seed).bits("statistics", train)
    return np.sort(train[np.argpartition(keys, most)[:most]])


def _variable(store: AnyStore, joinids: I64, num_genes: int) -> I64:
    """Rows of var with the most variable genes among the given cells."""
    every = np.arange(store.num_genes, dtype=np.int32)
    moments = None
    for first in range(0, len(joinids), _BLOCK_CELLS):
        block = store.read_block(joinids[first : first + _BLOCK_CELLS], every)
        here = GeneMoments.of_block(block, store.num_genes)
        moments = here if moments is None else moments + here
    assert moments is not None
    return choose_variable(moments, num_genes=num_genes)


def gene_map(store: AnyStore, vocab: Vocab) -> npt.NDArray[np.int32]:
    """(V,) vocabulary index of each gene of the store, -1 where the vocabulary lacks it."""
    var = store.var()
    return vocab.match(var["feature_id"].tolist(), var["feature_name"].tolist())


def check_vocab(data: DataSection, vocab: Vocab, checkpoint: str) -> None:
    """A vocabulary named beside a checkpoint must be the checkpoint's own.

    Raises:
        CheckpointError: they differ; the message says where.
        ConfigError: variable genes are to be chosen although the checkpoint has its genes.
    """
    given = data.vocab
    if data.vocab_genes:
        raise ConfigError(
            f"data.vocab_genes = {data.vocab_genes} chooses the genes of a new vocabulary, but the "
            f"checkpoint '{checkpoint}' brings its own {len(vocab)}; leave the key out"
        )
    if given == "store":
        return
    other = Vocab.load(given)
    vocab = replace(vocab, gene_sets=other.gene_sets)  # those are the model's, not the file's
    if other.fingerprint == vocab.fingerprint:
        return
    common = len(set(other.gene_ids) & set(vocab.gene_ids))
    raise CheckpointError(
        f"the vocabulary '{given}' ({len(other)} genes, {other.fingerprint[:12]}) is not the one "
        f"of checkpoint '{checkpoint}' ({len(vocab)} genes, {vocab.fingerprint[:12]}; {common} "
        "genes in common); leave data.vocab out to use the checkpoint's own"
    )


def total_steps(train: TrainSection, plan: Plan) -> int:
    """Optimizer steps of the run: ``train.steps``, or ``train.epochs`` of the plan."""
    return train.steps or max(1, round(train.epochs * plan.batches_per_epoch))


@dataclass(frozen=True)
class TrainingData:
    """The data side of a training run, ready to be shipped to workers.

    Attributes:
        source: turns joinids into tokens.
        plan: the order of the training cells.
        validation: joinids set apart.
        covariates: name -> categories.
        warnings: what the user should know, e.g. a poor gene match.
        fingerprint: SHA-256 over ids and counts of all selected cells.
        cache: folder of the token cache the run is to use, "" for none.
        timestamp: the moment at which the stores were looked at, ISO 8601.
        mixing: the shuffle quality of the plan, for people.
        cut: how many cells are longer than the tokenizer keeps, for people; "" if none is.
    """

    source: TokenSource
    plan: Plan
    validation: I64
    covariates: Mapping[str, list[str]]
    warnings: list[str] = field(default_factory=list)
    fingerprint: str = ""
    cache: str = ""
    timestamp: str = ""
    mixing: list[str] = field(default_factory=list)
    cut: str = ""


def validation_mask(cells: Cells, data: DataSection) -> npt.NDArray[np.bool_]:
    """(N,) True at validation cells, by stable hash of the cell's id or of ``data.split.by``.

    A cell's side depends on its id (that of ``data.split.by``: on the value) alone: not on other
    cells, the store it lies in, or the order of the stores.
    """
    split = data.split
    if split.validation_fraction == 0:
        return np.zeros(len(cells.obs), dtype=bool)
    if not split.by:
        return np.asarray(key_unit(cells.keys(), salt=split.salt) < split.validation_fraction)
    names = cells.obs[split.by].astype("string").fillna("unknown").tolist()
    return split_by(names, fraction=split.validation_fraction, salt=split.salt)


def make_training_data(
    cells: Cells,
    data: DataSection,
    *,
    batch: BatchSection,
    tokenizer: Section,
    vocab: Vocab,
    train: I64,
    validation: I64,
    seed: int,
    categories: Mapping[str, list[str]] | None = None,
    extra_codes: Mapping[str, I64] | None = None,
    genes_chosen: bool = False,
    refuse_loss: bool = False,
) -> TrainingData:
    """Plan, source and checks for given training and validation cells.

    Args:
        cells: the selection.
        data: the data section.
        batch: the batch section.
        tokenizer: the tokenizer's section.
        vocab: the gene space.
        train: joinids to train on, ascending.
        validation: joinids to validate on, ascending.
        seed: the run's seed.
        categories: covariate categories of a checkpoint.
        extra_codes: further codes aligned with ``cells.obs`` (labels).
        genes_chosen: the vocabulary is a choice of variable genes, so that counts outside it are
            left out on purpose and no warning.
        refuse_loss: less than 60 % of the counts covered is an error, unless the section allows it.

    Raises:
        DataError: no gene in common with the vocabulary, or too few.
        ConfigError: fewer training cells than a global batch.
    """
    mapping = gene_map(cells.store, vocab)
    covered = coverage(cells.store, vocab, joinids=cells.joinids)
    refuse = refuse_loss and not data.allow_gene_loss
    warnings = check_coverage(covered, vocab, refuse=refuse, chosen=genes_chosen)
    unit = tokenizer_unit(str(to_dict(tokenizer)["name"]))
    every = len(vocab) if unit.with_zeros(tokenizer) else 0
    cut = covered.longer_than(unit.max_genes(tokenizer), unit.when_longer, every=every)
    if genes_chosen:
        warnings = []
    codes, names = encode(cells.obs, data.covariates, categories)
    max_tokens = int(getattr(tokenizer, "max_tokens", 2**31))
    lengths = cells.lengths(max_tokens) if data.bucket_by_length else None
    if data.bucket_by_length and lengths is None:
        warnings.append("the store has no obs column 'nnz': batches are not bucketed by length")
    plan = make_plan(cells, data, train=train, lengths=lengths, batch=batch, seed=seed)
    source = TokenSource(
        store=cells.store,
        gene_map=mapping,
        vocab=vocab,
        tokenizer=to_dict(tokenizer),
        joinids=cells.joinids,
        codes={**codes, **(extra_codes or {})},
        seed=seed,
    )
    fingerprint = cells.store.fingerprint(cells.joinids)
    if data.cache:
        key = cache_key(source, cells=cells.joinids, fingerprint=fingerprint)
        check_cache(Path(data.cache).expanduser().resolve(), key)
    return TrainingData(
        source=source,
        plan=plan,
        validation=validation,
        covariates=names,
        warnings=warnings,
        fingerprint=fingerprint,
        cache=data.cache,
        timestamp=cells.timestamp,
        mixing=measure_mixing(plan, _labels(cells, train)).lines(),
        cut=cut,
    )


def _labels(cells: Cells, train: I64) -> dict[str, I64]:
    """Codes of the training cells whose variety in a batch says how well it is mixed."""
    obs = cells.obs.iloc[np.searchsorted(cells.joinids, train)]
    there = [c for c in _MIXING_COLUMNS if c in obs][:_MIXING_SHOWN]
    return {c: pd.factorize(obs[c].astype("string"))[0] + 1 for c in there}


def make_plan(
    cells: Cells,
    data: DataSection,
    *,
    train: I64,
    lengths: I64 | None,
    batch: BatchSection,
    seed: int,
) -> Plan:
    """The order of the training cells: of one store, or of a mixture.

    Args:
        cells: the selection.
        data: the data section.
        train: ids of the training cells, ascending.
        lengths: expected tokens of every selected cell; None leaves batches unbucketed.
        batch: the batch section.
        seed: the run's seed.

    Raises:
        ConfigError: fewer training cells than a global batch, or weights that do not fit the lanes.
    """
    rows = np.searchsorted(cells.joinids, train)
    lanes = data.lanes or default_lanes(batch.cells_global)
    if batch.cells_global % lanes:
        raise ConfigError(
            f"data.lanes = {lanes} does not divide batch.cells_global = {batch.cells_global}; "
            "choose a divisor"
        )
    size = window_batches(
        batch.cells_global, lanes=lanes, run_cells=data.run_cells, window_cells=data.window_cells
    )
    groups = None
    if data.balance_by:
        values = cells.obs[data.balance_by].astype("string").fillna("unknown").iloc[rows]
        groups = pd.factorize(values, sort=True)[0]

    def part(here: npt.NDArray[np.bool_] | slice, lanes_here: int) -> EpochPlan:
        return EpochPlan(
            joinids=train[here],
            lengths=None if lengths is None else lengths[rows[here]].astype(np.int32),
            seed=seed,
            cells_global=batch.cells_global // lanes * lanes_here,
            lanes=lanes_here,
            run_cells=data.run_cells,
            window_batches=size,
            balance=None if groups is None else Balance(groups[here], data.balance_max_repeats),
        )

    if len(data.uris) == 1:
        return part(slice(None), lanes)
    which = stores_of(train)
    counts = np.bincount(which, minlength=len(data.uris))
    empty = [uri for uri, count in zip(data.uris, counts, strict=True) if count == 0]
    if empty:
        raise DataError(
            f"no training cell is selected of {', '.join(empty)}; widen data.obs_filter, or leave "
            "the store out"
        )
    lane_parts = deal_lanes(data.weights or counts.tolist(), lanes)
    dealt = np.bincount(lane_parts, minlength=len(counts))
    parts = tuple(part(which == i, int(n)) for i, n in enumerate(dealt))
    return MixturePlan(parts, lane_parts)


def no_cells(kind: str, run: str) -> ConfigError:
    """The error for a run whose split leaves nothing to train on."""
    return ConfigError(
        f"run '{run}': the split leaves no {kind} cells; lower data.split.validation_fraction or "
        "widen data.obs_filter"
    )
