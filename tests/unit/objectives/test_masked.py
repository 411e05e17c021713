"""Masked gene modelling: what is selected, what becomes of it, what the loss counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.blocks import TokenBlock
from cellray.core.draw import Draw
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.collate import collate_tokens
from cellray.data.vocab import Vocab
from cellray.objectives.masked import OBJECTIVE, MaskedConfig

SPECIALS = ("<pad>", "<mask>", "<cls>", "<eos>")


def make_vocab(num_genes: int = 400) -> Vocab:
    ids = [f"G{i}" for i in range(num_genes)]
    return Vocab.from_genes(ids, ids, specials=SPECIALS)


def make_batch(joinids: list[int], lengths: list[int] | None = None) -> CellBatch:
    """Cells of ``<cls>``, random genes, ``<eos>``; a cell's tokens depend on its joinid alone."""
    cells = []
    for joinid, length in zip(joinids, lengths or [300] * len(joinids), strict=True):
        genes = np.random.default_rng(joinid).permutation(400)[:length] + len(SPECIALS)
        cells.append(np.concatenate([[2], genes, [3]]))
    block = TokenBlock(
        joinids=np.array(joinids),
        indptr=np.concatenate([[0], np.cumsum([len(c) for c in cells])]),
        tokens=np.concatenate(cells).astype(np.int32),
        values=np.zeros(sum(len(c) for c in cells), dtype=np.float32),
    )
    return collate_tokens(block, pad=0)


def corrupted(batch: CellBatch, draw: Draw | None = None, **config: float) -> CellBatch:
    objective = OBJECTIVE.build(MaskedConfig(**config), make_vocab())
    return objective.corrupt(batch, draw or Draw(0))


def test_fifteen_percent_are_selected_and_split_80_10_10():
    batch = make_batch(list(range(200)))
    out = corrupted(batch)
    genes = batch.token_ids >= 4
    selected = out.target_mask
    assert abs(selected.sum() / genes.sum() - 0.15) < 0.006
    before, after = batch.token_ids[selected], out.token_ids[selected]
    masked, same = (after == 1).float().mean(), (after == before).float().mean()
    assert abs(masked - 0.8) < 0.015
    assert abs(same - 0.1) < 0.015
    random = after[(after != 1) & (after != before)]
    assert random.min() >= 4
    assert len(random.unique()) > 300
    assert torch.equal(out.token_ids[~selected], batch.token_ids[~selected])
    assert torch.equal(out.targets, batch.token_ids)
    assert out.num_targets == int(selected.sum())


def test_specials_and_padding_are_never_selected():
    batch = make_batch([1, 2], [300, 5])
    out = corrupted(batch, fraction=1.0, mask_fraction=1.0, random_fraction=0.0)
    assert torch.equal(out.target_mask, batch.token_ids >= 4)
    assert (out.token_ids[out.target_mask] == 1).all()


def test_a_cell_is_hidden_alike_in_any_batch_and_padding():
    together = corrupted(make_batch([5, 9, 3], [40, 250, 90]))
    alone = corrupted(make_batch([3], [90]))
    length = alone.token_ids.shape[1]
    assert torch.equal(together.token_ids[2, :length], alone.token_ids[0])
    assert torch.equal(together.target_mask[2, :length], alone.target_mask[0])
    assert not together.target_mask[2, length:].any()


def test_a_gene_is_selected_alike_wherever_it_stands():
    batch = make_batch([4])
    turned = replace(batch, token_ids=batch.token_ids.flip(1))
    assert torch.equal(corrupted(batch).token_ids, corrupted(turned).token_ids.flip(1))


def test_another_epoch_or_seed_hides_other_genes():
    batch = make_batch([4])
    masks = [corrupted(batch, draw).target_mask for draw in (Draw(0), Draw(0, 1), Draw(1))]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_the_batch_given_is_left_as_it_was():
    batch = make_batch([4])
    before = batch.token_ids.clone()
    corrupted(batch)
    assert torch.equal(batch.token_ids, before)
    assert batch.target_mask is None


def output(logits: torch.Tensor) -> ModelOutput:
    zero = torch.zeros(1, 1, 1)
    return ModelOutput(hidden=zero, cell=zero[0], predictions={"token_logits": logits})


def test_loss_is_summed_cross_entropy_in_float32_and_accuracy_counts():
    out = corrupted(make_batch([4, 5]))
    objective = OBJECTIVE.build(MaskedConfig(), make_vocab())
    num = out.num_targets
    targets = out.targets[out.target_mask]
    flat = objective.loss(output(torch.zeros(num, 404, dtype=torch.bfloat16)), out)
    assert flat.total.dtype == torch.float32
    assert flat.num_targets == num
    assert flat.total.item() == pytest.approx(num * np.log(404), rel=1e-5)
    sure = torch.zeros(num, 404)
    sure[torch.arange(num), targets] = 50.0
    sure[0] = 0.0
    sure[0, (targets[0] + 1) % 404] = 50.0
    result = objective.loss(output(sure), out)
    assert result.parts["accuracy"].item() == num - 1
    assert result.total.item() == pytest.approx(50.0, abs=1e-3)


def test_no_target_gives_a_loss_of_zero_with_a_gradient():
    empty = make_batch([4], [1])
    objective = OBJECTIVE.build(MaskedConfig(fraction=1e-9), make_vocab())
    batch = objective.corrupt(empty, Draw(0))
    logits = torch.zeros(0, 404, requires_grad=True)
    loss = objective.loss(output(logits), batch)
    loss.total.backward()
    assert loss.num_targets == 0
    assert loss.total.item() == 0.0


def test_a_model_without_token_logits_is_refused():
    batch = corrupted(make_batch([4]))
    objective = OBJECTIVE.build(MaskedConfig(), make_vocab())
    bare = replace(output(torch.zeros(1)), predictions={})
    with pytest.raises(DataError, match="'masked' reads the prediction 'token_logits'.*gives none"):
        objective.loss(bare, batch)


def test_a_vocabulary_without_mask_is_refused():
    vocab = Vocab.from_genes(["A"], ["A"], specials=("<pad>",))
    with pytest.raises(DataError, match="no special token '<mask>'"):
        OBJECTIVE.build(MaskedConfig(), vocab)


def test_fractions_must_fit():
    raw = {"name": "masked", "mask_fraction": 0.8, "random_fraction": 0.3}
    with pytest.raises(ConfigError, match="add up to more than 1"):
        build_section(MaskedConfig, raw)
