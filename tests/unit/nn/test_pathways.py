"""The pathway projection against the dense masked matrix it stands for."""

from __future__ import annotations

import torch

from cellray.nn.pathways import PathwayBlock, PathwayProjection, attention_rollout

GENES, WIDTH = 40, 6


def members() -> list[tuple[int, ...]]:
    gen = torch.Generator().manual_seed(0)
    drawn = torch.rand(9, GENES, generator=gen) < torch.linspace(0.02, 0.9, 9)[:, None]
    rows = [tuple(torch.nonzero(row).squeeze(-1).tolist()) for row in drawn]
    return [*rows, tuple(range(GENES)), ()]


def dense_of(layer: PathwayProjection) -> torch.Tensor:
    """(P, W, G): the weights with zeros everywhere else."""
    dense = torch.zeros(len(layer.members), WIDTH, GENES)
    start = 0
    for row, genes in enumerate(layer.members):
        dense[row][:, list(genes)] = layer.weight[start : start + len(genes)].T
        start += len(genes)
    return dense


def test_values_equal_the_dense_masked_matrix():
    layer = PathwayProjection(members(), num_genes=GENES, width=WIDTH)
    x = torch.randn(5, GENES)
    want = torch.einsum("bg,pwg->bpw", x, dense_of(layer)) + layer.bias
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_dense_masked_matrix():
    layer = PathwayProjection(members(), num_genes=GENES, width=WIDTH)
    x = torch.randn(5, GENES, requires_grad=True)
    layer(x).square().sum().backward()
    got = [x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    x.grad = layer.weight.grad = layer.bias.grad = None
    (torch.einsum("bg,pwg->bpw", x, dense_of(layer)) + layer.bias).square().sum().backward()
    for one, two in zip(got, [x.grad, layer.weight.grad, layer.bias.grad], strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_it_holds_one_row_a_membership_and_no_dense_mask():
    layer = PathwayProjection(members(), num_genes=GENES, width=WIDTH)
    ones = sum(len(genes) for genes in members())
    assert layer.weight.shape == (ones, WIDTH)
    held = sum(genes.numel() for _, genes, _ in layer._groups)
    assert held <= 1.3 * ones + GENES


def test_a_gene_moves_the_pathways_it_is_in_and_no_others():
    layer = PathwayProjection(members(), num_genes=GENES, width=WIDTH)
    x = torch.randn(1, GENES)
    moved = x.clone()
    moved[0, 7] += 1.0
    changed = (layer(x) != layer(moved)).any(-1)[0]
    assert changed.tolist() == [7 in genes for genes in members()]


def test_rollout_of_one_head_by_hand():
    first = torch.tensor([[0.5, 0.5], [0.0, 1.0]])[None, None]
    second = torch.tensor([[0.0, 1.0], [1.0, 0.0]])[None, None]
    # (A + I) / 2 each; the second times the first
    one = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    two = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    torch.testing.assert_close(attention_rollout([first, second])[0], two @ one)


def test_stochastic_depth_skips_whole_branches_and_keeps_the_mean():
    torch.manual_seed(0)
    block = PathwayBlock(8, num_heads=2, dropout=0.0, drop_path=0.5).train()
    x = torch.randn(1, 3, 8).expand(4000, -1, -1)
    with torch.no_grad():
        out = block(x)
        same = (out == x).all(-1).all(-1)
        assert 0.2 < same.float().mean() < 0.3  # both branches skipped: 1/4
        block.eval()
        assert not (block(x) == x).all()
