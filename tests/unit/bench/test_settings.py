"""What the rows of one table share: cells, splits, digests, names; without Ray and training."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from cellray.baselines.base import annotate_with, baseline
from cellray.bench.conclude import _unshown
from cellray.bench.config import MethodSection
from cellray.bench.entries import entries_of, finetune_run, left_out
from cellray.bench.genes import gene_rows, genes_known, vocabulary_of
from cellray.bench.record import kept_answer, kept_file, log_kept, read_rows, record, record_failure
from cellray.bench.setting import Parent, open_setting
from cellray.bench.suite import _check_alike, _conclude, _to_do, benchmark, check_benchmark
from cellray.bench.work import _embedded, answer_of, tuning_budget
from cellray.core.errors import CheckpointError, ConfigError, DataError
from cellray.core.section import read_toml, to_toml
from cellray.data.ingest import IngestConfig, ingest
from cellray.runs import build_run
from cellray.train.finetune import prepare_finetune
from cellray.train.rundir import RunDirectory
from cellray.train.tracking import Tracker
from helpers_cells import known_cells

TASK = {
    "name": "annotation",
    "label": "cell_type",
    "split": {"column": "donor", "test_values": ["d3"], "validation_fraction": 0.2},
}


def method_file(folder, **over):
    raw = {
        "name": "row",
        "data": {"uri": "elsewhere"},
        "task": {"name": "annotation", "split": {"test_fraction": 0.2}},
        "model": {"family": "scgpt", "width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16},
        "tokenizer": {"max_tokens": 32},
        "train": {"steps": 2},
        "batch": {"cells_global": 12, "cells_micro": 12},
        "engine": {"name": "torch"},
    }
    file = folder / "method.toml"
    file.write_text(to_toml(raw | over))
    return str(file)


def bench(uri, folder, **over):
    raw = {
        "name": "bench",
        "seeds": [0, 1],
        "task": TASK,
        "data": {"uri": uri},
        "checkpoint": {"dir": str(folder)},
        "tracking": {"enabled": False},
    }
    return build_run("benchmark", raw | over)


def test_one_data_set_or_several_are_the_same_thing(small_store, tmp_path):
    alone = bench(small_store, tmp_path)
    named = bench(
        small_store, tmp_path, data=None, task=None,
        datasets={"store": {"data": {"uri": small_store}, "task": TASK}},
    )  # fmt: skip
    assert list(alone.datasets) == ["store"]
    assert alone.model_dump() == named.model_dump()
    shared = bench(small_store, tmp_path, datasets={"a": {}, "b": {"task": {"batch": "donor"}}})
    assert shared.datasets["a"].task.batch == ""
    assert shared.datasets["b"].task.batch == "donor"
    assert shared.datasets["b"].data.uri == small_store


def test_every_method_trains_on_the_cells_of_the_baselines(small_store, tmp_path):
    data = {"uri": small_store, "held_out": ["d2"], "held_out_by": "donor"}
    run = bench(small_store, tmp_path, data=data, methods={"m": method_file(tmp_path)})
    setting = open_setting(run, "store")
    entry = next(e for e in entries_of(setting) if e.name == "m")
    for seed in run.seeds:
        prepared = prepare_finetune(finetune_run(setting, entry, seed))
        part = setting.part(seed)
        for name in ("train", "validation", "test"):
            ours = getattr(prepared.split, name)
            np.testing.assert_array_equal(ours, getattr(part.split, name))
    donors = setting.column("donor", setting.part(0).split.train)
    assert set(donors) == {"d0", "d1"}


def test_seeds_choose_other_validation_cells_and_the_same_test_cells(small_store, tmp_path):
    setting = open_setting(bench(small_store, tmp_path), "store")
    first, second = setting.part(0), setting.part(1)
    np.testing.assert_array_equal(first.split.test, second.split.test)
    assert first.split.validation.tolist() != second.split.validation.tolist()


def test_the_digest_of_a_data_set_knows_its_labels(small_store, tmp_path):
    by_type = open_setting(bench(small_store, tmp_path), "store")
    again = open_setting(bench(small_store, tmp_path), "store")
    other = open_setting(bench(small_store, tmp_path, task={**TASK, "label": "donor",
        "split": {"test_fraction": 0.3}}), "store")  # fmt: skip
    assert by_type.content_sha256 == again.content_sha256
    assert by_type.content_sha256 != other.content_sha256


def test_baselines_that_need_batches_are_left_out_with_a_word(small_store, tmp_path):
    names = ["majority", "logistic", "knn", "hvg", "harmony"]
    split = {"test_fraction": 0.3}
    run = bench(small_store, tmp_path, baselines=names, task={**TASK, "split": split})
    setting = open_setting(run, "store")
    assert [e.name for e in entries_of(setting)] == names[:-1]
    assert "baseline 'harmony' is left out: it corrects batches" in left_out(setting)[0]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"bootstrap_draws": 1}, "bootstrap_draws = 1 gives no interval"),
        ({"methods": {"my method": "x.toml"}}, "'my method' cannot be the name of a method"),
        ({"datasets": {"a/b": {}}}, "'a/b' cannot be the name of a data set"),
        ({"data": None}, r"a benchmark needs cells and a task: give \[data\] and \[task\]"),
        ({"methods": {"m": {"config": "a.toml", "model": "b"}}}, "used frozen.*, not both"),
        ({"task": {**TASK, "lable": "x"}}, "Did you mean 'label'"),
    ],
)
def test_bad_configurations_are_refused_in_words(small_store, tmp_path, over, message):
    with pytest.raises(ConfigError, match=message):
        bench(small_store, tmp_path, **over)


def test_two_tasks_are_two_benchmarks(small_store, tmp_path):
    embedding = {"name": "embedding", "label": "cell_type"}
    tables = {"a": {"data": {"uri": small_store}, "task": TASK}}
    tables["b"] = {"data": {"uri": small_store}, "task": embedding}
    with pytest.raises(ConfigError, match=r"different tasks \(a: annotation, b: embedding\)"):
        bench(small_store, tmp_path, data=None, task=None, datasets=tables)


def test_missing_checkpoints_files_and_seeds_given_twice_are_found_first(small_store, tmp_path):
    run = bench(small_store, tmp_path, methods={"m": {"model": str(tmp_path / "nowhere")}})
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        check_benchmark(run)
    run = bench(small_store, tmp_path, methods={"m": str(tmp_path / "nowhere.toml")})
    with pytest.raises(ConfigError, match=r"no configuration file at '.*nowhere.toml'"):
        check_benchmark(run)
    with pytest.raises(ConfigError, match=r"seeds = \[3, 3\] holds one twice"):
        check_benchmark(bench(small_store, tmp_path, seeds=[3, 3]))
    with pytest.raises(DataError, match="'celltype': obs has no such column"):
        check_benchmark(bench(small_store, tmp_path, task={**TASK, "label": "celltype"}))


def test_a_tag_is_taken_away(tmp_path):
    tracker = Tracker.start(f"sqlite:///{tmp_path / 'm.db'}", experiment="e", name="r")
    tracker.tag("cellray.error", "died")
    tracker.untag("cellray.error")
    tracker.untag("cellray.error")
    assert "cellray.error" not in tracker.run().data.tags


def from_checkpoint(folder, name, **over):
    """A fine-tuning file that starts from somewhere; nothing here opens it."""
    made = method_file(folder, init_from=str(folder / "model"), **over)
    file = folder / f"{name}.toml"
    raw = read_toml(made)
    for section in ("model", "tokenizer"):
        raw.pop(section)
    file.write_text(to_toml(raw))
    return str(file)


def test_a_row_from_scratch_may_be_tuned_on_its_own(small_store, tmp_path):
    files = {
        "config": from_checkpoint(tmp_path, "best", optim={"lr": 1e-3}),
        "scratch_config": from_checkpoint(tmp_path, "scratch", optim={"lr": 4e-3}),
    }
    alone = {"config": files["config"], "tuning_budget": 4}
    run = bench(small_store, tmp_path, methods={"both": files | {"tuning_budget": 4}, "one": alone})
    rows = {e.name: e for e in entries_of(open_setting(run, "store"))}
    shown = {n: (rows[n].config, rows[n].tuning_budget) for n in rows if n.startswith(("b", "o"))}
    assert shown == {
        "both": (files["config"], 4),
        "both_scratch": (files["scratch_config"], 4),
        "both_random": (files["config"], 4),
        "one": (files["config"], 4),
        "one_scratch": (files["config"], 1),
        "one_random": (files["config"], 4),
    }


def test_a_scratch_file_beside_no_row_from_scratch_is_refused(small_store, tmp_path):
    file = method_file(tmp_path)
    for method, text in (
        ({"model": "m", "scratch_config": file}, "a model that is used frozen has none"),
        ({"config": file, "scratch_config": file}, "has no init_from: it trains from scratch"),
    ):
        with pytest.raises(ConfigError, match=text):
            entries_of(open_setting(bench(small_store, tmp_path, methods={"m": method}), "store"))


def test_a_model_that_knows_few_genes_brings_a_baseline_on_these_alone(small_store, tmp_path):
    few = method_file(tmp_path, data={"uri": "elsewhere", "vocab_genes": 9})
    (tmp_path / "all").mkdir()
    run = bench(
        small_store, tmp_path,
        methods={"few": few, "again": few, "whole": method_file(tmp_path / "all")},
    )  # fmt: skip
    setting = open_setting(run, "store")
    entries = entries_of(setting)
    (row,) = gene_rows(setting, entries)  # once a set of genes, and not where all are known
    assert (row.name, row.kind, row.family, row.base, row.unit) == (
        "logistic_on_few_genes", "baseline", "baseline", "few", "logistic",
    )  # fmt: skip
    part = setting.part(0)
    genes = genes_known(setting, vocabulary_of(setting, row, 0))
    assert genes.sum() == 9
    found = answer_of(setting, part, row)
    assert (found.row.base_method, found.row.genes_matched) == ("few", 9)
    train, test = setting.counts(part.split.train), setting.counts(part.split.test)
    codes = setting.codes(part, part.split.train)
    unit = baseline("logistic")
    config = unit.config(name="logistic")
    want = annotate_with(unit, config, train.only(genes), codes, test.only(genes), 0)
    names = np.asarray(part.targets.classes)
    np.testing.assert_array_equal(found.answer.labels, names[want.codes])
    whole = answer_of(setting, part, next(e for e in entries if e.name == "logistic"))
    assert not np.array_equal(whole.answer.confidence, found.answer.confidence)


def test_a_file_that_draws_its_weights_anew_is_from_scratch(small_store, tmp_path):
    """``init_from`` names the architecture alone there: no pretraining, and no control of it."""
    drawn = from_checkpoint(tmp_path, "drawn", init_weights=False)
    laid = {"config": from_checkpoint(tmp_path, "plain"), "overrides": ["init_weights=false"]}
    run = bench(small_store, tmp_path, methods={"drawn": drawn, "laid": laid})
    rows = {e.name: e for e in entries_of(open_setting(run, "store"))}
    for name in ("drawn", "laid"):
        assert (rows[name].family, rows[name].scratch) == ("from_scratch", True)
        assert f"{name}_scratch" not in rows
        assert f"{name}_random" in rows


def test_overrides_are_laid_over_the_methods_own_file_alone(small_store, tmp_path):
    file, own = method_file(tmp_path), tmp_path / "own.toml"
    own.write_text(to_toml(read_toml(file) | {"optim": {"lr": 7e-3}}))
    run = bench(small_store, tmp_path, methods={"m": {"config": file}})
    setting = open_setting(run, "store")
    entry = next(e for e in entries_of(setting) if e.name == "m")
    method = MethodSection(config=file, scratch_config=str(own), overrides=["optim.lr=5e-5"])
    both = replace(entry, method=method)
    scratch = replace(both, name="m_scratch", base="m", scratch=True)
    assert finetune_run(setting, both, 0).optim.lr == 5e-5
    assert finetune_run(setting, scratch, 0).optim.lr == 7e-3


def test_a_row_from_scratch_of_another_architecture_is_refused(small_store, tmp_path):
    run = bench(small_store, tmp_path, methods={"m": method_file(tmp_path)})
    setting = open_setting(run, "store")
    entry = next(e for e in entries_of(setting) if e.name == "m")
    made = prepare_finetune(finetune_run(setting, entry, 0)).job.manifest
    scratch = replace(entry, name="m_scratch", base="m", scratch=True)
    free = replace(made, model={**made.model, "dropout": 0.4})
    _check_alike(scratch, free, made)
    for what, other in (
        ("family", replace(made, family="geneformer")),
        ("model", replace(made, model={**made.model, "width": 32})),
        ("vocabulary", replace(made, vocab_fingerprint="0" * 64)),
    ):
        with pytest.raises(ConfigError, match=f"'m' from scratch, but the {what} of"):
            _check_alike(scratch, other, made)


def test_a_row_shows_the_trials_that_were_spent_on_it(small_store, tmp_path):
    methods = {"m": {"config": method_file(tmp_path), "tuning_budget": 40}}
    setting = open_setting(bench(small_store, tmp_path, methods=methods), "store")
    spent = {e.name: tuning_budget(setting, e) for e in entries_of(setting)}
    assert spent["m"] == 40
    assert spent["m_random"] == spent["logistic"] == 4  # the strengths of the head alone
    assert spent["majority"] == spent["knn"] == 1


def test_seeds_that_were_run_and_are_not_asked_for_are_told(small_store, tmp_path):
    setting = open_setting(bench(small_store, tmp_path), "store")
    results = setting.directory / "results"
    results.mkdir(parents=True)
    for seed in (0, 1, 7):
        (results / f"knn-seed{seed}.json").write_text("[]")
    assert _unshown(setting) == ["seeds 7 were run too and are not shown (seeds)"]


def test_cells_that_were_kept_without_tracking_are_logged_once_it_is_on(small_store, tmp_path):
    setting = open_setting(bench(small_store, tmp_path), "store")
    entries = [e for e in entries_of(setting) if e.name in ("majority", "knn")]
    for entry in entries:
        record(setting, setting.part(0), entry, answer_of(setting, setting.part(0), entry))
    kept = read_rows(setting, entries)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    parent = Tracker.start(uri, experiment="b", name="parent")
    tracked = replace(setting, parent=Parent(uri, parent.run_id, "b"))
    assert log_kept(tracked, entries) == 2
    found = read_rows(tracked, entries)
    assert {r.run_id for r in found} == {c.info.run_id for c in parent.children()}

    def bare(rows):
        return sorted((replace(r, run_id="") for r in rows), key=lambda r: (r.method, r.metric_id))

    assert bare(found) == bare(kept)
    assert log_kept(tracked, entries) == 0


def finished(setting, *, seeds=(0, 1)):
    """Every baseline of a data set, done here and kept."""
    entries = entries_of(setting)
    for entry in entries:
        for seed in seeds:
            part = setting.part(seed)
            record(setting, part, entry, answer_of(setting, part, entry))
    return entries


def test_a_damaged_result_is_named_with_its_cure(small_store, tmp_path):
    run = bench(small_store, tmp_path)
    setting = open_setting(run, "store")
    entries = finished(setting, seeds=(0,))
    file = kept_file(setting, entries[0], 0)
    whole = file.read_text()
    for text in (whole[:100], "[]", "{}", '[{"method": "knn"}]', "[3]", ""):
        file.write_text(text)
        for read in (lambda: read_rows(setting, entries), lambda: check_benchmark(run)):
            with pytest.raises(DataError, match=f"{file.name}' is .*; remove it, and the same ben"):
                read()
    file.unlink()
    assert _to_do(setting, entries)[0].seeds == (0, 1)


def test_a_data_set_without_a_table_hides_no_other(small_store, tmp_path):
    sets = {name: {"data": {"uri": small_store}} for name in ("good", "dead", "empty")}
    run = bench("", tmp_path, datasets=sets, data={})
    settings = {name: open_setting(run, name) for name in sets}
    entries = {name: entries_of(setting) for name, setting in settings.items()}
    finished(settings["good"])
    for entry in entries["dead"]:
        for seed in (0, 1):
            part = settings["dead"].part(seed)
            record_failure(settings["dead"], part, entry, "the disk is full")
    told = []
    tables, wrong = _conclude(settings, entries, told.append)
    assert [table.setting.name for table in tables] == ["good"]
    assert wrong["dead"] == "every row failed, so there is nothing to show: the disk is full"
    assert wrong["empty"].startswith("the table lacks compulsory baselines: majority, logistic")
    assert [line.split(":")[0] for line in told] == ["dead", "empty"]


def test_one_process_at_a_time_works_on_a_benchmark(small_store, tmp_path):
    run = bench(small_store, tmp_path)
    with (
        RunDirectory(str(tmp_path), "bench").held(),
        pytest.raises(CheckpointError, match=r"run 'bench' in .* is being trained by process \d+"),
    ):
        benchmark(run, print)
    assert not (tmp_path / "bench").exists()


def test_seeds_of_a_frozen_model_share_its_vectors_and_each_row_bears_their_cost():
    made = []

    def embed():
        made.append(1)
        time.sleep(0.05)
        return np.full((2, 3), len(made), dtype=np.float32)

    key = ("bench/store", "m", "model", b"12")
    first, spent, saved = _embedded(key, embed)
    again, spent_again, saved_again = _embedded(key, embed)
    assert again is first
    assert (spent_again, saved, saved_again) == (spent, 0.0, spent)
    assert spent >= 0.05
    other, _, saved = _embedded((*key[:3], b"34"), embed)
    assert (other[0, 0], saved) == (2.0, 0.0)


def test_only_models_that_learn_classes_are_asked_whether_they_did(small_store, tmp_path):
    setting = open_setting(bench(small_store, tmp_path), "store")
    assert setting.trained_remarks(setting.first, 0.95) == ()
    (remark,) = setting.trained_remarks(setting.first, 0.3)
    assert remark.startswith("did not train")
    for name in ("embedding", "integration"):
        task = {"name": name, "label": "cell_type", "batch": "donor"}
        setting = open_setting(bench(small_store, tmp_path, task=task), "store")
        assert setting.trained_remarks(setting.first, float("nan")) == ()


def test_vectors_are_those_of_the_data_set_and_of_the_weights_asked_for(small_store, tmp_path):
    """Two stores under one name in one process: neither gets the other's vectors."""
    counts = known_cells(seed=5)
    counts.write_h5ad(tmp_path / "other.h5ad")
    other = str(tmp_path / "other")
    ingest(IngestConfig(files=[str(tmp_path / "other.h5ad")], uri=other))
    found = {}
    for uri in (small_store, other, small_store):
        run = bench(uri, tmp_path, methods={"m": method_file(tmp_path)})
        setting = open_setting(run, *run.datasets)
        entry = next(e for e in entries_of(setting) if e.name == "m_random")
        answer = answer_of(setting, setting.first, entry).answer
        again = found.setdefault(uri, answer.confidence)
        np.testing.assert_array_equal(again, answer.confidence)
    assert not np.array_equal(found[small_store], found[other])


def test_an_integration_by_one_label_is_refused_first(small_store, tmp_path):
    task = {"name": "integration", "label": "donor", "batch": "cell_type"}
    run = bench(small_store, tmp_path, task=task, data={
        "uri": small_store, "obs_filter": "donor == 'd1'",
    })  # fmt: skip
    with pytest.raises(DataError, match="all 60 cells have the 'donor' 'd1': an embedding is"):
        check_benchmark(run)


def test_answers_that_were_changed_after_they_were_scored_are_refused(small_store, tmp_path):
    run = bench(small_store, tmp_path)
    setting = open_setting(run, "store")
    entries = finished(setting, seeds=(0,))
    check_benchmark(run)
    entry = next(e for e in entries if e.name == "knn")
    answers = kept_file(setting, entry, 0).with_suffix(".csv")
    whole = answers.read_bytes()
    for content in (whole.replace(b"type0", b"type1"), whole[:40], b"", b"\xff\xfe\x00"):
        answers.write_bytes(content)
        with pytest.raises(DataError, match="knn-seed0.json' are not those that were scored"):
            check_benchmark(run)
    for content in (b"", b"\xff\xfe\x00", b"a,b\n1,2\n"):
        answers.write_bytes(content)
        with pytest.raises(DataError, match="the answers beside .*knn-seed0.json' are damaged"):
            kept_answer(setting, entry, setting.first)
    answers.write_bytes(whole)
    check_benchmark(run)


def test_results_of_an_older_revision_of_a_baseline_are_not_mixed_in(small_store, tmp_path):
    run = bench(small_store, tmp_path)
    setting = open_setting(run, "store")
    entries = finished(setting, seeds=(0,))
    entry = next(e for e in entries if e.name == "hvg")
    file = kept_file(setting, entry, 0)
    assert "revision" in file.read_text()
    file.write_text(file.read_text().replace('\\"revision\\": 2', '\\"revision\\": 1'))
    with pytest.raises(ConfigError, match=r"a result of 'hvg' with other settings \(revision\)"):
        check_benchmark(run)
