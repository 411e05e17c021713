"""The keys that say which cells a model leaves without a label."""

from __future__ import annotations

from pydantic import Field, model_validator

from cellray.core.section import Section

__all__ = ["RefuseSection"]


class RefuseSection(Section):
    """Below which probability a cell gets no label; at most one key, none: as the family does.

    Attributes:
        target_accuracy: the lowest threshold is taken whose kept validation cells are right so
            often.
        target_coverage: the highest threshold is taken that keeps so many of the validation cells.
        below: the threshold itself.
    """

    target_accuracy: float | None = Field(default=None, gt=0, le=1)
    target_coverage: float | None = Field(default=None, gt=0, le=1)
    below: float | None = Field(default=None, ge=0, le=1)

    @property
    def wanted(self) -> dict[str, float]:
        """The key that is given, and its value; {} if none is."""
        keys = ("target_accuracy", "target_coverage", "below")
        return {k: v for k in keys if (v := getattr(self, k)) is not None}

    @model_validator(mode="after")
    def _one_way(self) -> RefuseSection:
        if len(self.wanted) > 1:
            raise ValueError(
                f"task.refuse: give one of target_accuracy, target_coverage and below, not "
                f"{' and '.join(self.wanted)}"
            )
        return self
