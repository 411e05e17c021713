"""Variable-length kernels and FlexAttention on a GPU against plain attention; torch only.

Tolerance: 2e-2 absolute in bfloat16 (values and gradients of unit scale).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellray.core.packing import Packing
from cellray.nn.attention import attend
from cellray.nn.favor import favor_attention, orthogonal_features

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: needs a GPU")


def packed(hidden: bool):
    generator = torch.Generator().manual_seed(0)
    lengths = np.array([700, 33, 1, 512, 90])
    packing = Packing.of(lengths).to("cuda")
    q, k, v = (
        torch.randn(int(lengths.sum()), 8, 64, generator=generator).cuda().bfloat16()
        for _ in range(3)
    )
    unknown = (torch.rand(int(lengths.sum()), generator=generator) < 0.5).cuda()
    return q, k, v, packing, unknown if hidden else None


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
def test_the_kernels_of_a_gpu_give_the_numbers_of_the_plain_ones(kernel, hidden):
    q, k, v, packing, unknown = packed(hidden)
    results = []
    for which, dtype in ((kernel, torch.bfloat16), ("sdpa", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, packing, unknown, kernel=which)
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for one, two in zip(*results, strict=True):
        scale = max(1.0, float(two.abs().max()))
        torch.testing.assert_close(one.float(), two.float(), atol=2e-2 * scale, rtol=2e-2)


def test_favor_on_a_gpu_equals_favor_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 8, 3000, 64, generator=generator) for _ in range(3))
    rows = orthogonal_features(266, 64, seed=1)
    want = favor_attention(q, k, v, rows)
    got = favor_attention(q.cuda(), k.cuda(), v.cuda(), rows.cuda()).cpu()
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
