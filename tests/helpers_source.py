"""From a data section to a token source and its plan, the way a training run makes them."""

from __future__ import annotations

from cellray.data.config import DataSection
from cellray.data.plan import EpochPlan, default_lanes
from cellray.data.tokens import TokenSource
from cellray.data.vocab import Vocab
from cellray.train.prepare import gene_map, select_cells

SPECIALS = ("<pad>", "<cls>", "<eoc>", "<mask>")


def source_and_plan(
    data: DataSection,
    *,
    cells_global: int = 12,
    vocab: Vocab | None = None,
    tokenizer: str = "bins",
) -> tuple[TokenSource, EpochPlan]:
    """Select cells; the vocabulary is the store's unless one is given."""
    cells = select_cells(data)
    if vocab is None:
        var = cells.store.var()
        vocab = Vocab.from_genes(
            var["feature_id"].tolist(), var["feature_name"].tolist(), specials=SPECIALS
        )
    source = TokenSource(
        store=cells.store,
        gene_map=gene_map(cells.store, vocab),
        vocab=vocab,
        tokenizer={"name": tokenizer, "max_tokens": 30},
        joinids=cells.joinids,
        seed=3,
    )
    plan = EpochPlan(
        joinids=cells.joinids,
        lengths=cells.lengths(30),
        seed=3,
        cells_global=cells_global,
        lanes=default_lanes(cells_global),
        window_batches=3,
    )
    return source, plan
