"""Every configuration file that is shipped is one that its job takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellray.core.section import to_dict
from cellray.runs import JOBS, load_run
from cellray.tasks.base import task

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"
FILES = sorted(CONFIGS.glob("*/*.toml"))


def test_the_folders_are_jobs() -> None:
    assert {path.parent.name for path in FILES} <= set(JOBS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_it_is_a_valid_run(path: Path) -> None:
    run = load_run(path.parent.name, path)
    assert run.name
    if path.parent.name == "finetune":
        assert task(to_dict(run)["task"]["name"]).needs


def test_a_recipe_of_each_task_that_is_trained_is_shipped() -> None:
    named = {
        to_dict(load_run("finetune", path))["task"]["name"]
        for path in FILES
        if path.parent.name == "finetune"
    }
    assert {"annotation", "integration", "label_transfer"} <= named
