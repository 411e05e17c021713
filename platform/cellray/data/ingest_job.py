"""The ingest job: a run around :func:`cellray.data.ingest.ingest`, with what it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cellray.core.errors import DataError
from cellray.data.ingest import IngestConfig, IngestReport, ingest, look_all
from cellray.data.locate import local_target, refuse_missing

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
        return self.report.lines()


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def check_ingest(run: IngestRun) -> list[str]:
    """Open every file and check its genes and first counts; writes nothing.

    Raises:
        CellrayError: a file that cannot be used.
    """
    config = run.ingest
    assert isinstance(config, IngestConfig)
    target = local_target(config.uri)
    if target is not None and target.exists() and not config.append:
        raise DataError(
            f"there is a store at '{target}' and ingest.append = false; choose another uri or "
            "remove it"
        )
    if target is not None and target.exists() and not (target.is_dir() and _empty(target)):
        refuse_missing(target)
    files = look_all(config)
    mains = [looked["RNA"] for looked in files]
    cells = sum(f.num_cells for f in mains if f is not None)
    return [f"files: {len(files)} with {cells} cells", f"store: {config.uri}"]


def run_ingest(run: IngestRun, say: Say) -> IngestResult:
    """Execute the job."""
    config = run.ingest
    assert isinstance(config, IngestConfig)
    return IngestResult(ingest(config, progress=say))
