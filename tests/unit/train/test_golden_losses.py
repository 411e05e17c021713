"""Every family's first losses are those of the golden file, which one command alone rewrites."""

import json

import pytest

from golden_losses import GOLDEN
from helpers_training import CELLS_GLOBAL, FAMILIES, losses_of


def test_the_golden_file_names_every_family():
    assert sorted(json.loads(GOLDEN.read_text())) == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_losses_are_the_golden_ones(name):
    """Within 1e-4: other processors round otherwise."""
    expected = json.loads(GOLDEN.read_text())[name]
    losses = losses_of(name, "torch", 0, CELLS_GLOBAL)[0]
    assert losses == pytest.approx(expected, rel=1e-4)
