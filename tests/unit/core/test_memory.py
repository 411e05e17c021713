"""Freed memory is kept: blocks asked for again and again do not come from the system anew."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from cellray.core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):  # chunks of a block: many at a time, then all are let go
        chunks = [np.ones(500_000, dtype=np.float64) for _ in range(40)]
        del chunks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_pages_are_not_cleared_for_every_block():
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", SCRIPT, mode]))
        for mode in ("keep", "give")
    }
    assert faults["keep"] < 0.1 * faults["give"]
