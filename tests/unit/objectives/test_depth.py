"""Read-depth-aware pretraining: the draw's distribution, what is hidden, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cellray.core._thinning import thin
from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.collate import collate_tokens
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.objectives.depth import OBJECTIVE, Depth, _Cells
from cellray.testing import random_block

GENES, SEED = 60, 4


def vocab() -> Vocab:
    ids = [f"G{i}" for i in range(GENES)]
    return Vocab.from_genes(ids, ids, specials=tokenizer_unit("depth").specials)


def objective(**keys: float) -> Depth:
    config = build_section(OBJECTIVE.config, {"name": "depth", **keys})
    made = OBJECTIVE.build(config, vocab())
    assert isinstance(made, Depth)
    return made


def batch_of(num_cells: int, genes: int = 25, seed: int = 0) -> tuple[CellBatch, np.ndarray]:
    """Cells and their raw counts (N, G); counts of some 80 a gene."""
    block = random_block(num_cells, num_genes=GENES, genes_per_cell=genes, seed=seed)
    counts = np.ceil(block.counts * 25)
    block = type(block)(**{**block.__dict__, "counts": counts.astype(np.float32)})
    dense = np.zeros((num_cells, GENES))
    dense[np.repeat(np.arange(num_cells), genes), block.genes] = counts
    tokens = make_tokenizer({"name": "depth"}, vocab())(block, Draw(0))
    return collate_tokens(tokens, pad=0), dense


def dense_values(batch: CellBatch, values: torch.Tensor) -> np.ndarray:
    """(N, G) of values at gene tokens; specials stand before the genes."""
    dense = np.zeros((len(batch), GENES))
    real = batch.attention_mask & (batch.token_ids >= 3)
    rows = batch.token_rows()[real].numpy()
    dense[rows, batch.token_ids[real].numpy() - 3] = values[real].numpy()
    return dense


def test_binomial_draws_have_their_distribution():
    rng = np.random.default_rng(0)
    for n, p in ((7, 0.3), (40, 0.8), (1500, 0.55), (3, 1.0), (5, 0.0)):
        size = 20_000
        kept = thin(
            np.full(size, n), np.full(size, p), rng.integers(0, 2**64, size, dtype=np.uint64)
        )
        assert kept.min() >= 0
        assert kept.max() <= n
        if p in (0.0, 1.0):
            assert set(kept) == {int(n * p)}
            continue
        edges = np.unique(stats.binom.ppf(np.linspace(0, 1, 9), n, p))
        probabilities = np.diff(stats.binom.cdf(edges, n, p), prepend=0.0)
        probabilities = np.append(probabilities, 1 - probabilities.sum())
        found = np.bincount(np.searchsorted(edges, kept), minlength=len(edges) + 1)
        keep = probabilities > 1e-6
        chi = stats.chisquare(found[keep], probabilities[keep] / probabilities[keep].sum() * size)
        assert chi.pvalue > 1e-3, (n, p)


def test_the_depth_is_lowered_for_half_of_the_cells_by_a_beta_share():
    batch, counts = batch_of(4000)
    made = objective()
    cells = _Cells.of(batch, made.is_gene)
    _, totals, after = made.lower_depth(cells, Draw(SEED))
    np.testing.assert_array_equal(totals, counts.sum(1))  # counts come back exactly
    lowered = after < totals
    assert stats.binomtest(int(lowered.sum()), 4000, 0.5).pvalue > 1e-3
    shares = (after / totals)[lowered]
    assert stats.kstest(shares, stats.beta(2, 2).cdf).pvalue > 1e-3


def test_shallow_cells_stay_as_they_are():
    batch, counts = batch_of(300)
    border = float(np.median(counts.sum(1)))
    made = objective(thin_probability=1.0, min_counts=border)
    cells = _Cells.of(batch, made.is_gene)
    _, totals, after = made.lower_depth(cells, Draw(SEED))
    assert ((after < totals) == (totals > border)).mean() > 0.99
    assert (after[totals <= border] == totals[totals <= border]).all()


def test_inputs_are_normalised_at_the_new_depth_and_targets_at_the_old_one():
    batch, counts = batch_of(50)
    made = objective(thin_probability=1.0, min_counts=0.0, mask_fraction=0.0, random_fraction=0.0)
    got = made.corrupt(batch, Draw(SEED))
    cells = _Cells.of(batch, made.is_gene)
    _, totals, after = made.lower_depth(cells, Draw(SEED))
    raw = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    np.testing.assert_allclose(dense_values(got, got.targets), raw, atol=2e-4)
    inputs = dense_values(got, got.values)
    kept = np.expm1(inputs) * after[:, None] / 1e4
    np.testing.assert_allclose(kept, np.rint(kept), atol=2e-2)  # whole counts again
    assert (np.rint(kept) <= counts).all()
    for name, want in (("<T>", totals), ("<S>", after)):
        here = got.token_ids == vocab().special(name)
        np.testing.assert_allclose(got.values[here], np.log10(want), rtol=1e-5)


def test_thirty_percent_of_values_and_three_percent_of_zeros_are_chosen():
    batch, counts = batch_of(3000)
    got = objective(thin_probability=0.0).corrupt(batch, Draw(SEED))
    chosen = dense_values(got, got.target_mask.float()) > 0
    expressed = counts > 0
    for where, rate in ((expressed, 0.3), (~expressed, 0.03)):
        hits = int(chosen[where].sum())
        assert stats.binomtest(hits, int(where.sum()), rate).pvalue > 1e-3
    hidden = dense_values(got, got.unknown_mask.float()) > 0
    assert not hidden[~chosen].any()
    share = int(hidden[chosen].sum())
    assert stats.binomtest(share, int(chosen.sum()), 0.8).pvalue > 1e-3
    assert (got.values[got.unknown_mask] == 0).all()
    raw = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    values = dense_values(got, got.values)
    changed = chosen & ~hidden & (np.abs(values - raw) > 1e-3)
    # a tenth gets the value of a gene of the cell (now and then its own)
    assert 0.07 < changed.sum() / chosen.sum() < 0.11
    for row, column in zip(*np.nonzero(changed), strict=True):
        assert np.abs(raw[row] - values[row, column]).min() < 1e-3


def test_a_cell_is_treated_alike_in_any_company():
    batch, _ = batch_of(12)
    made = objective()
    together = made.corrupt(batch, Draw(SEED))
    for row in (0, 5, 11):
        one = CellBatch(
            cell_ids=batch.cell_ids[[row]],
            token_ids=batch.token_ids[[row]],
            values=batch.values[[row]],
            attention_mask=batch.attention_mask[[row]],
        )
        alone = made.corrupt(one, Draw(SEED))
        length = alone.token_ids.shape[1]
        for name in ("token_ids", "values", "targets", "target_mask", "unknown_mask"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[row, :length]), name
    other = made.corrupt(batch, Draw(SEED, epoch=1))
    assert other.num_targets != together.num_targets or not torch.equal(
        other.token_ids, together.token_ids
    )


def test_the_loss_is_the_squared_error_at_the_chosen_genes():
    batch, _ = batch_of(4)
    made = objective()
    got = made.corrupt(batch, Draw(SEED))
    targets = got.targets[got.target_mask]
    output = ModelOutput(torch.zeros(1), torch.zeros(1), {"expression": targets + 0.5})
    loss = made.loss(output, got)
    assert loss.num_targets == got.num_targets
    assert loss.total.item() == pytest.approx(0.25 * got.num_targets, rel=1e-5)
    expressed = int((targets > 0).sum())
    assert loss.parts["expressed"].item() == pytest.approx(0.25 * expressed, rel=1e-5)


def test_what_it_needs_is_said():
    made = objective()
    batch, _ = batch_of(2)
    with pytest.raises(DataError, match="objective 'depth' reads the prediction 'expression'"):
        made.loss(ModelOutput(torch.zeros(1), torch.zeros(1)), made.corrupt(batch, Draw(0)))
    with pytest.raises(ConfigError, match="add up to more than 1"):
        objective(mask_fraction=0.9, random_fraction=0.2)
    plain = Vocab.from_genes(["A"], ["A"], specials=("<pad>",))
    with pytest.raises(DataError, match="no special token '<T>'"):
        OBJECTIVE.build(OBJECTIVE.config(), plain)


def test_genes_that_the_tokenizer_cut_are_no_zeros():
    block = random_block(40, num_genes=GENES, genes_per_cell=50, seed=3)
    tokens = make_tokenizer({"name": "depth", "max_tokens": 22}, vocab())(block, Draw(0))
    batch = collate_tokens(tokens, pad=0)
    got = objective(zero_fraction=1.0, thin_probability=0.0).corrupt(batch, Draw(SEED))
    assert np.diff(tokens.indptr).tolist() == [22] * 40
    assert got.token_ids.shape == batch.token_ids.shape  # no zero joined
    assert (got.targets[got.target_mask] > 0).all()


def test_tokens_of_bulk_samples_are_refused():
    with pytest.raises(ConfigError, match="tokenizer.bulk = true is for embedding"):
        OBJECTIVE.check(OBJECTIVE.config(), {"name": "depth", "bulk": True})
