"""Metric ids: one meaning each, found over all modules, with a version."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cellray.core.errors import DataError
from cellray.metrics import base, classification, integration, mixing
from cellray.metrics.base import Metric, all_metrics, by_id, encode_labels, metric


def test_every_modules_ids_are_found() -> None:
    known = all_metrics()
    for module in (classification, integration, mixing):
        assert set(module.METRICS) <= set(known)
    assert metric("accuracy.v1") is classification.METRICS["accuracy.v1"]
    assert metric("ilisi.v1").title == "iLISI"
    assert metric("pcr.v1").higher_is_better is False


def test_ids_carry_a_version_and_counts_do_not() -> None:
    for key, entry in all_metrics().items():
        assert key == entry.id
        if entry.higher_is_better is None:
            assert key.startswith("n_")
        else:
            assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)?\.v\d+", key), key
        assert entry.title
        assert entry.meaning


def test_an_unknown_id_is_refused_with_a_guess() -> None:
    with pytest.raises(DataError, match=r"no metric is called 'ilisi.v2'. Did you mean 'ilisi.v1'"):
        metric("ilisi.v2")


def test_two_metrics_cannot_share_an_id() -> None:
    with pytest.raises(DataError, match="two metrics are called 'a.v1'; give one a new version"):
        by_id(Metric("a.v1", "a", "one"), Metric("a.v1", "a", "another"))


def test_codes_of_labels_do_not_depend_on_the_order_of_cells() -> None:
    codes, names = encode_labels(["b", "a", "b", "c"], "cell")
    assert names == ("a", "b", "c")
    assert codes.tolist() == [1, 0, 1, 2]
    assert encode_labels(np.array([2, 10, 2]), "cell")[1] == ("10", "2")
    with pytest.raises(DataError, match="1 of 2 cell labels are missing"):
        encode_labels(["a", None], "cell")  # type: ignore[list-item]
    with pytest.raises(DataError, match="no cell label is given: there is no cell to score"):
        encode_labels([], "cell")
    assert base.label_texts(["x"], "cell").tolist() == ["x"]
