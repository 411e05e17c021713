"""Running statistics of batch norms are those of all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from cellray.testing import run_distributed
from cellray.train.statistics import share_statistics


def seen(rank: int) -> nn.Module:
    """Three norms: seen by both ranks (3 and 1 times), by rank 1 only, by none."""
    module = nn.Sequential(*(nn.BatchNorm1d(4, affine=False) for _ in range(3))).train()
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3 if rank == 0 else 1):
        module[0](torch.randn(8, 4, generator=generator) + rank)
    if rank == 1:
        module[1](torch.randn(8, 4, generator=generator) * 3 + 5)
    return module


def shared() -> dict[str, torch.Tensor]:
    module = seen(dist.get_rank())
    share_statistics(module)
    share_statistics(module)  # once more changes nothing
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_every_rank_gets_the_mean_weighted_by_what_each_has_seen():
    one, two = run_distributed(shared, world=2)
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (dict(seen(rank).state_dict()) for rank in (0, 1))
    for part in ("running_mean", "running_var"):
        want = (3 * first[f"0.{part}"] + second[f"0.{part}"]) / 4
        torch.testing.assert_close(one[f"0.{part}"], want)
        torch.testing.assert_close(one[f"1.{part}"], second[f"1.{part}"])
        assert torch.equal(one[f"2.{part}"], first[f"2.{part}"])
    assert int(one["0.num_batches_tracked"]) == 2
    assert int(one["1.num_batches_tracked"]) == 1
    alone = seen(0)
    before = {name: value.clone() for name, value in alone.state_dict().items()}
    share_statistics(alone)  # without a process group nothing happens
    assert all(torch.equal(before[name], value) for name, value in alone.state_dict().items())
