"""The policy on bad steps."""

import json
import math

import numpy as np
import pytest
import torch

from cellray.core.blocks import TokenBlock
from cellray.core.errors import StoppedError
from cellray.data.collate import collate_tokens
from cellray.train.engine import StepStats
from cellray.train.guard import LossGuard, write_bad_step


def good(loss):
    return StepStats(loss, 4)


BAD = StepStats(math.nan, 4, taken=False, losses=(1.0, math.nan))


def guard(policy="stop", **over):
    return LossGuard(policy, **({"factor": 10.0, "most": 3} | over))


def test_no_limit_before_twenty_losses_then_ten_times_the_median_of_fifty():
    watching = guard()
    for loss in range(19):
        watching.observe(good(1.0 + loss))
    assert watching.limit == math.inf
    watching.observe(good(20.0))
    assert watching.limit == pytest.approx(105.0)
    for _ in range(50):
        watching.observe(good(2.0))
    assert watching.limit == 40.0  # twice the highest of the first twenty
    watching.observe(BAD)  # not taken: not remembered
    assert watching.limit == 40.0
    assert guard(factor=0.0).limit == math.inf


def test_a_model_that_has_learnt_its_cells_is_not_stopped_by_a_hard_one():
    watching = guard()
    for _ in range(20):
        watching.observe(good(2.0))
    for _ in range(50):
        watching.observe(good(0.002))
    assert watching.limit == 4.0  # twice what the untrained model had, not 0.02
    again = guard(state=watching.state())
    assert again.limit == 4.0


def test_a_classifier_that_learns_fast_may_be_as_wrong_as_it_was():
    """A batch of 16 cells, 14 classes: the loss fell from 2.6 to 0.15, one batch had 1.94."""
    watching = guard()
    for step in range(60):
        watching.observe(good(2.6 * 0.95**step))
    assert 1.94 < watching.limit == pytest.approx(5.2)


def test_stop_names_step_loss_and_where_the_cells_are():
    watching = guard()
    watching.observe(BAD)
    with pytest.raises(StoppedError, match=r"step 7: the loss is nan; .* in 'runs/x/bad_steps'"):
        watching.judge(7, BAD, "runs/x/bad_steps")


def test_skip_gives_up_after_too_many_in_a_row_and_counts_anew_after_a_good_one():
    watching = guard("skip")
    for step in range(2):
        watching.observe(BAD)
        watching.judge(step, BAD, "here")
    watching.observe(good(1.0))
    for step in range(2):
        watching.observe(BAD)
        watching.judge(step, BAD, "here")
    watching.observe(BAD)
    with pytest.raises(StoppedError, match=r"bad step number 3 in a row .*max_bad_steps = 3"):
        watching.judge(9, BAD, "here")
    assert watching.bad_steps == 5


def test_an_exploded_loss_and_a_gradient_that_is_no_number_are_told_apart():
    watching = guard()
    for _ in range(20):
        watching.observe(good(1.0))
    with pytest.raises(StoppedError, match=r"the loss exploded: 50, more than 10 "):
        watching.judge(3, StepStats(50.0, 4, taken=False), "here")
    with pytest.raises(StoppedError, match=r"the gradient's norm is inf \(loss 2\)"):
        watching.judge(3, StepStats(2.0, 4, gradient_norm=math.inf, taken=False), "here")


def test_a_run_that_goes_on_remembers():
    first = guard("skip")
    for loss in range(30):
        first.observe(good(float(loss + 1)))
    first.observe(BAD)
    state = json.loads(json.dumps(first.state()))
    second = guard("skip", state=state)
    assert (second.limit, second.bad_steps) == (first.limit, 1)
    second.observe(BAD)
    assert second.state()["bad_in_a_row"] == 2


def test_what_a_rank_saw_is_kept(tmp_path):
    block = TokenBlock(
        joinids=np.array([7, 9]),
        indptr=np.array([0, 1, 3]),
        tokens=np.arange(3, dtype=np.int32),
        values=np.zeros(3, dtype=np.float32),
    )
    batches = [collate_tokens(block.take(np.array([i])), pad=9) for i in (0, 1)]
    where = write_bad_step(
        tmp_path, step=12, epoch=1, rank=3, batches=batches, stats=BAD, lr=torch.pi
    )
    (file,) = where.iterdir()
    assert file.name == "step-00000012-rank-00003.json"
    facts = json.loads(file.read_text())
    assert [m["cell_ids"] for m in facts["micro_batches"]] == [[7], [9]]
    assert facts["micro_batches"][0]["loss_sum"] == 1.0
    assert math.isnan(facts["micro_batches"][1]["loss_sum"])
    assert (facts["step"], facts["epoch"], facts["rank"]) == (12, 1, 3)
