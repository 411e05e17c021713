"""All integration metrics together: invariance, extremes, controls, noise, what is left out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from cellray.core.errors import DataError
from cellray.metrics.base import all_metrics
from cellray.metrics.integration import score_integration

BIO = "bio_mean.nmi_ari_asw_isolated_clisi.v1"
BATCH = "batch_mean.bras_ilisi_kbet_connectivity.v1"
BATCH_PCR = "batch_mean.bras_ilisi_kbet_connectivity_pcr.v1"


def cells(
    num_cells: int = 360, *, label_shift: float = 6.0, batch_shift: float = 0.0, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three labels, two batches, each label in both; shifts along axes of their own."""
    rng = np.random.default_rng(0)
    labels, batches = np.arange(num_cells) % 3, np.arange(num_cells) // 3 % 2
    points = noise * rng.normal(size=(num_cells, 6))
    points[:, :3] += label_shift * np.eye(3)[labels]
    points[:, 3] += batch_shift * batches
    return points, labels, batches


def test_permuting_cells_changes_nothing_not_even_among_ties_and_duplicates() -> None:
    points, labels, batches = cells(batch_shift=1.0, label_shift=2.0)
    points = np.round(points)
    before = points + batches[:, None]
    first = score_integration(points, labels, batches, before=before, seed=3)
    assert len(np.unique(points, axis=0)) < len(points)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(points))
        again = score_integration(
            points[order], labels[order], batches[order], before=before[order], seed=3
        )
        assert again == first


def test_renaming_labels_and_batches_changes_nothing() -> None:
    points, labels, batches = cells(batch_shift=1.0, label_shift=2.0)
    first = score_integration(points, labels, batches)
    renamed = np.array(["T", "B", "NK"])[labels], np.array(["y", "x"])[batches]
    again = score_integration(points, *renamed)
    assert again == {name: pytest.approx(value, abs=1e-9) for name, value in first.items()}


def test_every_id_is_known_and_the_means_are_of_what_they_say() -> None:
    points, labels, batches = cells()
    scores = score_integration(points, labels, batches, before=points + 3.0 * batches[:, None])
    assert set(scores) <= set(all_metrics())
    bio = ("nmi.kmeans.v1", "ari.kmeans.v1", "asw_label.v1", "isolated_asw.v1", "clisi.v1")
    batch = (
        "bras.v1",
        "ilisi.v1",
        "kbet.diffusion.v1",
        "graph_connectivity.directed.v1",
        "pcr_comparison.v1",
    )
    assert scores[BIO] == pytest.approx(np.mean([scores[m] for m in bio]))
    assert scores[BATCH_PCR] == pytest.approx(np.mean([scores[m] for m in batch]))
    total = 0.6 * scores[BIO] + 0.4 * scores[BATCH_PCR]
    assert scores["total_60_40.bio5_batch5.v1"] == pytest.approx(total)
    assert BATCH not in scores
    avg_bio = (
        scores["ari.leiden_nmi_opt.v1"] + scores["nmi.leiden_nmi_opt.v1"] + scores["asw_label.v1"]
    ) / 3
    avg_batch = (scores["asw_batch.v1"] + scores["graph_connectivity.symmetric.v1"]) / 2
    assert scores["avg_bio.scgpt_leiden.v1"] == pytest.approx(avg_bio)
    assert scores["avg_batch.scgpt.v1"] == pytest.approx(avg_batch)
    overall = 0.6 * avg_bio + 0.4 * avg_batch
    assert scores["overall.scgpt_leiden.v1"] == pytest.approx(overall)


def test_without_the_embedding_before_the_ids_of_the_means_are_others() -> None:
    scores = score_integration(*cells())
    assert BATCH in scores
    assert "total_60_40.bio5_batch4.v1" in scores
    assert not {BATCH_PCR, "total_60_40.bio5_batch5.v1", "pcr_comparison.v1"} & set(scores)


def test_perfect_mixing_and_separation_give_the_extremes() -> None:
    mixed = score_integration(*cells(label_shift=200.0))
    assert mixed[BIO] > 0.99
    for name in ("nmi.kmeans.v1", "ari.leiden_nmi_opt.v1", "clisi.v1", "isolated_f1.leiden.v1"):
        assert mixed[name] == pytest.approx(1.0, abs=1e-9), name
    assert mixed["ilisi.v1"] > 0.9
    assert mixed["kbet.diffusion.v1"] > 0.85
    points, labels, batches = cells(label_shift=200.0, batch_shift=5000.0)
    apart = score_integration(points, labels, batches)
    for name in ("ilisi.v1", "kbet.diffusion.v1", "asw_batch.v1"):
        assert apart[name] == pytest.approx(0.0, abs=1e-3), name
    assert apart["pcr.v1"] > 0.99
    assert apart["graph_connectivity.symmetric.v1"] == pytest.approx(0.5)


def test_the_random_control_is_below_the_label_control_in_bio() -> None:
    _, labels, batches = cells()
    rng = np.random.default_rng(2)
    random_cells = rng.normal(size=(len(labels), 6))
    one_hot = np.eye(3)[labels] + 1e-3 * rng.normal(size=(len(labels), 3))
    low, high = (score_integration(x, labels, batches) for x in (random_cells, one_hot))
    for name in (BIO, "avg_bio.scgpt_leiden.v1", "asw_label.v1", "clisi.v1", "nmi.kmeans.v1"):
        assert low[name] < high[name] - 0.3, name
    assert high[BIO] > 0.99
    assert low[BATCH] > 0.5  # noise is well mixed: why a total is never shown alone


def test_the_exact_one_hot_of_the_label_is_scored_without_noise() -> None:
    _, labels, batches = cells()
    scores = score_integration(np.eye(3)[labels], labels, batches)
    assert scores["asw_label.v1"] == 1.0
    assert scores["clisi.v1"] == pytest.approx(1.0, abs=1e-12)
    assert scores["ari.kmeans.v1"] == pytest.approx(1.0)


def test_noise_lowers_bio_and_a_batch_shift_lowers_batch() -> None:
    names = ("avg_bio.scgpt_leiden.v1", BIO, "asw_label.v1", "clisi.v1")
    noisy = [score_integration(*cells(noise=noise)) for noise in (0.5, 2.0, 4.0, 8.0)]
    for name in names:
        assert (np.diff([s[name] for s in noisy]) < 1e-9).all(), name
    shifted = [score_integration(*cells(batch_shift=shift)) for shift in (0.0, 1.5, 3.0, 12.0)]
    for name in (BATCH, "ilisi.v1", "asw_batch.v1", "bras.v1"):
        assert (np.diff([s[name] for s in shifted]) < 0).all(), name
    assert (np.diff([s["pcr.v1"] for s in shifted]) > 0).all()


def test_one_batch_leaves_the_batch_metrics_out_and_says_so() -> None:
    points, labels, batches = cells()
    with pytest.warns(UserWarning, match="all cells are of one batch: batch metrics and totals"):
        scores = score_integration(points, labels, np.zeros_like(batches))
    assert BIO in scores
    assert "graph_connectivity.directed.v1" in scores
    assert not any(
        name.startswith(("batch_mean", "avg_batch", "total", "overall", "ilisi", "kbet", "pcr"))
        for name in scores
    )


def test_labels_that_are_batches_leave_out_what_they_cannot_judge() -> None:
    points, labels, _ = cells()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = score_integration(points, labels, labels)
    texts = [str(w.message) for w in caught]
    for name in ("asw_batch.v1", "bras.v1", "kbet.diffusion.v1"):
        assert name not in scores
        assert any(text.startswith(f"{name} is left out, and every mean") for text in texts)
    assert {"ilisi.v1", "pcr.v1", BIO} <= set(scores)
    assert not {BATCH, "avg_batch.scgpt.v1", "overall.scgpt_leiden.v1"} & set(scores)


def test_classes_and_batches_of_one_cell_are_scored() -> None:
    points, labels, batches = cells()
    labels[0], batches[1] = 9, 9
    scores = score_integration(points, labels, batches)
    assert all(np.isfinite(list(scores.values())))
    assert BATCH in scores


def test_errors_say_what_was_given_and_what_to_do() -> None:
    points, labels, batches = cells()
    with pytest.raises(DataError, match="360 cells in the embedding but 359 labels; give one"):
        score_integration(points, labels[1:], batches)
    with pytest.raises(DataError, match="360 cells in the embedding but 359 batches"):
        score_integration(points, labels, batches[1:])
    with pytest.raises(DataError, match="but 10 cells before integration"):
        score_integration(points, labels, batches, before=points[:10])
    with pytest.raises(DataError, match="1 of 360 cell labels are missing"):
        score_integration(points, [None, *labels[1:]], batches)
    with pytest.raises(DataError, match="all cells have the label '0'"):
        score_integration(points, np.zeros_like(labels), batches)
    with pytest.raises(DataError, match="89 cells; LISI looks at 90 of them"):
        score_integration(points[:89], labels[:89], batches[:89])
    with pytest.raises(DataError, match="the embedding before integration of 1 of 360 cells"):
        score_integration(points, labels, batches, before=np.where(points == points[0], np.nan, 0))
    points[5, 0] = np.nan
    with pytest.raises(DataError, match=r"holds NaN or infinity \(first: cell 5\)"):
        score_integration(points, labels, batches)
