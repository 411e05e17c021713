"""The run of a trial: what a sweep may search, what it sets itself, and the best one's file."""

import json

import pytest

from cellray.core.errors import ConfigError
from cellray.core.section import read_toml, to_toml
from cellray.runs import build_run, load_run
from cellray.tune.sweep import check_sweep
from cellray.tune.trial import check_space, ledger_of, read_base, trial_run, write_best

BASE = {
    "name": "fine",
    "seed": 1,
    "register_as": "mine",
    "data": {"uri": "nowhere"},
    "task": {
        "name": "annotation",
        "label": "cell_type",
        "split": {"column": "donor", "test_values": ["d3"], "validation_fraction": 0.2},
    },
    "model": {"family": "scgpt", "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16},
    "train": {"steps": 24, "eval_every_steps": 6},
    "checkpoint": {"keep_last": 1},
}


@pytest.fixture
def sweep(tmp_path):
    base = tmp_path / "base.toml"
    base.write_text(to_toml(BASE))

    def make(search, **over):
        raw = {"name": "s", "base": str(base), "search": search}
        return build_run("tune", raw | {"checkpoint": {"dir": str(tmp_path)}} | over)

    return make


def test_the_run_of_a_trial(sweep, tmp_path):
    run = sweep({"optim.lr": [1e-3], "task.donor_columns": [["a", "b"]]})
    base = read_base(run)
    point = {"optim.lr": 1e-3, "task.donor_columns": ["a", "b"]}
    built = trial_run(run, base, point, tmp_path / "s" / "trials" / "trial002", timestamp="2026")
    assert (built.name, built.checkpoint.dir) == ("trial002", str(tmp_path / "s" / "trials"))
    assert built.optim.lr == 1e-3
    assert built.task.donor_columns == ["a", "b"]
    assert built.register_as == ""
    assert built.checkpoint.every_steps == 6  # it could not go on otherwise
    assert built.checkpoint.keep_last == 1
    assert built.data.timestamp == "2026"
    assert built.tracking.mlflow_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    pbt = sweep({"optim.lr": [1e-3]}, scheduler="pbt")
    built = trial_run(pbt, base, point, tmp_path / "t")
    assert built.checkpoint.keep_last == 4


def test_the_best_file_is_the_base_with_the_best_values(sweep, tmp_path):
    run = sweep({"optim.lr": [1e-3, 2e-3], "model.width": [8, 16]})
    ledger = ledger_of(run)
    ledger.note(1, point={"optim.lr": 2e-3, "model.width": 8})
    path = write_best(run, read_base(run), 1, "Trial 1.")
    best = load_run("finetune", path)
    assert (best.optim.lr, best.model.width) == (2e-3, 8)
    assert (best.name, best.register_as) == ("s-best", "mine")
    assert best.checkpoint.dir == str(tmp_path)
    assert best.checkpoint.every_steps == 0  # what the sweep set for its trials is not in it
    assert best.data.timestamp == ""
    raw = read_toml(path)
    split = raw["task"]["split"]
    assert {k: split[k] for k in BASE["task"]["split"]} == BASE["task"]["split"]
    assert path.read_text().startswith("# Trial 1.\n")


@pytest.mark.parametrize(
    ("search", "text"),
    [
        ({"optim.lrr": [1.0]}, r"unknown key 'optim.lrr'\. Did you mean 'lr'"),
        ({"optim.lr": [1e-3, -1.0]}, "optim.lr = -1.0 is not allowed"),
        ({"optim.lr": {"low": -1.0, "high": 1.0}}, "optim.lr = -1.0 is not allowed"),
        ({"optim.lr.x": [1]}, 'optim.lr = {"x": 1} is not allowed|unknown key'),
        ({"seed.x": [1]}, r"search.seed.x cannot be searched"),
        ({"name.x": [1]}, r"search.name.x cannot be searched"),
        ({"seed": [1, 2]}, "search.seed cannot be searched: trials would be compared on different"),
        ({"task.split.test_values": [["d1"]]}, "cannot be searched: trials would be compared on d"),
        ({"task": [{"name": "annotation"}]}, "search.task cannot be searched"),
        ({"task.query": [["d3"], ["d2"]]}, "cannot be searched: trials would be compared on diff"),
        ({"task.num_genes": [100, 200]}, "cannot be searched: trials would be compared on diff"),
        ({"task.objective.dar_weight": [0.0, 1.0]}, "changes what validation/loss is"),
        ({"checkpoint.dir": ["x"]}, "checkpoint.dir cannot be searched: the sweep gives every"),
        ({"register_as": ["x"]}, "register_as cannot be searched: only the run of best.toml"),
        ({"train.eval_every_steps": [1]}, "cannot be searched: trials are compared at its steps"),
    ],
)
def test_what_cannot_be_searched(sweep, search, text):
    run = sweep(search)
    with pytest.raises(ConfigError, match=text):
        check_space(run, read_base(run))


def test_a_key_below_a_value(sweep):
    run = sweep({"train.steps.x": [1]})
    with pytest.raises(ConfigError, match=r"search.train.steps.x: 'steps' is a value, not a sec"):
        check_space(run, read_base(run))


def test_population_based_training_needs_keys_that_can_change_and_a_whole_population(sweep):
    run = sweep({"model.width": [8, 16]}, scheduler="pbt")
    with pytest.raises(ConfigError, match=r"search.model.width: scheduler = 'pbt' changes values"):
        check_space(run, read_base(run))
    run = sweep({"optim.lr": [1e-3, 1e-2]}, scheduler="pbt", trials=4, concurrent=2)
    with pytest.raises(ConfigError, match=r"trials = 4 needs concurrent = 4 .* concurrent = 2"):
        check_sweep(run)


def test_a_base_that_never_validates(sweep, tmp_path):
    run = sweep({"optim.lr": [1e-3]}, overrides=["train.eval_every_steps=0"])
    with pytest.raises(ConfigError, match="a sweep compares trials at train.eval_every_steps"):
        check_sweep(run)
    gone = run.model_copy(update={"base": str(tmp_path / "basee.toml")})
    with pytest.raises(ConfigError, match=r"no configuration file at .* Did you mean 'base.toml'"):
        read_base(gone)


def test_a_metric_that_validation_does_not_report(sweep, small_store):
    over = {"overrides": [f"data.uri='{small_store}'"]}
    run = sweep({"optim.lr": [1e-3]}, metric="validation/los", **over)
    with pytest.raises(ConfigError) as error:
        check_sweep(run)
    assert str(error.value) == (
        "metric = 'validation/los' is not among what validation reports: validation/loss, "
        "validation/accuracy, validation/macro_f1"
    )
    assert check_sweep(sweep({"optim.lr": [1e-3]}, metric="validation/macro_f1", **over))


def test_the_metric_says_which_way_is_better(sweep):
    for metric, mode in (("loss", "min"), ("accuracy", "max"), ("macro_f1", "max"), ("gep", "min")):
        run = sweep({"optim.lr": [1e-3]}, metric=f"validation/{metric}")
        assert run.mode == mode
        assert sweep({"optim.lr": [1e-3]}, metric=run.metric, mode=mode).mode == mode
        other = {"min": "max", "max": "min"}[mode]
        with pytest.raises(ConfigError, match=f"mode = '{other}' would choose the worst trial"):
            sweep({"optim.lr": [1e-3]}, metric=run.metric, mode=other)


def test_another_sweep_of_the_same_name_is_refused(sweep, tmp_path):
    from cellray.train.rundir import RunDirectory
    from cellray.tune.sweep import _check, _enter

    directory = RunDirectory(str(tmp_path), "s")
    run = sweep({"optim.lr": [1e-3, 2e-3, 5e-3]}, trials=2)
    _enter(run, _check(run), directory)
    more = sweep({"optim.lr": [1e-3, 2e-3, 5e-3]}, trials=3, concurrent=3, time_limit_s=5.0)
    _enter(more, _check(more), directory)  # a sweep may be made longer
    assert json.loads((directory.path / "run.json").read_text())["config"]["base"]["seed"] == 1
    other = sweep({"optim.lr": [1e-4]})
    with pytest.raises(ConfigError, match=r"a run named 's' exists .*search.optim.lr: \[0.001, 0"):
        _enter(other, _check(other), directory)
    changed = sweep({"optim.lr": [1e-3, 2e-3, 5e-3]}, overrides=["train.steps=30"])
    with pytest.raises(ConfigError, match=r"base.train.steps: 24 -> 30"):
        _enter(changed, _check(changed), directory)


@pytest.mark.parametrize("name", ["demo", "demo_optuna", "demo_pbt"])
def test_the_demo_files_name_keys_that_can_be_searched(repository, monkeypatch, name):
    monkeypatch.chdir(repository)
    run = load_run("tune", f"jobs/configs/tune/{name}.toml")
    assert list(check_space(run, read_base(run))) == list(run.search)
