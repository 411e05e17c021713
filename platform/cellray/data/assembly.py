"""From the finished parts of an ingest to a whole store: X, var, obs, groups, ledger, report.

Legend: N cells of a file, V features of a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cellray.data import parts, schema
from cellray.data.existing import library_figures
from cellray.data.ingest_config import IngestConfig
from cellray.data.ingest_report import FileReport, MeasurementReport
from cellray.data.joining import Existing, JoinedGenes, OldVar
from cellray.data.measurements import origin
from cellray.data.parts import Part
from cellray.data.quality import CellFigures, duplicates
from cellray.data.sketch import UNSEEN, Sketch, StoredSketch, merged_shards, noting_medians
from cellray.data.sources import Source
from cellray.data.writer import (
    create_groups,
    measurement_path,
    prepare_x,
    write_histogram,
    write_table,
)

__all__ = ["Assembly", "Channel"]

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass
class Channel:
    """One measurement of an ingest.

    Attributes:
        name: of the measurement.
        old: its features in the store before.
        genes: its features now.
        sources: for each file where it is; None where a file has none.
        joinids: for each file (N,) where its cells go, -1 for those left out.
        parts: for each file its parts.
    """

    name: str
    old: OldVar
    genes: JoinedGenes
    sources: list[Source | None]
    joinids: list[I64] = field(default_factory=list)
    parts: list[list[Part]] = field(default_factory=list)

    def new_features(self, number: int) -> int:
        """How many features file ``number`` (from 0) brought."""
        return self.genes.new[sum(s is not None for s in self.sources[:number])]


@dataclass
class Assembly:
    """All that a new store is made of.

    Attributes:
        config: the ``[ingest]`` table.
        existing: the store before.
        main: for each file its main source.
        channels: the measurements by name, the main one first.
        figures: for each file what was measured of its cells.
        kept: for each file which cells are written.
        dropped: for each file how many cells were left out by which rule.
        contents: for each file the digest of its content.
        folder: of the parts.
        num_cells: cells of the new store.
    """

    config: IngestConfig
    existing: Existing
    main: Sequence[Source]
    channels: dict[str, Channel]
    figures: Sequence[CellFigures]
    kept: Sequence[Bools]
    dropped: Sequence[dict[str, int]]
    contents: Sequence[str]
    folder: Path
    num_cells: int

    def build(self, target: Path, place: Path) -> list[FileReport]:
        """Build the new store at ``place``; the old one at ``target`` is shared, not changed.

        Returns:
            What became of each file.
        """
        for channel in self.channels.values():
            self._x_and_var(channel, target, place)
            parts.give_back()
        obs, others = self._obs()
        copies = duplicates(obs.column(schema.CELL_HASH).to_numpy())
        if self.config.duplicate_cells == "flag":
            obs = obs.append_column(schema.IS_DUPLICATE, pa.array(copies))
        reports = self._reports(copies, others)
        ledger = [*self.existing.ledger, *(asdict(report) for report in reports)]
        library = library_figures(obs, list(self.channels))
        write_table(place / "obs", obs)
        create_groups(
            place,
            ledger,
            measurements=list(self.channels),
            metadata={schema.META_LIBRARY: library},
        )
        return reports

    def _x_and_var(self, channel: Channel, target: Path, place: Path) -> None:
        name, num_genes = channel.name, len(channel.genes.ids)
        shape = (self.num_cells, num_genes)
        append = name in self.existing.var
        x = prepare_x(target, place, shape, measurement=name, append=append)
        gene_cells = np.zeros(num_genes, np.int64)
        gene_cells[: len(channel.old.num_cells)] = channel.old.num_cells
        sketches: list[Sketch | StoredSketch] = [channel.old.sketch]
        for part in (part for own in channel.parts for part in own):
            parts.adopt(self.folder, part, x)
            counts, sketch = parts.sketch_of(self.folder, part)
            gene_cells[: len(counts)] += counts
            sketches.append(sketch)
        medians = np.full(num_genes, UNSEEN, dtype=np.float32)
        write_histogram(place, name, noting_medians(merged_shards(sketches), medians), num_genes)
        var = {
            "feature_id": pa.array(channel.genes.ids, pa.large_string()),
            "feature_name": pa.array(channel.genes.names, pa.large_string()),
            schema.NUM_NONZERO: gene_cells,
            schema.NONZERO_MEDIAN: medians,
        }
        write_table(measurement_path(place, name) / "var", pa.table(var))

    def _obs(self) -> tuple[pa.Table, list[dict[str, MeasurementReport]]]:
        """All cells, and for each file what became of the other measurements."""
        others = [n for n in self.channels if n != schema.MEASUREMENT]
        tables = []
        if self.existing.obs is not None:
            tables.append(self._old_obs(self.existing.obs, others))
        reports = []
        following = self.existing.num_cells
        for number, source in enumerate(self.main):
            own = self._own_columns(number, source)
            told = {}
            for name in others:
                columns, report = self._other(self.channels[name], number, following)
                own |= columns
                if report is not None:
                    told[name] = report
            for column in source.obs.column_names:
                label = column
                while label in own:
                    label += "_source"
                own[label] = _chosen(source.obs.column(column), self.kept[number])
            tables.append(pa.table(own))
            reports.append(told)
            following += int(self.kept[number].sum())
        return schema.unify(tables), reports

    def _old_obs(self, obs: pa.Table, others: Sequence[str]) -> pa.Table:
        if self.config.duplicate_cells == "flag" and schema.IS_DUPLICATE in obs.column_names:
            obs = obs.drop_columns([schema.IS_DUPLICATE])
        for name in others:
            if f"has_{name}" not in obs.column_names:
                absent = _absent(name, len(obs))
                for column, values in absent.items():
                    obs = obs.append_column(column, pa.array(values))
        return obs

    def _own_columns(self, number: int, source: Source) -> dict[str, Any]:
        kept, cells = self.kept[number], self.figures[number]
        count = int(kept.sum())
        measured = len(set(source.genes.feature_ids))
        own: dict[str, Any] = {
            schema.OBS_ID: _chosen(source.cell_ids, kept),
            schema.DATASET_ID: schema.repeated(source.dataset_id, count),
            schema.RAW_SUM: _chosen(pa.array(cells.sums), kept),
            schema.NUM_NONZERO: _chosen(pa.array(cells.nonzero), kept),
            schema.NUM_MEASURED: pa.array(np.full(count, measured, dtype=np.int64)),
            schema.CELL_HASH: _chosen(pa.array(cells.hashes), kept),
        }
        old = self.existing.obs
        if (
            self.config.duplicate_cells == "drop"
            and old is not None
            and schema.IS_DUPLICATE in old.column_names
        ):
            own[schema.IS_DUPLICATE] = pa.array(np.zeros(count, dtype=bool))
        return own

    def _other(
        self, channel: Channel, number: int, first: int
    ) -> tuple[dict[str, Any], MeasurementReport | None]:
        """Columns of obs for the cells of file ``number``, which begin at joinid ``first``."""
        name, source = channel.name, channel.sources[number]
        count = int(self.kept[number].sum())
        columns = _absent(name, count)
        if source is None:
            return {n: pa.array(v) for n, v in columns.items()}, None
        found = [parts.figures(self.folder, part) for part in channel.parts[number]]
        joinids = channel.joinids[number]
        met = joinids >= 0
        rows = joinids[met] - first
        columns[schema.raw_sum(name)][rows] = np.concatenate([f["sums"] for f in found])[met]
        columns[f"{schema.NUM_NONZERO}_{name}"][rows] = np.concatenate(
            [f["nonzero"] for f in found]
        )[met]
        columns[f"has_{name}"][rows] = True
        report = MeasurementReport(
            origin=origin(self.config.measurements[name], source),
            layer=source.layer,
            cells=int(met.sum()),
            cells_absent=count - int(met.sum()),
            cells_left_out=int((~met).sum()),
            features=len(source.genes.feature_ids),
            features_new=channel.new_features(number),
            counts=float(columns[schema.raw_sum(name)].sum()),
        )
        return {n: pa.array(v) for n, v in columns.items()}, report

    def _reports(
        self, copies: Bools, others: Sequence[dict[str, MeasurementReport]]
    ) -> list[FileReport]:
        reports, first = [], self.existing.num_cells
        main = self.channels[schema.MEASUREMENT]
        for number, source in enumerate(self.main):
            kept, cells = self.kept[number], self.figures[number]
            last = first + int(kept.sum())
            dropped = self.dropped[number]
            genes = len(set(source.genes.feature_ids))
            new = main.new_features(number)
            reports.append(
                FileReport(
                    file=source.path,
                    dataset_id=source.dataset_id,
                    layer=source.layer,
                    cells_read=source.num_cells,
                    cells=last - first,
                    cells_dropped=source.num_cells - (last - first),
                    dropped=dropped,
                    duplicates=int(copies[first:last].sum()) + dropped.get("duplicate_cells", 0),
                    genes=genes,
                    genes_new=new,
                    genes_matched=genes - new,
                    genes_ensembl=source.genes.num_ensembl,
                    genes_merged=dict(source.genes.merged),
                    organism=source.genes.organism,
                    counts=float(cells.sums[kept].sum()),
                    counts_lost=float(cells.sums[~kept].sum()),
                    content_sha256=self.contents[number],
                    ids_sha256=source.ids_sha256,
                    measurements=others[number],
                )
            )
            first = last
        return reports


def _chosen(column: Any, kept: Bools) -> Any:
    """The cells of a column that are kept, without a copy if all are."""
    return column if kept.all() else column.filter(pa.array(kept))


def _absent(name: str, count: int) -> dict[str, npt.NDArray[Any]]:
    """Columns of obs for cells that lack a measurement."""
    return {
        schema.raw_sum(name): np.zeros(count),
        f"{schema.NUM_NONZERO}_{name}": np.zeros(count, np.int64),
        f"has_{name}": np.zeros(count, dtype=bool),
    }
