"""The synthesize job: Ray for :func:`cellray.data.synthetic.synthesize`, and what it prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cellray.data.synthetic import (
    SynthesizeConfig,
    SynthesizeReport,
    refuse_existing,
    synthesize,
)

if TYPE_CHECKING:
    from cellray.runs import SynthesizeRun

__all__ = ["SynthesizeResult", "check_synthesize", "run_synthesize"]

Say = Callable[[str], None]

_BYTES_PER_COUNT = 1.8  # on disk, measured: 66 MB for 20,000 cells at the defaults


@dataclass(frozen=True)
class SynthesizeResult:
    """A finished atlas.

    Attributes:
        report: what was made.
    """

    report: SynthesizeReport

    def lines(self) -> list[str]:
        """What the command line prints."""
        report = self.report
        return [
            f"store: {report.uri} ({report.num_cells} cells x {report.num_genes} genes, "
            f"{report.cells_per_s:.0f} cells/s)",
            f"a cell: {report.genes_per_cell:.0f} genes, {report.counts_per_cell:.0f} counts",
        ]


def check_synthesize(run: SynthesizeRun) -> list[str]:
    """What the atlas will take; writes nothing.

    Raises:
        CellrayError: no uri, or something is there already.
    """
    target = refuse_existing(run)
    lines = [f"store: {target}, {run.num_cells:,} cells x {run.num_genes:,} genes"]
    if not run.library_size:
        size = run.num_cells * run.mean_genes_per_cell * _BYTES_PER_COUNT
        lines.append(f"disk: about {size / 1e6:,.0f} MB")
    return lines


def run_synthesize(run: SynthesizeRun, say: Say) -> SynthesizeResult:
    """Execute the job."""
    if run.workers != 1:
        from cellray.train.trainer import ensure_ray

        ensure_ray()
    keys = SynthesizeConfig.model_fields
    config = SynthesizeConfig.model_validate({key: getattr(run, key) for key in keys})
    return SynthesizeResult(synthesize(config, progress=say))
