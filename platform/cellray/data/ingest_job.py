"""The ingest job: a run around :func:`cellray.data.ingest.ingest`, with what it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cellray.core.errors import DataError
from cellray.data import sources
from cellray.data.ingest import IngestConfig, IngestReport, ingest
from cellray.data.locate import local_path

if TYPE_CHECKING:
    from cellray.runs import IngestRun

__all__ = ["IngestResult", "check_ingest", "run_ingest"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class IngestResult:
    """A finished ingest.

    Attributes:
        report: what was read and written.
    """

    report: IngestReport

    def lines(self) -> list[str]:
        """What the command line prints."""
        report = self.report
        told = [
            f"{f.file}: {f.cells} cells x {f.genes} genes from {f.layer} as dataset "
            f"'{f.dataset_id}', {f.genes_new} genes new to the store"
            + (f", {f.cells_dropped} cells left out" if f.cells_dropped else "")
            for f in report.files
        ]
        return [
            *told,
            f"store: {report.uri} ({report.num_cells} cells x {report.num_genes} genes, "
            f"{report.cells_per_s:.0f} cells/s)",
        ]


def check_ingest(run: IngestRun) -> list[str]:
    """Open every file and check its genes and first counts; writes nothing.

    Raises:
        CellrayError: a file that cannot be used.
    """
    config = run.ingest
    assert isinstance(config, IngestConfig)
    target = local_path(config.uri)
    if target is not None and target.exists() and not config.append:
        raise DataError(
            f"there is a store at '{target}' and ingest.append = false; choose another uri or "
            "remove it"
        )
    names = sources.list_files(config)
    given = config.dataset_ids or [""] * len(names)
    files = [sources.look(config, n, dataset_id=d) for n, d in zip(names, given, strict=True)]
    cells = sum(f.num_cells for f in files)
    return [f"files: {len(files)} with {cells} cells", f"store: {config.uri}"]


def run_ingest(run: IngestRun, say: Say) -> IngestResult:
    """Execute the job."""
    config = run.ingest
    assert isinstance(config, IngestConfig)
    return IngestResult(ingest(config, progress=say))
