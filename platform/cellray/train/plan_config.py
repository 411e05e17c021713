"""The section that says what `cellray plan` counts with."""

from __future__ import annotations

from pydantic import Field

from cellray.core.section import Section

__all__ = ["PlanSection"]


class PlanSection(Section):
    """What a store and a machine will be like that cannot be looked at yet; trains nothing.

    Attributes:
        cells: cells of the selection, those set apart for validation included.
        genes: genes of the vocabulary.
        mean_tokens: mean tokens of a cell, cut at the tokenizer's limit.
        mean_genes: mean genes that a cell has counts of, which is what is read; 0 takes
            ``mean_tokens``.
        hardware: a preset (``cellray.ops.hardware``) or NAME:TFLOPS:GB; "" is asked for on the
            command line, or taken from this machine.
        price_per_gpu_hour: in any currency; 0 gives no cost.
        cells_per_second: measured throughput of one worker; 0 counts operations instead.
        mfu: share of the peak that is assumed to be reached where nothing was measured.
    """

    cells: int = Field(ge=1)
    genes: int = Field(ge=1)
    mean_tokens: float = Field(gt=0)
    mean_genes: float = Field(default=0.0, ge=0)
    hardware: str = ""
    price_per_gpu_hour: float = Field(default=0.0, ge=0)
    cells_per_second: float = Field(default=0.0, ge=0)
    mfu: float = Field(default=0.3, gt=0, le=1)
