"""What is left of a log of cells that a kill cut short."""

import numpy as np

from cellray.train.cell_log import CellLog, read_cell_log


def test_what_follows_a_line_cut_short_is_read(tmp_path):
    first = CellLog(tmp_path, rank=0, world=1, session=1.0)
    for step in range(3):
        first.write(step, 0, np.array([step, step + 10]), taken=True)
    file = tmp_path / "cells" / "rank-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-9])  # step 2, in the middle of the line
    second = CellLog(tmp_path, rank=0, world=1, session=2.0)
    for step in (1, 2):
        second.write(step, 0, np.array([step + 20]), taken=True)
    found = read_cell_log(tmp_path)
    assert {step: entry["cells"][0].tolist() for step, entry in found.items()} == {
        0: [0, 10],
        1: [21],
        2: [22],
    }
