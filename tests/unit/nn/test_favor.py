"""FAVOR+ against its formula written out, against exact attention, and its redraws."""

from __future__ import annotations

import math

import pytest
import torch

import reference_models as reference
from cellray.nn import favor
from cellray.nn.favor import favor_attention, favor_weights, num_features, orthogonal_features
from cellray.nn.performer import Performer, PerformerSpec

SPEC = PerformerSpec(
    width=12, num_layers=2, num_heads=2, head_width=8, ffn_width=20, bias=False, redraw_every=3
)


def heads(t: int = 40, k: int = 16, b: int = 2, h: int = 3, scale: float = 1.0, seed: int = 0):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(b, h, t, k, generator=gen, dtype=torch.float32) * scale for _ in range(3)]


def test_the_number_of_features_is_k_log_k():
    assert num_features(64) == 266
    assert num_features(8) == 16


def test_features_are_orthogonal_in_blocks_and_as_long_as_gaussian_vectors():
    rows = orthogonal_features(266, 64, seed=5)
    assert rows.shape == (266, 64)
    unit = rows / rows.norm(dim=1, keepdim=True)
    for start in (0, 64, 128, 192):
        block = unit[start : start + 64]
        torch.testing.assert_close(block @ block.T, torch.eye(64), atol=1e-5, rtol=0)
    lengths = rows.norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(math.sqrt(64), rel=0.03)
    assert float(lengths.std()) == pytest.approx(math.sqrt(0.5), rel=0.15)  # chi, 64 degrees
    assert torch.equal(rows, orthogonal_features(266, 64, seed=5))
    assert not torch.equal(rows, orthogonal_features(266, 64, seed=6))


@pytest.mark.parametrize("key_max", ["cell", "tensor"])
@pytest.mark.parametrize("size", [1 << 9, 1 << 30])
def test_values_and_gradients_equal_the_formula_however_it_is_sliced(monkeypatch, key_max, size):
    monkeypatch.setitem(favor._SLICE, "cpu", size)
    rows = orthogonal_features(num_features(16), 16, seed=1)
    grads, outs = [], []
    weight = torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(9))
    for run in (
        lambda *x: favor_attention(*x, rows, key_max=key_max),
        lambda *x: reference.favor(*x, rows, key_max),
    ):
        leaves = [x.requires_grad_() for x in heads()]
        outs.append(run(*leaves))
        outs[-1].backward(weight)
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(outs[0], outs[1], atol=2e-6, rtol=1e-5)
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_it_nears_exact_attention_as_features_grow():
    q, k, v = heads(t=60, k=16, scale=0.7)
    want = reference.softmax_attention(q, k, v, None)
    errors = []
    for count in (16, 128, 1024, 8192):
        tries = [favor_attention(q, k, v, orthogonal_features(count, 16, seed=s)) for s in range(4)]
        errors.append(torch.stack([(t - want).square().mean().sqrt() for t in tries]).mean().item())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.25 * errors[0]


def test_the_cell_convention_does_not_see_other_cells_and_the_tensor_one_does():
    q, k, v = heads(scale=2.0)
    k[1] *= 3
    rows = orthogonal_features(44, 16, seed=1)
    for key_max, alike in (("cell", True), ("tensor", False)):
        together = favor_attention(q, k, v, rows, key_max=key_max)[0]
        alone = favor_attention(q[:1], k[:1], v[:1], rows, key_max=key_max)[0]
        assert torch.allclose(together, alone, atol=1e-6) is alike


def test_the_weights_are_the_attention_and_their_rows_sum_to_one():
    q, k, v = heads()
    rows = orthogonal_features(44, 16, seed=1)
    queries, keys = favor_weights(q, k, rows)
    weights = queries @ keys.transpose(-1, -2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 40))
    torch.testing.assert_close(weights @ v, favor_attention(q, k, v, rows), atol=1e-5, rtol=1e-4)


def features_of(model: Performer) -> list[torch.Tensor]:
    return [block.attention.features.clone() for block in model.blocks]


def test_features_are_drawn_anew_after_the_set_number_of_steps():
    torch.manual_seed(0)
    model = Performer(SPEC).train()
    first, x = features_of(model), torch.randn(1, 5, 12)
    for step in (0, 0, 1, 2, 2):  # several passes of a step count once
        model(x, step=step)
        assert torch.equal(features_of(model)[0], first[0])
    model.eval()
    model(x, step=3)
    assert torch.equal(features_of(model)[0], first[0])  # evaluation draws nothing
    model.train()(x, step=3)
    second = features_of(model)
    assert not torch.equal(second[0], first[0])
    assert not torch.equal(second[0], second[1])  # every layer its own
    model(x, step=5)
    assert torch.equal(features_of(model)[0], second[0])


@pytest.mark.parametrize("saved_at", [2, 3, 4])
def test_a_run_that_goes_on_draws_what_the_unbroken_one_draws(saved_at):
    torch.manual_seed(0)
    unbroken = Performer(SPEC).train()
    unbroken.schedule.calls = 1  # of published weights
    x = torch.randn(1, 5, 12)
    for step in range(saved_at):
        unbroken(x, step=step)
    state = {name: value.clone() for name, value in unbroken.state_dict().items()}
    torch.manual_seed(77)
    resumed = Performer(SPEC).train()
    resumed.load_state_dict(state)
    for step in range(saved_at, 12):
        assert torch.equal(unbroken(x, step=step), resumed(x, step=step))
    assert int(resumed.state_dict()["schedule.redraws"]) == 4


def test_a_new_run_from_weights_keeps_their_features_until_its_own_first_draw():
    torch.manual_seed(0)
    before = Performer(SPEC).train()
    x = torch.randn(1, 5, 12)
    for step in range(8):
        before(x, step=step)
    after = Performer(SPEC).train()
    after.load_state_dict(before.state_dict())
    after.schedule.begin_run()
    kept = features_of(before)[0]
    for step in range(3):
        after(x, step=step)
        assert torch.equal(features_of(after)[0], kept)
    after(x, step=3)
    assert not torch.equal(features_of(after)[0], kept)


def test_without_redraws_the_first_features_stay():
    torch.manual_seed(0)
    model = Performer(PerformerSpec(**{**SPEC.__dict__, "redraw_every": 0})).train()
    first = features_of(model)
    for step in range(5):
        model(torch.randn(1, 5, 12), step=step)
    assert torch.equal(features_of(model)[0], first[0])
