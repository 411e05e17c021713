"""The encoder block against torch's own post-norm layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cellray.nn.blocks import BlockSpec, Encoder, EncoderBlock

SPEC = BlockSpec(width=16, num_heads=4, ffn_width=24)


def keys() -> torch.Tensor:
    return torch.arange(6) < torch.tensor([6, 4])[:, None]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_block_equals_torch_post_norm_layer(activation):
    torch.manual_seed(0)
    spec = BlockSpec(
        width=16, num_heads=4, ffn_width=24, activation=activation, layer_norm_eps=1e-3
    )
    ours = EncoderBlock(spec).eval()
    theirs = nn.TransformerEncoderLayer(
        16, 4, 24, activation=activation, batch_first=True, layer_norm_eps=1e-3, norm_first=False
    )
    pairs = {
        "self_attn.in_proj_": ours.attention.qkv,
        "self_attn.out_proj.": ours.attention.out,
        "linear1.": ours.expand,
        "linear2.": ours.contract,
        "norm1.": ours.attention_norm,
        "norm2.": ours.ffn_norm,
    }
    state = {f"{k}{n}": getattr(m, n) for k, m in pairs.items() for n in ("weight", "bias")}
    theirs.load_state_dict({name: value.detach() for name, value in state.items()})
    x = torch.randn(2, 6, 16)
    # In train mode (dropout 0) torch takes the plain path, not its inference shortcut.
    theirs.dropout.p = theirs.dropout1.p = theirs.dropout2.p = theirs.self_attn.dropout = 0.0
    want = theirs(x, src_key_padding_mask=~keys())
    torch.testing.assert_close(ours(x, keys())[keys()], want[keys()], atol=1e-6, rtol=0)


def test_an_encoder_can_stop_early():
    torch.manual_seed(0)
    encoder = Encoder(SPEC, num_layers=3).eval()
    x = torch.randn(2, 6, 16)
    by_hand = encoder.blocks[1](encoder.blocks[0](x, keys()), keys())
    torch.testing.assert_close(encoder(x, keys(), num_layers=2), by_hand)
    assert torch.equal(encoder(x, keys(), num_layers=0), x)


def test_probabilities_of_a_layer_are_those_its_input_gives():
    torch.manual_seed(0)
    encoder = Encoder(SPEC, num_layers=3).eval()
    x = torch.randn(2, 6, 16)
    third = encoder.blocks[2].attention.probabilities(encoder(x, keys(), num_layers=2), keys())
    assert torch.equal(encoder.probabilities(x, keys(), layer=-1), third)
    assert torch.equal(encoder.probabilities(x, keys(), layer=2), third)
    with pytest.raises(IndexError):
        encoder.probabilities(x, keys(), layer=3)


def test_every_dropout_rate_is_used():
    for rate in ("dropout", "attention_dropout", "inner_dropout"):
        torch.manual_seed(0)
        block = EncoderBlock(BlockSpec(width=16, num_heads=4, ffn_width=24, **{rate: 0.5}))
        x = torch.randn(2, 6, 16)
        assert not torch.equal(block(x, keys()), block(x, keys())), rate
