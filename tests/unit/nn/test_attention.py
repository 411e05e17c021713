"""Attention against its definition with dense masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cellray.core.errors import ConfigError
from cellray.core.packing import Packing
from cellray.nn.attention import (
    SelfAttention,
    attend,
    attention_probabilities,
    generative_attention,
    padded_attention,
)
from cellray.nn.varlen import varlen_packed, varlen_serves


def make(b: int = 3, h: int = 2, t: int = 7, k: int = 8, dtype: torch.dtype = torch.float32):
    gen = torch.Generator().manual_seed(0)
    q, k_, v = (torch.randn(b, h, t, k, generator=gen).to(dtype) for _ in range(3))
    keys = torch.arange(t) < torch.tensor([t, t - 2, 3])[:, None]
    unknown = torch.zeros(b, t, dtype=torch.bool)
    unknown[0, [2, 5]] = True
    unknown[1, 4] = True
    return q, k_, v, keys, unknown


def dense(q, k, v, allowed_BTT):
    logits = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(~allowed_BTT[:, None], -math.inf)
    return torch.softmax(logits, -1) @ v.double()


def generative_mask(keys, unknown):
    """Known keys for everybody; an unknown query sees itself, too."""
    itself = torch.eye(keys.shape[1], dtype=torch.bool) & unknown[:, :, None]
    return (keys & ~unknown)[:, None, :] | itself


def test_padded_attention_is_softmax_over_real_tokens():
    q, k, v, keys, _ = make()
    want = dense(q, k, v, keys[:, None, :].expand(-1, 7, -1))
    torch.testing.assert_close(padded_attention(q, k, v, keys).double(), want, atol=1e-6, rtol=0)


def test_generative_attention_equals_the_dense_mask():
    q, k, v, keys, unknown = make()
    want = dense(q, k, v, generative_mask(keys, unknown))
    got = generative_attention(q, k, v, keys, unknown)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


def test_generative_gradients_equal_those_of_the_dense_mask():
    q, k, v, keys, unknown = make()
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    grads = []
    for run in (
        lambda *x: generative_attention(*x, keys, unknown),
        lambda *x: dense(*x, generative_mask(keys, unknown)),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        (run(*leaves) * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_generative_attention_is_as_exact_in_bfloat16_as_a_dense_mask():
    q, k, v, keys, unknown = make(t=60, k=32, dtype=torch.bfloat16)
    q = q * 3  # large logits, where a rounded self logit would show
    unknown[:, 1::3] = True
    unknown &= keys
    mask = generative_mask(keys, unknown)
    want = dense(q, k, v, mask)
    same_type = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    real = keys[:, None, :, None].expand_as(q)
    error = (generative_attention(q, k, v, keys, unknown) - want)[real].abs().mean()
    assert error < 1.5 * (same_type - want)[real].abs().mean()


def test_a_lone_unknown_token_attends_to_itself():
    q, k, v = (x[:, :, :1] for x in make()[:3])
    keys = torch.ones(3, 1, dtype=torch.bool)
    torch.testing.assert_close(generative_attention(q, k, v, keys, keys), v)


def test_huge_logits_do_not_leak_into_known_queries():
    """The virtual key of a known query has weight 0 even where real logits are very negative."""
    q, k, v, keys, unknown = make()
    q, k = q * 20, k * 20
    want = dense(q, k, v, generative_mask(keys, unknown))
    got = generative_attention(q, k, v, keys, unknown)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)


def test_probabilities_sum_to_one_at_real_tokens_and_are_zero_at_padding():
    q, k, v, keys, _ = make()
    weights = attention_probabilities(q, k, keys)
    assert weights.shape == (3, 2, 7, 7)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), keys[:, None].expand(-1, 2, -1).float())
    assert (weights.masked_select(~keys[:, None, None, :]) == 0).all()
    mixed = padded_attention(q, k, v, keys)
    real = keys[:, None, :, None]
    torch.testing.assert_close(weights @ v * real, mixed * real, atol=1e-6, rtol=0)


def test_self_attention_equals_torch_multi_head_attention():
    torch.manual_seed(0)
    ours = SelfAttention(16, num_heads=4, dropout=0.0).eval()
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True).eval()
    state = {
        "in_proj_weight": ours.qkv.weight,
        "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.out.weight,
        "out_proj.bias": ours.out.bias,
    }
    theirs.load_state_dict({name: value.detach() for name, value in state.items()})
    x, keys = torch.randn(3, 7, 16), make()[3]
    want, _ = theirs(x, x, x, key_padding_mask=~keys, need_weights=False)
    torch.testing.assert_close(ours(x, keys)[keys], want[keys], atol=1e-6, rtol=0)


def test_the_output_projection_can_be_skipped_at_unknown_tokens():
    torch.manual_seed(0)
    fixed = SelfAttention(16, num_heads=2, dropout=0.0).eval()
    compat = SelfAttention(16, num_heads=2, dropout=0.0, project_unknown=False).eval()
    compat.load_state_dict(fixed.state_dict())
    _, _, _, keys, unknown = make()
    x = torch.randn(3, 7, 16)
    a, b = fixed(x, keys, unknown), compat(x, keys, unknown)
    torch.testing.assert_close(a[~unknown], b[~unknown])
    torch.testing.assert_close(fixed.out(b[unknown]), a[unknown], atol=1e-6, rtol=1e-5)


def test_dropout_works_in_training_only():
    torch.manual_seed(0)
    layer = SelfAttention(16, num_heads=2, dropout=0.5)
    _, _, _, keys, unknown = make()
    x = torch.randn(3, 7, 16)
    assert not torch.equal(layer(x, keys, unknown), layer(x, keys, unknown))
    layer.eval()
    assert torch.equal(layer(x, keys, unknown), layer(x, keys, unknown))


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(AssertionError, match="width 10 is not a multiple of 4 heads"):
        SelfAttention(10, num_heads=4, dropout=0.0)


def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, dropout):
    """What a variable-length kernel computes, cell by cell; the real ones need a GPU."""
    parts = []
    for cell in range(len(cu_q) - 1):
        qs = slice(int(cu_q[cell]), int(cu_q[cell + 1]))
        ks = slice(int(cu_k[cell]), int(cu_k[cell + 1]))
        assert qs.stop - qs.start <= max_q
        assert ks.stop - ks.start <= max_k
        logits = torch.einsum("qhd,khd->hqk", q[qs], k[ks]) * scale
        parts.append(torch.einsum("hqk,khd->qhd", torch.softmax(logits, -1), v[ks]))
    return torch.cat(parts)


def packed(seed: int = 0, lengths: tuple[int, ...] = (5, 1, 9, 4)):
    gen = torch.Generator().manual_seed(seed)
    packing = Packing.of(np.array(lengths))
    q, k, v = (torch.randn(sum(lengths), 2, 8, generator=gen) for _ in range(3))
    unknown = torch.rand(sum(lengths), generator=gen) < 0.4
    unknown[-4:] = True  # a cell of which nothing is known
    return q, k, v, packing, unknown


def dense_packed(q, k, v, packing, unknown):
    rows = packing.rows
    allowed = rows[:, None] == rows[None]
    if unknown is not None:
        allowed &= ~unknown[None] | torch.eye(len(rows), dtype=torch.bool)
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return dense(*heads, allowed[None])[0].transpose(0, 1)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("path", ["sdpa", "auto", "flex", "varlen"])
def test_every_path_over_packed_cells_gives_the_numbers_of_the_dense_mask(path, hidden):
    q, k, v, packing, unknown = packed()
    unknown = unknown if hidden else None
    want = dense_packed(q, k, v, packing, unknown)
    if path == "varlen":
        got = varlen_packed(q, k, v, packing, unknown, kernel=plain_varlen)
    else:
        got = attend(q, k, v, packing, unknown, kernel=path)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("lengths", [(130, 1, 90, 64), (40, 30, 50, 41)])
def test_long_and_short_packed_cells_on_a_cpu_have_the_numbers_and_gradients_of_the_dense_mask(
    lengths, hidden
):
    q, k, v, packing, unknown = packed(lengths=lengths)
    unknown[packing.starts[1] : packing.starts[2]] = True
    unknown = unknown if hidden else None
    grads = []
    for run in (attend, dense_packed):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = run(*leaves, packing, unknown)
        out.float().square().sum().backward()
        grads.append([out.float(), *(x.grad for x in leaves)])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_dropout_of_long_packed_cells_is_drawn():
    q, k, v, packing, unknown = packed(lengths=(130, 90))
    torch.manual_seed(0)
    bare, dropped = (attend(q, k, v, packing, unknown, dropout=rate) for rate in (0.0, 0.5))
    assert bool(torch.isfinite(dropped).all())
    assert not torch.allclose(bare, dropped)


def test_gradients_of_the_varlen_form_are_those_of_the_dense_mask():
    q, k, v, packing, unknown = packed()
    grads = []
    for run in (
        lambda *x: varlen_packed(*x, packing, unknown, kernel=plain_varlen),
        lambda *x: dense_packed(*x, packing, unknown),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        run(*leaves).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_kernels_that_do_not_serve_here_say_so():
    q, k, v, packing, _ = packed()
    with pytest.raises(ConfigError, match="'varlen' needs a GPU.*here: cpu.*take 'auto'"):
        attend(q, k, v, packing, kernel="varlen")
    with pytest.raises(ConfigError, match="'flex' has no dropout"):
        attend(q, k, v, packing, kernel="flex", dropout=0.1)
    assert not varlen_serves(torch.device("cpu"), torch.bfloat16, 0.0)
    assert not varlen_serves(torch.device("cuda"), torch.float32, 0.0)
