"""`cellray plan`: arithmetic of the estimate, its words, and the shipped configurations."""

from __future__ import annotations

import pytest

from cellray.cli import main
from cellray.core.errors import ConfigError
from cellray.core.section import read_toml
from cellray.ops.facts import BYTES_PER_COUNT
from cellray.ops.planner import PlanOptions, estimate, facts_of, options_of, plan_lines, plan_of
from cellray.runs import JOBS, build_run, load_run

BASE = {
    "name": "planned",
    "data": {"uri": "s3://nowhere/store", "lanes": 20, "split": {"validation_fraction": 0.1}},
    "tokenizer": {"max_tokens": 512},
    "model": {"family": "geneformer", "width": 64, "num_layers": 2, "ffn_width": 128},
    "batch": {"cells_global": 100, "cells_micro": 10},
    # 20 lanes of 5 cells: 4 workers get 25 each
    "train": {"epochs": 2.0, "precision": "bf16"},
    "scale": {"workers": 4, "gpus_per_worker": 1.0},
    "checkpoint": {"every_steps": 50, "keep_last": 3},
    "plan": {"cells": 10_000, "genes": 5_000, "mean_tokens": 400.0},
}


def planned(changes: dict | None = None, **options: object):
    raw = {**BASE, **(changes or {})}
    run = build_run("pretrain", raw)
    return plan_of(facts_of(run), options_of(run, PlanOptions(**options)))


def test_steps_and_cells_are_those_of_the_section():
    plan = planned(hardware="h100")
    facts = plan.facts
    assert (facts.train_cells, facts.validation_cells) == (9_000, 1_000)
    assert (facts.batches_per_epoch, facts.steps) == (90, 180)
    assert facts.trained_cells == 18_000
    assert facts.mean_tokens == 400


def test_hours_are_operations_over_the_assumed_rate():
    plan = planned(hardware="h100", mfu=0.2, price=2.0)
    model, per_cell = plan.facts.model, plan.flops / 18_000
    assert per_cell == model.training_flops(plan.facts.lengths, 0.15 * 400)
    seconds = plan.flops / (0.2 * 989e12 * 4)
    assert plan.hours == pytest.approx(seconds / 3600)
    assert plan.worker_hours == pytest.approx(plan.hours * 4)
    assert f"cost: {plan.worker_hours * 2:,.0f} at 2 a GPU-hour" in plan_lines(plan)


def test_all_wait_for_the_worker_with_the_most_lanes():
    even, uneven = planned(hardware="h100"), planned(hardware="h100", workers=8)
    assert uneven.facts.share(8) == 15  # three lanes of 20, the others two
    assert uneven.hours == pytest.approx(even.hours * 15 / 25)
    assert uneven.micro_cells == 10
    told = "\n".join(plan_lines(uneven))
    assert "8 workers share 100 cells a step unevenly: 15 for some" in told
    assert f"{uneven.rate * 8 * 12.5 / 15:,.1f} in all" in told
    assert "unevenly" not in "\n".join(plan_lines(even))
    with pytest.raises(ConfigError, match="21 workers cannot share the plan's 20 lanes"):
        planned(hardware="h100", workers=21)


def test_a_selection_smaller_than_a_step_is_refused():
    with pytest.raises(ConfigError, match=r"plan.cells = 110 leaves 99 cells to train on, fewer"):
        planned({"plan": {**BASE["plan"], "cells": 110}}, hardware="h100")


def test_a_measured_rate_needs_no_operations():
    plan = planned(hardware="a100", cells_per_second=10.0)
    assert plan.hours == pytest.approx(18_000 / 40 / 3600)
    assert "as measured" in "\n".join(plan_lines(plan))


def test_the_section_gives_what_the_command_line_does_not():
    section = {**BASE["plan"], "hardware": "h200", "price_per_gpu_hour": 3.0, "mfu": 0.1}
    plan = planned({"plan": section})
    assert (plan.hardware.name, plan.price) == ("h200", 3.0)
    assert "10 % of 989" in plan.basis
    other = planned({"plan": section}, hardware="a100", workers=10, price=1.0)
    assert (other.hardware.name, other.workers, other.price) == ("a100", 10, 1.0)
    assert other.hours == pytest.approx(plan.hours * 989 / 312 * 10 / 25)


def test_disk_and_reads():
    plan = planned(hardware="h100")
    values = plan.num_parameters
    assert plan.checkpoint_bytes == 12 * values
    # 4 saves in 180 steps of which 3 stay, and the exported model
    assert plan.kept_bytes == 3 * 12 * values + 4 * values
    assert plan.read_bytes == pytest.approx(18_000 * 400 * BYTES_PER_COUNT)
    cached = planned({"data": {**BASE["data"], "cache": "cache"}}, hardware="h100")
    assert cached.read_bytes == pytest.approx(10_000 * 400 * BYTES_PER_COUNT + 18_000 * 400 * 4)
    deep = {**BASE["plan"], "mean_genes": 4_000}
    assert planned({"plan": deep}, hardware="h100").read_bytes == 10 * plan.read_bytes


def test_memory_is_of_the_longest_cells_and_marks_the_run():
    plan = planned({"engine": {"name": "deepspeed", "zero_stage": 2}}, hardware="h100")
    assert plan.chosen.name == "ZeRO 2"
    peaks = {stage.name: stage.peak for stage in plan.stages}
    assert peaks["torch"] > peaks["ZeRO 1"] >= peaks["ZeRO 2, optimizer on the host"]
    assert all(stage.recomputed <= stage.peak for stage in plan.stages)
    fewer = planned({"batch": {**BASE["batch"], "tokens_micro": 2048}}, hardware="h100")
    assert fewer.micro_cells == 4
    own = planned({"engine": {"zero_stage": 1, "offload": "optimizer"}}, hardware="h100")
    assert own.chosen.name == "ZeRO 1, optimizer on the host"
    assert own.chosen.host > 0


def test_what_does_not_fit_is_said():
    lines = "\n".join(plan_lines(planned(hardware="toy:100:0.05")))
    assert "does not fit" in lines
    assert "fits" not in "\n".join(plan_lines(planned(hardware="cpu")))


def test_short_steps_are_doubted():
    assert "kernel launches" in "\n".join(plan_lines(planned(hardware="h100")))
    measured = plan_lines(planned(hardware="h100", cells_per_second=5.0))
    assert "kernel launches" not in "\n".join(measured)


def test_scgpt_counts_the_second_pass_from_its_step_on():
    model = {"family": "scgpt", "width": 64, "num_layers": 2, "ffn_width": 64}
    late = {"name": "generative", "cell_prompt_after_steps": 10_000}
    half = {"name": "generative", "cell_prompt_after_steps": 90}
    never, some = (
        planned({"model": model, "objective": o}, hardware="h100").flops for o in (late, half)
    )
    assert 1.4 < some / never < 1.5


def test_a_precision_that_the_hardware_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"v100 has no bf16 peak.*fp32"):
        planned(hardware="v100")
    assert planned({"train": {"epochs": 1.0}}, hardware="v100").hours > 0


def test_the_store_is_read_where_there_is_no_section(small_store):
    raw = {
        **{k: v for k, v in BASE.items() if k != "plan"},
        "data": {"uri": small_store, "split": {"validation_fraction": 0.1}},
        "batch": {"cells_global": 16, "cells_micro": 8},
        "train": {"steps": 5, "precision": "bf16"},
        "tracking": {"enabled": False},
    }
    run = build_run("pretrain", raw)
    facts = facts_of(run)
    assert facts.train_cells + facts.validation_cells == 240
    assert facts.scale.gpus_per_worker == 1.0  # planned for GPUs on a machine that has none
    assert len(facts.lengths) == facts.train_cells
    assert facts.mean_genes == pytest.approx(facts.mean_tokens, rel=0.01)
    assert facts.bytes_per_cell > 0
    lines = "\n".join(estimate(run, PlanOptions(hardware="a100")))
    assert f"figures: store {small_store}" in lines
    assert "shuffle:" in lines


def test_a_check_opens_the_store_and_wants_the_gpus(small_store):
    import torch

    here = {"uri": small_store, "split": {"validation_fraction": 0.1}}
    raw = {**BASE, "data": here, "batch": {"cells_global": 16}, "tracking": {"enabled": False}}
    run = build_run("pretrain", {**raw, "scale": {"workers": 2}})
    assert f"figures: store {small_store}" in estimate(run)  # whatever [plan] says
    if not torch.backends.cuda.is_built():
        with pytest.raises(ConfigError, match="CPU build"):
            estimate(build_run("pretrain", raw))


CONFIGS = {
    "geneformer_27m_1x8": (8, 513_864 * 160 // 144, 10_289_236),
    "geneformer_27m_4x8": (32, 513_864, 10_289_236),
    "scgpt_33m_1x8": (8, 385_554, 51_330_049),
    "scgpt_33m_4x8": (32, 385_554, 51_330_049),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shipped_runs_can_be_planned(name, repository, capsys):
    workers, steps, values = CONFIGS[name]
    file = repository / "jobs" / "configs" / "pretrain" / f"{name}.toml"
    assert main(["plan", str(file), "--price", "2.5"]) == 0
    told = capsys.readouterr().out
    run = load_run("pretrain", file)
    plan = plan_of(facts_of(run), options_of(run, PlanOptions()))
    assert plan.workers == workers
    assert plan.num_parameters == values
    assert plan.facts.steps == pytest.approx(steps, abs=3)
    assert plan.fits(plan.chosen.peak)
    for line in (
        "the store was not opened",
        f"hardware: {workers} x h100",
        "cost: ",
        "<- this run",
    ):
        assert line in told


def test_every_configuration_can_be_parsed(repository):
    files = sorted((repository / "jobs" / "configs").rglob("*.toml"))
    parsed = [f for f in files if f.parent.name in JOBS and "include" not in read_toml(f)]
    for file in parsed:
        if file.parent.name == "ingest" and "ingest" not in read_toml(file):
            continue  # quality rules, read by another file
        load_run(file.parent.name, file)
    assert len(parsed) > 15


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "h20O"], "Did you mean 'h200'"),
        (["--mfu", "1.5"], "--mfu 1.5: give a number above 0 and at most 1"),
        (["--gpus", "-1"], "--gpus -1"),
        (["plan.cells=0"], "plan.cells"),
        (["plan.cels=5"], "plan.cels"),
    ],
)
def test_wrong_words(words, message, repository, capsys):
    file = repository / "jobs" / "configs" / "pretrain" / "scgpt_33m_1x8.toml"
    assert main(["plan", str(file), *words]) == 1
    assert message in capsys.readouterr().err


def test_no_file_is_an_error(capsys):
    assert main(["plan"]) == 1
    assert "plan FILE.toml" in capsys.readouterr().err
