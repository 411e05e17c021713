"""Recomputed and compiled blocks: the same numbers, less kept."""

import pytest
import torch

from cellray.nn.blocks import BlockSpec, Encoder
from cellray.nn.performer import Performer, PerformerSpec
from cellray.nn.recompute import compile_blocks, recompute_blocks
from cellray.train.sizing import saved_bytes


def encoder(dropout=0.0):
    torch.manual_seed(0)
    return Encoder(BlockSpec(width=16, num_heads=2, ffn_width=32, dropout=dropout), num_layers=3)


def gradients(model, forward):
    torch.manual_seed(1)
    with saved_bytes(model) as kept:
        out = forward(model)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()], kept.bytes


def run_encoder(model):
    hidden = torch.linspace(-1, 1, 2 * 40 * 16).view(2, 40, 16).requires_grad_()
    return model(hidden, torch.ones(2, 40, dtype=torch.bool))


def run_performer(model):
    return model(torch.linspace(-1, 1, 2 * 40 * 16).view(2, 40, 16).requires_grad_(), step=3)


def performer(dropout):
    torch.manual_seed(0)
    spec = PerformerSpec(
        width=16, num_layers=3, num_heads=2, head_width=8, ffn_width=32, bias=True,
        dropout=dropout, redraw_every=2,
    )  # fmt: skip
    return Performer(spec)


@pytest.mark.parametrize(("make", "forward"), [(encoder, run_encoder), (performer, run_performer)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_give_the_same_gradients_and_keep_less(make, forward, dropout):
    plain = gradients(make(dropout), forward)
    model = make(dropout)
    names = list(model.state_dict())
    assert recompute_blocks(model) == 3
    assert list(model.state_dict()) == names
    anew = gradients(model, forward)
    assert torch.equal(anew[0], plain[0])
    for one, other in zip(anew[1], plain[1], strict=True):
        assert torch.equal(one, other)
    assert anew[2] < 0.4 * plain[2]


def test_nothing_is_computed_twice_without_gradients():
    model = encoder()
    recompute_blocks(model)
    with torch.no_grad():
        out = run_encoder(model)
    assert torch.equal(out, run_encoder(encoder().eval()))


@pytest.mark.slow
# torch.compile looks at .grad of tensors between blocks, and hides its own warning but from us
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_give_the_same_numbers():
    plain = gradients(encoder(), run_encoder)
    model = encoder()
    assert compile_blocks(model) == 3
    compiled = gradients(model, run_encoder)
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(compiled[1], plain[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
