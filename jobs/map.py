"""Ray job entry point: ``python jobs/map.py FILE.toml [key=value ...]``."""

import sys

from cellray.cli import main

if __name__ == "__main__":
    sys.exit(main(["map", *sys.argv[1:]]))
