"""What is on disk of a sweep's trials: states, reports, and weights taken over from another."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cellray.core.errors import CheckpointError, DataError
from cellray.data.vocab import Vocab
from cellray.runs import build_run
from cellray.train.checkpoint import Manifest, read_checkpoint
from cellray.train.engine import Snapshot
from cellray.train.saving import NOTES, Saver, newest_whole
from cellray.tune.ledger import Ledger
from cellray.tune.schedule import Proposals, scheduler_of
from cellray.tune.space import parse_space
from cellray.tune.table import best_trial, trial_table, write_tables

VOCAB = Vocab.from_genes(["ENSG00000000001", "ENSG00000000002"], ["A", "B"], specials=("<pad>",))
BASE = Manifest(
    family="scgpt",
    model={"family": "scgpt"},
    tokenizer={"name": "bins"},
    objective={"name": "generative"},
    vocab_fingerprint=VOCAB.fingerprint,
    data_fingerprint="d",
)
LOSS = "validation/loss"


def report(ledger, trial, losses, every=2):
    """Rows as a run directory has them, with one between validations."""
    folder = ledger.folder(trial)
    ledger.set_steps(trial, 8)
    rows = [{"step": 1.0, "train/loss": 9.0}]
    rows += [{"step": every * (i + 1.0), LOSS: loss} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def finish(ledger, trial):
    (ledger.folder(trial) / "result.json").write_text("{}")


@pytest.fixture
def ledger(tmp_path):
    """Trial 0 finished, 1 stopped at its second report, 2 failed, 3 under way."""
    made = Ledger(tmp_path / "s" / "trials")
    for trial, lr in enumerate((1e-3, 1e-2, 1e-1, 1e-4)):
        made.note(trial, point={"lr": lr}, seconds=10.0 * trial)
    report(made, 0, [4.0, 2.0, 1.0, 1.5])
    report(made, 1, [4.0, 3.0, 0.1])  # the third came when it had been stopped
    report(made, 3, [5.0])
    finish(made, 0)
    made.stop(1, 4)
    made.note(2, state="failed", error="no such file")
    return made


def sweep(**over):
    raw = {"base": "x.toml", "name": "s", "search": {"lr": {"low": 1e-5, "high": 1.0}}}
    return build_run("tune", raw | over)


def test_states_and_reports(ledger):
    assert ledger.known() == [0, 1, 2, 3]
    states = [ledger.state(t) for t in range(5)]
    assert states == ["finished", "stopped early", "failed", "not finished", "not finished"]
    assert [r.step for r in ledger.reports(0, 2)] == [2, 4, 6, 8]
    assert [r.step for r in ledger.reports(0, 3)] == [6, 8]  # at its steps, and the last
    assert [r.step for r in ledger.reports(1, 2)] == [2, 4]
    assert ledger.value(0, LOSS, "min", every=2, last=False) == 1.0
    assert ledger.value(0, LOSS, "max", every=2, last=False) == 4.0
    assert ledger.value(0, LOSS, "min", every=2, last=True) == 1.5
    assert math.isnan(ledger.value(2, LOSS, "min", every=2, last=False))


def test_a_line_cut_short_is_left_out(ledger):
    file = ledger.folder(3) / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 4, "validation/lo')
    assert [r.step for r in ledger.reports(3, 2)] == [2]


def test_a_damaged_note_is_named_with_its_cure(ledger):
    ledger.note(7, error="", point={"optim.lr": 1.0})
    file = ledger.root / "trial007.json"
    file.write_text(file.read_text()[:-2])
    for read in (ledger.state, ledger.point):
        with pytest.raises(DataError, match="is damaged, no note of a sweep: .* another name"):
            read(7)


def test_the_table_its_files_and_the_best(ledger):
    run = sweep()
    table = trial_table(run, parse_space(run.search), ledger, 2)
    assert table.columns.tolist() == [
        "trial", "lr", LOSS, "reports", "state", "seconds", "error",
    ]  # fmt: skip
    np.testing.assert_array_equal(table[LOSS], [1.0, 3.0, np.nan, 5.0])
    assert table["reports"].tolist() == [4, 2, 0, 1]
    assert table["error"].tolist() == ["", "", "no such file", ""]
    assert best_trial(table, LOSS, "min") == 0
    assert best_trial(table, LOSS, "max") == 3
    assert best_trial(table.iloc[2:3], LOSS, "min") is None
    csv, js = write_tables(run, table, 0, ledger, 2)
    pd.testing.assert_frame_equal(pd.read_csv(csv, keep_default_na=True).iloc[:, :6],
                                  table.iloc[:, :6])  # fmt: skip
    facts = json.loads(js.read_text())
    assert (facts["best"], facts["metric"], facts["mode"]) == (0, LOSS, "min")
    assert facts["trials"][1]["curve"] == [[2, 4.0], [4, 3.0]]
    assert facts["trials"][2][LOSS] is None


def save(run_dir, steps):
    run_dir.mkdir(parents=True, exist_ok=True)

    def commit(name, metrics):
        with open(run_dir / NOTES, "a") as notes:
            notes.write(json.dumps({**metrics, "name": name}) + "\n")

    saver = Saver(run_dir, rank=0, vocab=VOCAB, session="s", commit=commit)
    for step in steps:
        weights = {"w": torch.full((2, 2), float(step))}
        manifest = BASE.at(step, {"epoch": 0, "position": step}, 1, {})
        metrics = {"step": step, LOSS: step / 10}
        snapshot = Snapshot({"w:0:step": torch.tensor(1.0)}, weights)
        saver.save(lambda s=snapshot: s, manifest, metrics, wait=True)


def test_a_trial_takes_over_the_weights_of_another(ledger):
    report(ledger, 3, [5.0, 4.5, 4.4])
    (ledger.folder(3) / "mlflow.json").write_text('{"run_id": "m"}')
    save(ledger.folder(0), [4, 6])
    ledger.take_over(3, 0, "step-00000004-s", {"lr": 0.5})
    folder = ledger.folder(3)
    assert folder.name == "trial003.1"
    whole, _ = newest_whole(folder)
    assert read_checkpoint(whole)[2]["w"].tolist() == [[4.0, 4.0], [4.0, 4.0]]
    rows = ledger.reports(3, 2)
    assert [(r.step, r.metrics[LOSS]) for r in rows] == [(2, 5.0), (4, 0.4)]
    assert ledger.point(3) == {"lr": 0.5}
    assert ledger.changes(3) == [{"step": 4, "from": 0, "point": {"lr": 0.5}}]
    assert json.loads((folder / "mlflow.json").read_text()) == {"run_id": "m"}
    # the donor makes room for newer checkpoints: the newest stands in for one that has gone
    ledger.take_over(3, 0, "step-00000002-s", {"lr": 0.25})
    assert ledger.folder(3).name == "trial003.2"
    assert [c["step"] for c in ledger.changes(3)] == [4, 6]
    with pytest.raises(CheckpointError, match="trial002 in .* has no whole checkpoint to go on"):
        ledger.take_over(3, 2, "x", {"lr": 0.1})


def trial(number):
    return SimpleNamespace(trial_id=f"id{number}", custom_trial_name=f"trial{number:03d}")


def test_asha_goes_on_with_the_rungs_it_had(ledger):
    """A new trial meets the reports of trials that ended before the restart."""
    run = sweep(scheduler="asha")

    def asked(loss, book, last=False):
        scheduler = scheduler_of(run, parse_space(run.search), book, 2)
        scheduler.set_search_properties(LOSS, "min")
        scheduler.on_trial_add(None, trial(7))
        result = {"report": 2, "step": 4, LOSS: loss, "last": last}
        return scheduler.on_trial_result(None, trial(7), result)

    fresh = Ledger(ledger.root.parent / "fresh")
    assert asked(2.9, fresh) == "CONTINUE"  # the first at its rung
    assert asked(2.4, ledger) == "CONTINUE"  # the cut between 2.0 and 3.0 is at 2.5
    assert asked(2.6, ledger, last=True) == "CONTINUE"  # nothing is left to save
    assert ledger.state(7) == "not finished"
    assert asked(2.6, ledger) == "STOP"
    assert ledger.state(7) == "stopped early"
    assert asked(math.nan, fresh) == "STOP"


def test_proposals_give_known_trials_their_values_and_new_ones_new(ledger):
    run = sweep(algorithm="optuna")
    searcher = Proposals(run, parse_space(run.search), ledger, [3, 4], 2)
    assert searcher.suggest("a") == {"point": {"trial": 3, "lr": 1e-4}}
    new = searcher.suggest("b")["point"]
    assert new["trial"] == 4
    assert 1e-5 <= new["lr"] <= 1.0
    assert ledger.point(4) == {"lr": new["lr"]}
    assert searcher.suggest("c") is None


def test_population_based_training_stays_within_the_space():
    run = sweep(scheduler="pbt")
    space = parse_space({"lr": {"low": 0.1, "high": 1.0}, "n": [1, 2]})
    scheduler = scheduler_of(run, space, Ledger.__new__(Ledger), 2)
    config = {"point": {"trial": 5, "lr": 1.0, "n": 2}}
    values = [
        scheduler._get_new_config(trial(1), SimpleNamespace(config=config))[0]["point"]
        for _ in range(60)
    ]
    assert {v["trial"] for v in values} == {5}
    assert all(0.1 <= v["lr"] <= 1.0 and v["n"] in (1, 2) for v in values)
    assert {0.8, 1.0} < {v["lr"] for v in values}  # x 0.8, cut at the bound, and drawn anew
