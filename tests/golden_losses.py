"""The losses of six steps of a small model of every family, as they were when last looked at.

``python tests/golden_losses.py`` prints how today's losses differ from ``golden_losses.json``;
with ``--rewrite`` it writes them. Nothing else writes the file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from helpers_training import CELLS_GLOBAL, FAMILIES, losses_of

GOLDEN = Path(__file__).parent / "data" / "golden_losses.json"


def today() -> dict[str, list[float]]:
    """Family -> losses of the plain engine in one process, float32."""
    return {name: losses_of(name, "torch", 0, CELLS_GLOBAL)[0] for name in FAMILIES}


def main() -> None:
    """Show the difference, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewrite", action="store_true")
    arguments = parser.parse_args()
    before = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    now = today()
    for name, losses in now.items():
        for step, loss in enumerate(losses):
            old = before.get(name, [])[step : step + 1]
            change = f"{loss / old[0] - 1:+.2e}" if old else "new"
            print(f"{name:14} step {step}: {loss:.7g}  {change}")
    if arguments.rewrite:
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
        print(f"written: {GOLDEN}")


if __name__ == "__main__":
    main()
