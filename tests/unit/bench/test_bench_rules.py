"""What may not be shown, and what is flagged: each rule with a table that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rows_by_hand import HEAD, baselines, row, runs

from cellray.bench.methods import grouped
from cellray.bench.rules import ceiling_of, floor_of
from cellray.bench.table import ResultRow, control_scaled, failed_rows, leaderboard
from cellray.core.errors import DataError


def controls(top: float = 1.0, low: float = 0.05) -> list[ResultRow]:
    """A positive and a negative control over three seeds."""
    return [
        *runs("labels.positive", [top] * 3, method_family="control", seed_scope=""),
        *runs("shuffled.negative", [low, low + 0.01, low - 0.01], method_family="control"),
    ]


def pretrained(family: str = "foundation_ft") -> list[ResultRow]:
    return runs("model", [0.91, 0.92, 0.93], method_family=family)


def own(family: str, base: str = "model") -> list[ResultRow]:
    return runs(f"model_{family}", [0.6, 0.7, 0.65], method_family=family, base_method=base)


@pytest.mark.parametrize(
    ("family", "there", "missing"),
    [
        ("foundation_ft", [], "the from_scratch and the random_init row of 'model'"),
        ("foundation_ft", ["from_scratch"], "lacks the random_init row of 'model'"),
        ("foundation_ft", ["random_init"], "lacks the from_scratch row of 'model'"),
        ("foundation_zs", ["from_scratch"], "lacks the random_init row of 'model'"),
    ],
)
def test_a_pretrained_method_needs_its_own_controls(
    family: str, there: list[str], missing: str
) -> None:
    rows = [*baselines(), *pretrained(family), *(r for f in there for r in own(f))]
    with pytest.raises(DataError, match=missing):
        leaderboard(rows)
    assert len(leaderboard(rows, own_controls=False)) == 4 + len(there)


def test_own_controls_of_another_method_do_not_count() -> None:
    rows = [*baselines(), *pretrained("foundation_zs"), *own("random_init", base="other")]
    with pytest.raises(DataError, match="lacks the random_init row of 'model'"):
        leaderboard(rows)
    shared = [replace(r, base_method="other, model") for r in own("random_init")]
    assert len(leaderboard([*baselines(), *pretrained("foundation_zs"), *shared])) == 5


def test_own_controls_that_failed_are_there() -> None:
    dead = [
        failed
        for family in ("from_scratch", "random_init")
        for failed in failed_rows(own(family)[0], "lost")
    ]
    board = leaderboard([*baselines(), *pretrained(), *dead]).set_index("method")
    assert board.loc["model_random_init", "status"] == "failed"


def test_a_compulsory_row_whose_runs_failed_is_shown_as_failed() -> None:
    dead = failed_rows(row("knn", 0.0), "no memory", status="oom")
    rows = [r for r in baselines() if r.method != "knn"]
    board = leaderboard([*rows, *dead]).set_index("method")
    assert board.loc["knn", "status"] == "oom"


def test_a_compulsory_row_that_was_never_run_is_missing() -> None:
    skipped = row("knn", None, 0, status="skipped", metric_id="")
    rows = [r for r in baselines() if r.method != "knn"]
    with pytest.raises(DataError, match="lacks compulsory baselines: knn"):
        leaderboard([*rows, skipped])


@pytest.mark.parametrize("higher", [True, False])
def test_a_method_beyond_the_positive_control_refuses_the_table(higher: bool) -> None:
    rows = [*baselines(), *controls(top=0.95), *runs("m", [0.96, 0.97, 0.96])]
    if not higher:
        rows = [replace(r, value=1 - (r.value or 0), higher_is_better=False) for r in rows]
    with pytest.raises(DataError, match=r"out of order: method 'm' has macro_f1.union.v1 = 0\.\d+"):
        leaderboard(rows)


def test_a_positive_control_below_the_negative_one_refuses_the_table() -> None:
    rows = [r for r in baselines() if r.method == "majority"] + controls(top=0.02, low=0.0201)
    with pytest.raises(DataError, match="the negative control '.*' has .* beyond the positive"):
        leaderboard(rows, compulsory=["majority"])


def test_a_method_below_a_negative_control_is_flagged() -> None:
    rows = [*baselines(), *controls(low=0.2), *runs("m", [0.11, 0.12, 0.13])]
    board = leaderboard(rows).set_index("method")
    assert board.loc["m", "note"] == "not above shuffled.negative"
    assert board.loc["knn", "note"] == ""
    assert board.loc["labels.positive", "note"] == ""


def test_a_method_at_the_level_of_chance_is_flagged() -> None:
    rows = [*baselines(), *runs("m", [0.02, 0.09, 0.01]), *runs("n", [0.05, 0.052, 0.051])]
    board = leaderboard(rows).set_index("method")
    assert board.loc["m", "note"] == "at the level of chance: not separable from majority"
    assert board.loc["n", "note"] == ""


def test_controls_have_no_rank_and_are_never_the_best() -> None:
    board = leaderboard([*baselines(), *controls()]).set_index("method")
    assert board["rank"].dropna().to_dict() == {"logistic": 1, "knn": 2, "majority": 3}
    assert board.loc["logistic", f"{HEAD}.best"]
    assert not board.loc["labels.positive", f"{HEAD}.best"]
    assert board["delta"].isna().all()


def test_the_control_scaled_score_by_hand() -> None:
    rows = [*baselines(), *controls(), *runs("m", [0.5, 0.6, 0.7])]
    board = leaderboard(rows).set_index("method")
    assert board.loc["m", f"{HEAD}.scaled"] == pytest.approx((0.6 - 0.05) / 0.95)
    assert board.loc["labels.positive", f"{HEAD}.scaled"] == pytest.approx(1)
    assert board.loc["shuffled.negative", f"{HEAD}.scaled"] == pytest.approx(0)
    assert leaderboard(baselines())[f"{HEAD}.scaled"].isna().all()
    filled = control_scaled(rows)
    one = next(r for r in filled if r.method == "m" and r.seed == 0)
    assert (one.floor, one.ceiling) == (pytest.approx(0.05), 1.0)
    assert one.scaled_value == pytest.approx((0.5 - 0.05) / 0.95)
    assert control_scaled(baselines()) == baselines()


def test_a_control_is_a_better_floor_than_the_majority() -> None:
    methods = grouped([*baselines(), *controls()])
    low, high = floor_of(methods, HEAD), ceiling_of(methods, HEAD)
    assert low is not None
    assert high is not None
    assert (low.name, high.name) == ("shuffled.negative", "labels.positive")
    only = floor_of(grouped(baselines()), HEAD)
    assert only is not None
    assert only.name == "majority"
    assert ceiling_of(grouped(baselines()), HEAD) is None


def test_an_unequal_tuning_budget_is_flagged() -> None:
    rows = [replace(r, tuning_budget=5) if r.method == "logistic" else r for r in baselines()]
    rows += runs("m", [0.9, 0.91], tuning_budget=1) + runs("n", [0.9, 0.91], tuning_budget=5)
    board = leaderboard(rows).set_index("method")
    assert board.loc["m", "note"] == "unequal tuning budget: 1 trial (logistic 5)"
    assert board.loc["n", "note"] == ""


def test_remarks_say_of_how_many_seeds_they_are() -> None:
    rows = [*baselines(), *runs("m", [0.9, 0.91], remarks=("did not train",))]
    assert leaderboard(rows).set_index("method").loc["m", "note"] == "did not train"
    rows.append(row("m", 0.92, 2))
    assert leaderboard(rows).set_index("method").loc["m", "note"] == "did not train (2 of 3 seeds)"


def test_reported_values_beside_synthetic_or_other_data_are_refused() -> None:
    given = {"provenance": "reported", "reported_source": "10.1/x"}
    made = [replace(r, dataset_id="synthetic/a") for r in baselines()]
    with pytest.raises(DataError, match="'synthetic/a' is synthetic data: reported values"):
        leaderboard([*made, row("R", 0.7, None, dataset_id="synthetic/a", **given)])
    with pytest.raises(DataError, match=r"reported values of 'x' \(annotation\) beside measured"):
        leaderboard([*baselines(), row("R", 0.7, None, dataset_id="x", **given)])


def test_one_name_is_one_kind_of_method() -> None:
    odd = replace(row("knn", 0.5, 7), method_family="from_scratch")
    with pytest.raises(DataError, match="method 'knn' are of several families: baseline, from_"):
        leaderboard([*baselines(), odd])


def test_rows_must_agree_which_way_is_better() -> None:
    odd = replace(row("m", 0.5), higher_is_better=False)
    with pytest.raises(DataError, match="rows do not agree whether higher macro_f1.union.v1"):
        leaderboard([*baselines(), odd])
