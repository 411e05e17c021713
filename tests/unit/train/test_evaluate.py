"""Validation: batches that only keep step with other ranks count nothing."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from cellray.core.batch import CellBatch
from cellray.objectives.base import Loss
from cellray.train.engine import evaluate_batches


@dataclass
class _SumOfValues:
    def corrupt(self, batch, draw):
        return batch

    def loss(self, output, batch):
        total = output.sum()
        return Loss(total, len(batch), {"twice": 2 * total})


class _Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.calls = 0

    def forward(self, batch):
        self.calls += 1
        return self.factor * batch.values


def cells(*values):
    shown = torch.tensor(values)[:, None]
    return CellBatch(
        cell_ids=torch.arange(len(values)),
        token_ids=torch.zeros_like(shown, dtype=torch.int64),
        values=shown,
        attention_mask=torch.ones_like(shown, dtype=torch.bool),
        covariates={},
    )


@pytest.mark.parametrize(("counted", "loss", "targets"), [(None, 8.0, 3), (2, 8.0, 3), (1, 3.0, 2)])
def test_only_the_first_batches_count(counted, loss, targets):
    module = _Double()
    batches = [cells(1.0, 2.0), cells(9.0)]
    stats = evaluate_batches(module, _SumOfValues(), batches, precision="fp32", counted=counted)
    assert (stats.loss, stats.num_targets, dict(stats.parts)) == (
        loss,
        targets,
        {"twice": 2 * loss},
    )
    assert module.calls == 2


def test_nothing_counts_and_the_names_stay():
    stats = evaluate_batches(
        _Double(), _SumOfValues(), [cells(float("nan"))], precision="fp32", counted=0
    )
    assert (stats.loss, stats.num_targets, dict(stats.parts)) == (0.0, 0, {"twice": 0.0})
