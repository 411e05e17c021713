"""The long table and the leaderboard: aggregates by hand, and what may not be shown."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_by_hand import HEAD, baselines, row, runs
from scipy import stats

from cellray.bench.rows import kept_rows
from cellray.bench.table import (
    SCHEMA_VERSION,
    ResultRow,
    failed_rows,
    leaderboard,
    row_from,
    rows_of,
    scores_of,
    to_frame,
)
from cellray.core.errors import DataError
from cellray.metrics.classification import score_annotation


def test_long_table_has_every_field_once() -> None:
    frame = to_frame(baselines())
    assert len(frame) == 9
    assert frame["row_id"].is_unique
    assert (frame["schema_version"] == SCHEMA_VERSION).all()
    assert frame.columns[0] == "row_id"
    assert set(ResultRow.__dataclass_fields__) < set(frame.columns)
    assert list(to_frame([]).columns) == list(frame.columns)


def test_row_id_is_of_what_identifies_a_row() -> None:
    one = row("scgpt", 0.8)
    assert one.row_id == replace(one, value=0.7, wall_s=3.0, run_id="x").row_id
    assert len(one.row_id) == 16
    others = [
        replace(one, seed=1),
        replace(one, method="other"),
        replace(one, metric_id="accuracy.v1"),
        replace(one, split_sha256="ab"),
        replace(one, config_sha256="cd"),
    ]
    assert len({r.row_id for r in [one, *others]}) == 6


def test_rows_of_scores_carry_direction_and_number_of_cells() -> None:
    scores = score_annotation(["a", "b"], ["a", "a"], train_classes=["a", "b"])
    found = {r.metric_id: r for r in rows_of(row("scgpt", 0.0), scores)}
    assert set(found) == set(scores)
    assert found["accuracy.v1"].value == 0.5
    assert found["accuracy.v1"].higher_is_better is True
    assert found["n_unseen_cells"].higher_is_better is None
    assert {r.n_items for r in found.values()} == {2}


def test_leaderboard_golden() -> None:
    board = leaderboard([*baselines(), *runs("scgpt", [0.90, 0.92, 0.97])])
    assert board["method"].tolist() == ["scgpt", "logistic", "knn", "majority"]
    best = board.iloc[0]
    assert best["n_seeds"] == 3
    assert best[HEAD] == pytest.approx(0.93)
    assert best[f"{HEAD}.sd"] == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    half = 4.302652729911275 * best[f"{HEAD}.sd"] / math.sqrt(3)
    assert best[f"{HEAD}.ci95_low"] == pytest.approx(0.93 - half)
    assert best["delta"] == pytest.approx(0.03)
    assert best["delta.ci95_low"] == pytest.approx(0.03 - half)
    assert best["status"] == "ok"
    assert best["note"] == ""


def test_spread_of_a_method_no_seed_changes_is_not_applicable_and_not_zero() -> None:
    board = leaderboard(baselines()).set_index("method")
    assert board[f"{HEAD}.sd"].isna().all()
    assert board[f"{HEAD}.ci95_low"].isna().all()
    assert board.loc["knn", HEAD] == pytest.approx(0.84)


def test_a_failed_seed_gives_no_spread_to_a_method_that_no_seed_changes() -> None:
    bad = row("knn", None, 3, metric_id="", seed_scope="failed", status="skipped")
    rows = [*baselines(), *failed_rows(bad, "died")]
    board = leaderboard(rows).set_index("method")
    assert board.loc["knn", "n_failed"] == 1
    assert math.isnan(board.loc["knn", f"{HEAD}.sd"])


def test_a_single_seed_has_no_spread() -> None:
    board = leaderboard([*baselines(), *runs("scgpt", [0.91])]).set_index("method")
    assert math.isnan(board.loc["scgpt", f"{HEAD}.sd"])
    assert board.loc["scgpt", "delta"] == pytest.approx(0.01)
    assert math.isnan(board.loc["scgpt", "delta.ci95_low"])


def test_delta_is_paired_by_seed_with_a_baseline_that_varies() -> None:
    rows = [r for r in baselines() if r.method != "logistic"]
    rows += runs("logistic", [0.90, 0.92, 0.94], seed_scope="inner_folds")
    rows += runs("scgpt", [0.91, 0.93, 0.95])
    best = leaderboard(rows).set_index("method").loc["scgpt"]
    assert best["delta"] == pytest.approx(0.01)
    assert best["delta.ci95_high"] == pytest.approx(0.01)


def test_failed_runs_are_failed_and_never_zero() -> None:
    template = row("scgpt", None, 1, status="skipped", metric_id="")
    rows = [*baselines(), row("scgpt", 0.8, 0), *failed_rows(template, "loss became nan")]
    rows += failed_rows(
        row("geneformer", None, 0, status="skipped", metric_id=""), "no memory", status="oom"
    )
    board = leaderboard(rows).set_index("method")
    assert board.loc["scgpt", HEAD] == pytest.approx(0.8)
    assert board.loc["scgpt", "n_seeds"] == 1
    assert board.loc["scgpt", "n_failed"] == 1
    assert board.loc["scgpt", "status"] == "1 of 2 seeds failed"
    assert board.loc["scgpt", "error"] == "loss became nan"
    assert board.index[-1] == "geneformer"
    assert math.isnan(board.loc["geneformer", HEAD])
    assert board.loc["geneformer", "status"] == "oom"


def test_reported_rows_come_last_and_take_no_part() -> None:
    reported = row(
        "scGPT fine-tuned",
        0.99,
        None,
        provenance="reported",
        reported_source="10.1038/s41592-024-02201-0 Table S1",
    )
    board = leaderboard([reported, *baselines()])
    assert board["method"].tolist()[-1] == "scGPT fine-tuned"
    assert board["provenance"].tolist() == ["measured"] * 3 + ["reported"]
    assert math.isnan(board["delta"].iloc[-1])


def test_no_table_without_each_compulsory_baseline() -> None:
    rows = [r for r in baselines() if r.method not in ("knn", "majority")]
    with pytest.raises(DataError, match="lacks compulsory baselines: majority, knn; run them"):
        leaderboard([*rows, *runs("scgpt", [0.9])])
    assert len(leaderboard(rows, compulsory=["logistic"])) == 1


def test_a_reported_baseline_does_not_count_as_run() -> None:
    rows = [r for r in baselines() if r.method != "knn"]
    rows.append(row("knn", 0.8, None, provenance="reported", reported_source="10.1/x"))
    with pytest.raises(DataError, match="lacks compulsory baselines: knn"):
        leaderboard(rows)


def test_a_model_no_better_than_the_majority_is_flagged() -> None:
    board = leaderboard([*baselines(), *runs("scgpt", [0.02, 0.03])]).set_index("method")
    assert board.loc["scgpt", "note"] == "not above majority"
    assert board.loc["majority", "note"] == ""


def test_a_metric_that_falls_is_ranked_from_below() -> None:
    rows = [
        replace(r, metric_id="loss", higher_is_better=False)
        for r in [*baselines(), *runs("scgpt", [0.5, 0.6])]
    ]
    board = leaderboard(rows, headline="loss")
    assert board["method"].tolist() == ["majority", "scgpt", "knn", "logistic"]


def test_counts_are_not_columns_unless_asked_for() -> None:
    scores = score_annotation(["a", "b"], ["a", "a"], train_classes=["a", "b"])
    rows = [r for b in baselines() if b.seed == 0 for r in rows_of(b, scores)]
    board = leaderboard(rows)
    assert "n_items" not in board
    assert "accuracy.v1" in board
    chosen = leaderboard(rows, metrics=["n_test_classes"])
    assert chosen["n_test_classes"].tolist() == [2.0] * 3


def test_costs_are_means_over_seeds() -> None:
    rows = baselines() + [
        row("scgpt", 0.9, seed, wall_s=10.0 * (seed + 1), cells_per_s=100.0) for seed in range(3)
    ]
    best = leaderboard(rows).set_index("method").loc["scgpt"]
    assert best["wall_s"] == 20
    assert best["cells_per_s"] == 100


@pytest.mark.parametrize("name", ["dataset_sha256", "split_sha256", "dataset_id", "task"])
def test_rows_of_other_data_or_splits_are_refused(name: str) -> None:
    odd = row("scgpt", 0.9, **{name: "other"})
    with pytest.raises(DataError, match=f"rows of one table differ in {name}: "):
        leaderboard([*baselines(), odd])


def test_a_run_given_twice_is_refused() -> None:
    rows = [*baselines(), *runs("scgpt", [0.9]), row("scgpt", 0.8)]
    with pytest.raises(DataError, match="two rows for method 'scgpt', seed 0"):
        leaderboard(rows)


def test_a_method_that_varies_against_its_word_is_refused() -> None:
    rows = [r for r in baselines() if r.method != "knn"] + runs("knn", [0.8, 0.9])
    with pytest.raises(DataError, match="'knn' says that no seed changes it, yet macro_f1"):
        leaderboard(rows)


def test_an_unknown_headline_is_refused() -> None:
    with pytest.raises(DataError, match="no row has the metric 'auc'; there are: macro_f1"):
        leaderboard(baselines(), headline="auc")


def test_an_unknown_metric_asked_for_is_explained() -> None:
    with pytest.raises(DataError, match="no row has the metric 'macro_f1.v1'. Did you mean"):
        leaderboard(baselines(), metrics=["macro_f1.v1"])


def test_a_run_that_failed_cannot_have_values_too() -> None:
    dead = failed_rows(row("scgpt", None, 0, status="skipped", metric_id=""), "x")
    with pytest.raises(DataError, match="'scgpt', seed 0, is failed and has values too"):
        leaderboard([*baselines(), row("scgpt", 0.5, 0), *dead])


def test_a_difference_of_two_methods_that_no_seed_changes_has_no_spread() -> None:
    rows = [*baselines(), *runs("scgpt", [0.95] * 3, seed_scope="")]
    best = leaderboard(rows).set_index("method").loc["scgpt"]
    assert best["delta"] == pytest.approx(0.05)
    assert math.isnan(best["delta.sd"])


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no measured result to make a table of"):
        leaderboard([], compulsory=[])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit_ci95_low": 0.1}, "unit_ci95_low and unit_ci95_high are given together"),
        ({"unit_ci95_low": 0.6, "unit_ci95_high": 0.5}, "ends before it begins"),
        ({"reported_spread": 0.1}, "reported_spread and reported_spread_kind are given together"),
        (
            {"reported_spread": 0.1, "reported_spread_kind": "sd"},
            "a measured value has no reported_spread",
        ),
        ({"status": "lost", "value": None}, "status 'lost' is none of ok, failed"),
        ({"value": None}, "= None although status is ok"),
        ({"value": float("nan")}, "= nan although status is ok"),
        ({"metric_id": ""}, "a value without metric_id"),
        ({"status": "failed"}, r"status is failed but it has a value \(0.5\)"),
        ({"provenance": "reported"}, "reported_source is required for reported values"),
        ({"reported_source": "10.1/x"}, "must be empty for others"),
        ({"method_family": "magic"}, "method_family 'magic' is none of foundation_ft"),
    ],
)
def test_impossible_rows_cannot_exist(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"result row of 'scgpt', seed 0: .*{message}"):
        row("scgpt", **({"value": 0.5} | fields))  # type: ignore[arg-type]


def test_rows_of_older_versions_still_load() -> None:
    old = asdict(row("scgpt", 0.5))
    for name in ("remarks", "base_method", "gpu_hours", "unit_ci95_low", "reported_spread"):
        del old[name]
    old["schema_version"] = "results_long.v1"
    found = row_from(json.loads(json.dumps(old)))
    assert found == replace(row("scgpt", 0.5), schema_version="results_long.v1")
    assert found == ResultRow(**old)


def test_rows_go_through_json_and_back() -> None:
    one = row("scgpt", 0.5, remarks=("did not train",), git_dirty=True, overlap_fraction=0.1)
    raw = json.loads(json.dumps({"row_id": one.row_id, **asdict(one)}))
    assert row_from(raw) == one
    with pytest.raises(DataError, match="row of 'scgpt' has unknown fields: colour; it was"):
        row_from(raw | {"colour": 1})


def test_intervals_over_units_travel_with_the_scores() -> None:
    scores = {HEAD: 0.8, f"{HEAD}/unit_ci95_low": 0.7, f"{HEAD}/unit_ci95_high": 0.85, "n_items": 9}
    found = {r.metric_id: r for r in rows_of(row("m", 0.0), scores)}
    assert set(found) == {HEAD, "n_items"}
    assert (found[HEAD].unit_ci95_low, found[HEAD].unit_ci95_high) == (0.7, 0.85)
    assert found[HEAD].metric_version == "v1"
    assert scores_of(found.values()) == scores


def test_seed_spread_and_unit_interval_never_mix() -> None:
    rows = [*baselines()]
    for seed, (low, high) in enumerate([(0.80, 0.90), (0.82, 0.94)]):
        rows.append(row("m", 0.86 + 0.02 * seed, seed, unit_ci95_low=low, unit_ci95_high=high))
    board = leaderboard(rows).set_index("method")
    assert board.loc["m", f"{HEAD}.unit_ci95_low"] == pytest.approx(0.81)
    assert board.loc["m", f"{HEAD}.unit_ci95_high"] == pytest.approx(0.92)
    half = 12.706204736432095 * board.loc["m", f"{HEAD}.sd"] / math.sqrt(2)
    assert board.loc["m", f"{HEAD}.ci95_low"] == pytest.approx(0.87 - half)
    assert math.isnan(board.loc["knn", f"{HEAD}.unit_ci95_low"])


def test_tests_of_the_difference_by_hand() -> None:
    """Five seeds, all above the best baseline: exact signed-rank p = 2/32; Holm over two."""
    rows = [*baselines(), *runs("a", [0.91, 0.92, 0.93, 0.94, 0.95]), *runs("b", [0.5, 0.6, 0.7])]
    board = leaderboard(rows).set_index("method")
    assert board.loc["a", "delta.baseline"] == "logistic"
    assert board.loc["a", "delta.p"] == pytest.approx(0.0625)
    assert board.loc["b", "delta.p"] == pytest.approx(0.25)
    assert board.loc["a", "delta.p_holm"] == pytest.approx(0.125)
    assert board.loc["b", "delta.p_holm"] == pytest.approx(0.25)
    t = 0.03 / (math.sqrt(0.00025) / math.sqrt(5))
    assert board.loc["a", "delta.p_t"] == pytest.approx(2 * stats.t.sf(t, 4))
    assert math.isnan(board.loc["knn", "delta.p"])


def test_without_seeds_overlapping_unit_intervals_are_not_set_apart() -> None:
    rows = [replace(r, unit_ci95_low=0.80, unit_ci95_high=0.95) if r.method == "logistic" else r
            for r in baselines()]  # fmt: skip
    rows = [replace(r, unit_ci95_low=0.78, unit_ci95_high=0.9) if r.method == "knn" else r
            for r in rows]  # fmt: skip
    best = leaderboard(rows).set_index("method")[f"{HEAD}.best"]
    assert best.to_dict() == {"logistic": True, "knn": True, "majority": False}
    assert leaderboard(baselines())[f"{HEAD}.best"].sum() == 1


def test_ties_share_their_rank() -> None:
    rows = [r for r in baselines() if r.method != "knn"] + runs("knn", [0.9] * 3)
    ranks = leaderboard(rows).set_index("method")["rank"]
    assert ranks.to_dict() == {"knn": 1.5, "logistic": 1.5, "majority": 3.0}


def test_costs_run_ids_and_overlap_are_kept() -> None:
    fields = {"gpu_hours": 2.0, "overlap_flag": "partial", "overlap_fraction": 0.25}
    rows = [*baselines(), row("m", 0.9, 1, run_id="b", **fields), row("m", 0.8, 0, run_id="a")]
    found = leaderboard(rows).set_index("method").loc["m"]
    assert found["run_ids"] == "a b"
    assert found["gpu_hours"] == 2.0
    assert found["overlap_flag"] == "partial+unknown"
    assert found["overlap_fraction"] == 0.25


def mixed() -> list[ResultRow]:
    """Methods of every kind, with failures, two metrics and controls."""
    rows = [*baselines(), *runs("a", [0.91, 0.93, 0.95]), *runs("b", [0.90, 0.95, 0.94])]
    rows += [replace(r, metric_id="accuracy.v1", value=min(1.0, 0.05 + (r.value or 0)))
             for r in rows]  # fmt: skip
    rows += failed_rows(row("b", 0.0, 3), "lost")
    rows += runs("x.positive", [1.0] * 3, method_family="control", seed_scope="")
    return rows


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_change_the_board(random: object) -> None:
    rows = mixed()
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    expected, found = leaderboard(rows), leaderboard(shuffled)
    assert found.equals(expected)
    assert found.attrs == expected.attrs


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 5.0), st.floats(-2.0, 2.0))
def test_no_scale_of_a_metric_changes_ranks_tests_or_scaled_scores(a: float, b: float) -> None:
    """Turning a score upside down and stretching it changes nothing but its numbers."""
    rows = [r for r in mixed() if r.metric_id in (HEAD, "")]
    rows += runs("x.negative", [0.01, 0.02, 0.03], method_family="control")
    turned = [
        replace(r, value=None if r.value is None else b - a * r.value, higher_is_better=False)
        for r in rows
    ]
    one, two = leaderboard(rows), leaderboard(turned)
    assert one["method"].tolist() == two["method"].tolist()
    for name in ("rank", "delta.p", "delta.p_t", f"{HEAD}.scaled"):
        assert one[name].tolist() == pytest.approx(two[name].tolist(), abs=1e-6, nan_ok=True)
    assert one[f"{HEAD}.best"].tolist() == two[f"{HEAD}.best"].tolist()
    assert one["note"].tolist() == two["note"].tolist()


def test_a_result_of_a_newer_version_is_not_to_be_removed(tmp_path) -> None:
    file = tmp_path / "knn-seed0.json"
    file.write_text('[{"method": "knn", "new_field": 1}]')
    with pytest.raises(DataError, match="knn-seed0.json': .* newer version") as told:
        kept_rows(file)
    assert "remove" not in str(told.value)
