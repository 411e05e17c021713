import logging

import numpy as np
import pytest
from cells_by_hand import dense, make_counts

from cellray.core.errors import DataError
from cellray.data.retry import TRIES, read_with_retry

RESET = OSError("connection reset")
COUNTS = make_counts(50, 12, seed=3)


class Storage:
    """Fails so many times, then reads."""

    def __init__(self, failures, error):
        self.left, self.error, self.reads, self.reopened = failures, error, 0, 0

    def read(self):
        self.reads += 1
        if self.left:
            self.left -= 1
            raise DataError("X cannot be read: it broke") from self.error
        return "block"

    def reopen(self):
        self.reopened += 1


def retried(storage):
    return read_with_retry(
        storage.read, what=lambda: "cells 3 to 9", reopen=storage.reopen, first_wait_s=0.001
    )


@pytest.mark.parametrize("failures", range(TRIES))
def test_a_read_that_fails_is_tried_again_with_new_handles(failures, caplog):
    storage = Storage(failures, RESET)
    with caplog.at_level(logging.WARNING, "cellray"):
        assert retried(storage) == "block"
    assert (storage.reads, storage.reopened) == (failures + 1, failures)
    assert len(caplog.records) == failures


def test_a_read_that_keeps_failing_says_what_and_what_to_do():
    storage = Storage(TRIES, RESET)
    text = r"cells 3 to 9 could not be read, 4 tries in .* s: .*it broke. Check that the store is"
    with pytest.raises(DataError, match=text):
        retried(storage)
    assert storage.reads == TRIES


def test_a_wrong_request_is_not_tried_again():
    storage = Storage(1, None)
    with pytest.raises(DataError, match="^X cannot be read: it broke$"):
        retried(storage)
    assert storage.reads == 1


def test_a_block_whose_files_come_back_is_read_once_and_whole(make_store, tmp_path, caplog):
    store = make_store(COUNTS)
    every = np.arange(12, dtype=np.int32)
    fragments = tmp_path / "store/ms/RNA/X/raw/__fragments"
    away = tmp_path / "away"
    fragments.rename(away)
    calls = []

    class Returning(logging.Handler):
        def emit(self, record):  # the storage is well again after the second failure
            calls.append(record)
            if len(calls) == 2:
                away.rename(fragments)

    handler = Returning()
    logging.getLogger("cellray.data.retry").addHandler(handler)
    try:
        block = store.read_block(np.arange(50), every)
    finally:
        logging.getLogger("cellray.data.retry").removeHandler(handler)
    assert len(calls) == 2
    assert block.joinids.tolist() == list(range(50))
    assert (dense(block, 12) == COUNTS).all()


def test_a_block_that_is_gone_is_named(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr("cellray.data.retry._FIRST_WAIT_S", 0.001)
    store = make_store(COUNTS)
    (tmp_path / "store/ms/RNA/X/raw/__fragments").rename(tmp_path / "away")
    text = "X/raw of '.*store', 3 cells from joinid 4 to 40, could not be read, 4 tries"
    with pytest.raises(DataError, match=text):
        store.read_block(np.array([40, 4, 7]), np.arange(12, dtype=np.int32))
