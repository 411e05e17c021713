"""Ray job entry point: ``python jobs/synthesize.py [FILE.toml] [key=value ...]``."""

import sys

from cellray.cli import main

if __name__ == "__main__":
    sys.exit(main(["synthesize", *sys.argv[1:]]))
