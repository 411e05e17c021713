"""scGPT: the published size, the generative mask seen from outside, and its predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cellray.core.batch import CellBatch
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model
from cellray.models.scgpt import FAMILY, Scgpt, ScgptConfig

SPECIALS = ("<pad>", "<cls>", "<eoc>")


def make_vocab(num_tokens: int) -> Vocab:
    """Genes first and specials after them, as in the published vocabulary."""
    num_genes = num_tokens - len(SPECIALS)
    return Vocab(
        gene_ids=tuple(f"G{i}" for i in range(num_genes)),
        symbols=("",) * num_genes,
        gene_tokens=np.arange(num_genes, dtype=np.int32),
        specials={name: num_genes + i for i, name in enumerate(SPECIALS)},
    )


def make_model(
    covariates: dict[str, int] | None = None, num_tokens: int = 33, **config: object
) -> Scgpt:
    torch.manual_seed(0)
    sizes = {"width": 16, "num_layers": 2, "num_heads": 4, "ffn_width": 24, **config}
    context = BuildContext(make_vocab(num_tokens), covariates=covariates or {})
    model = FAMILY.build(ScgptConfig(**sizes), context)
    assert isinstance(model, Scgpt)
    return model.eval()


CLS, PAD = 31, 30
UNKNOWN = [2, 4]  # columns of the first cell; the others of 0..5 are known, column 0 is <cls>


def make_batch() -> CellBatch:
    tokens = torch.tensor([[CLS, 4, 7, 9, 11, 20], [CLS, 3, 8, PAD, PAD, PAD]])
    values = torch.tensor([[-2.0, 5, 0, 40, 0, 7], [-2.0, 9, 0, 0, 0, 0]])
    unknown = torch.zeros(2, 6, dtype=torch.bool)
    unknown[0, UNKNOWN] = True
    unknown[1, 2] = True
    return CellBatch(
        cell_ids=torch.arange(2),
        token_ids=tokens,
        values=values,
        attention_mask=tokens != PAD,
        targets=values,
        target_mask=unknown,
        unknown_mask=unknown,
    )


def test_parameter_count_of_the_published_model():
    with torch.device("meta"):
        model = FAMILY.build(ScgptConfig(), BuildContext(make_vocab(60_697)))
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_children()
        if list(module.parameters())
    }
    assert sizes == {
        "genes": 31_077_888,
        "values": 264_704,
        "flag": 1_024,
        "encoder": 18_935_808,
        "expression": 525_825,
        "expression_from_cell": 524_800,
    }
    assert sum(sizes.values()) == 51_330_049


def moved_by(model: Scgpt, batch: CellBatch, *, column: int, what: str) -> list[int]:
    """Columns of cell 0 whose hidden state changes when one token's value or gene changes."""
    changed = getattr(batch, what).clone()
    changed[0, column] += 1
    before = model(batch).hidden
    after = model(replace(batch, **{what: changed})).hidden
    assert torch.equal(before[1, :3], after[1, :3]), "another cell moved"
    moved = (before - after)[0].abs().amax(-1) > 1e-6
    return moved.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("column", range(6))
def test_the_generative_mask_seen_by_perturbing_one_token(num_layers, column):
    """Known tokens reach everybody, unknown ones only themselves, at any depth."""
    model, batch = make_model(num_layers=num_layers), make_batch()
    unknown = column in UNKNOWN
    # The value of an unknown token reaches nobody; its gene reaches itself alone.
    want = [] if unknown else list(range(6))
    assert moved_by(model, batch, column=column, what="values") == want
    want = [column] if unknown else list(range(6))
    assert moved_by(model, batch, column=column, what="token_ids") == want


def test_without_unknown_tokens_everybody_attends_to_everybody():
    model = make_model(num_layers=1)
    batch = replace(make_batch(), unknown_mask=None, target_mask=None, targets=None)
    for column in range(6):
        assert moved_by(model, batch, column=column, what="values") == list(range(6))


def test_the_order_of_genes_carries_nothing():
    model, batch = make_model(), make_batch()
    order = torch.tensor([0, 5, 2, 1, 4, 3])
    one = replace(batch, **{k: getattr(batch, k)[:1] for k in BATCH_FIELDS})
    turned = replace(one, **{k: getattr(one, k)[:, order] for k in BATCH_FIELDS if k != "cell_ids"})
    torch.testing.assert_close(model(turned).cell, model(one).cell, atol=1e-6, rtol=0)


BATCH_FIELDS = (
    "cell_ids",
    "token_ids",
    "values",
    "attention_mask",
    "targets",
    "target_mask",
    "unknown_mask",
)


def test_predictions_follow_the_target_mask_in_row_major_order():
    model, batch = make_model(), make_batch()
    out = model(batch)
    where = batch.target_mask
    assert set(out.predictions) == {"expression", "expression_from_cell"}
    torch.testing.assert_close(out.predictions["expression"], model.expression(out.hidden)[where])
    genes = model.genes(batch.token_ids[where])
    cells = out.cell[torch.tensor([0, 0, 1])]
    torch.testing.assert_close(
        out.predictions["expression_from_cell"], model.expression_from_cell(genes, cells)
    )
    assert torch.equal(out.cell, out.hidden[:, 0])


def test_the_cell_prompt_is_a_second_pass_with_the_detached_cell_at_cls():
    model, batch = make_model(), make_batch()
    out = model(replace(batch, cell_prompt=True))
    genes = model.genes(batch.token_ids)
    embedded = model._embed(batch, genes)
    embedded[:, 0] = out.cell
    second = model.encoder(embedded, batch.attention_mask, batch.unknown_mask)
    want = model.expression(second)[batch.target_mask]
    torch.testing.assert_close(out.predictions["expression_cell_prompt"], want)
    out.predictions["expression_cell_prompt"].sum().backward()
    # <cls> enters the second pass only through the detached cell.
    assert model.genes.table.weight.grad[CLS].abs().max() == 0


def test_inference_needs_no_masks_and_predicts_every_gene_from_the_cell():
    model, batch = make_model(), make_batch()
    bare = replace(batch, targets=None, target_mask=None, unknown_mask=None)
    out = model(bare)
    assert out.predictions == {}
    assert torch.equal(model.embed_cells(batch), out.cell)
    predicted = model.predict_expression(batch)
    assert predicted.shape == (2, 30)
    genes = model.embed_genes()
    for cell in range(2):
        row = model.expression_from_cell(genes, out.cell[cell].expand(30, -1))
        torch.testing.assert_close(predicted[cell], row, atol=1e-5, rtol=1e-5)


def test_chunks_of_genes_make_no_difference(monkeypatch):
    model, batch = make_model(), make_batch()
    whole = model.predict_expression(batch)
    monkeypatch.setattr("cellray.models.scgpt._GENES_PER_CHUNK", 7)
    torch.testing.assert_close(model.predict_expression(batch), whole, atol=1e-6, rtol=0)


def test_gene_embeddings_are_the_normed_table_in_vocabulary_order():
    model = make_model()
    torch.testing.assert_close(model.embed_genes(), model.genes.norm(model.genes.table.weight[:30]))


def test_gen_out_proj_changes_unknown_tokens_only():
    fixed, compat = make_model(num_layers=1), make_model(num_layers=1, gen_out_proj=False)
    batch = make_batch()
    moved = (fixed(batch).hidden - compat(batch).hidden).abs().amax(-1) > 1e-6
    assert torch.equal(moved & batch.attention_mask, batch.unknown_mask)


def test_a_condition_moves_its_cell_and_an_unknown_condition_does_not():
    model = make_model({"batch": 3}, conditions=["batch"])
    batch = make_batch()

    def cells(*codes: int) -> torch.Tensor:
        return model(replace(batch, covariates={"batch": torch.tensor(codes)})).cell

    base = cells(-1, -1)
    assert not torch.allclose(cells(0, -1)[0], base[0])
    assert torch.equal(cells(0, -1)[1], base[1])
    assert not torch.allclose(cells(0, -1)[0], cells(2, -1)[0])
    model.conditions = torch.nn.ModuleDict()
    assert torch.equal(model(batch).cell, base)


def test_a_condition_must_be_a_covariate():
    with pytest.raises(ConfigError, match=r"model.conditions = 'bacth'.*Did you mean 'batch'"):
        make_model({"batch": 3}, conditions=["bacth"])
    model = make_model({"batch": 3}, conditions=["batch"])
    with pytest.raises(DataError, match=r"the batch carries \[\]; add 'batch' to data.covariates"):
        model(make_batch())


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(ConfigError, match="width = 10 is not a multiple of num_heads = 4"):
        build_section(ScgptConfig, {"family": "scgpt", "width": 10, "num_heads": 4})


def test_the_classifier_has_two_normed_layers():
    config = ScgptConfig(width=16, num_layers=1, num_heads=4, ffn_width=24)
    model = build_model("scgpt", config, BuildContext(make_vocab(33)), num_classes=5)
    kinds = [type(m).__name__ for m in model.head.layers]
    assert kinds == ["Linear", "ReLU", "LayerNorm"] * 2 + ["Linear"]
    assert model(make_batch()).predictions["class_logits"].shape == (2, 5)


def test_modality_tokens_move_the_genes_of_their_modality_only():
    kinds = ["ADT" if gene in (4, 9) else "RNA" for gene in range(30)]
    vocab = make_vocab(33).with_modalities(kinds)
    config = ScgptConfig(width=16, num_layers=1, num_heads=2, ffn_width=16, modality_tokens=True)
    torch.manual_seed(0)
    model = FAMILY.build(config, BuildContext(vocab)).eval()
    batch = make_batch()
    before = model._embed(batch, model.genes(batch.token_ids))
    with torch.no_grad():
        model.modalities.table.weight[0] += 1.0  # ADT, first by name
    moved = (model._embed(batch, model.genes(batch.token_ids)) != before).any(-1)
    assert torch.equal(moved, (batch.token_ids == 4) | (batch.token_ids == 9))
    assert Vocab.from_dict(vocab.to_dict()).modalities == tuple(kinds)
    with pytest.raises(ConfigError, match="does not say what its genes were measured by"):
        FAMILY.build(config, BuildContext(make_vocab(33)))
    with pytest.raises(DataError, match="2 modalities given for 30 genes"):
        vocab.with_modalities(["RNA", "ADT"])
