"""The ``[reference]`` and ``[query]`` tables of the mapping job."""

from __future__ import annotations

from pydantic import model_validator

from cellray.core.section import Section
from cellray.data.config import DataSection

__all__ = ["QuerySection", "ReferenceSection"]


class ReferenceSection(Section):
    """What queries are mapped onto.

    Attributes:
        folder: where the embedded reference is kept: made if it is missing, used again if it was
            made of the same cells by the same model, else refused.
        label: obs column whose values are transferred; cells without one are left out.
        data: the labelled cells; may be left out once the folder is there.
        columns: further obs columns to keep beside the embedding.
        donor_columns: obs columns that name donors; those there are are kept, and a query that
            has donors of the reference is warned of.
    """

    folder: str
    label: str = "cell_type"
    data: DataSection | None = None
    columns: list[str] = []
    donor_columns: list[str] = ["donor_id", "donor", "patient", "individual", "subject"]


class QuerySection(Section):
    """The cells to label: those of a store, or of one h5ad file, which is read into memory.

    Attributes:
        data: cells of a store.
        h5ad: an h5ad file with raw counts.
        layer: its layer with raw counts; "" takes ``X``.
        label: obs column with the truth, if there is one: scores are told then; "" takes
            ``reference.label``.
    """

    data: DataSection | None = None
    h5ad: str = ""
    layer: str = ""
    label: str = ""

    @model_validator(mode="after")
    def _one_origin(self) -> QuerySection:
        if bool(self.h5ad) == (self.data is not None):
            raise ValueError(
                "give either [query.data] (a store) or query.h5ad (a file), not "
                f"{'both' if self.h5ad else 'neither'}"
            )
        if self.layer and not self.h5ad:
            raise ValueError("query.layer goes with query.h5ad; a store's is query.data.layer")
        return self
