"""Ray job entry point: ``python jobs/embed.py FILE.toml [key=value ...]``."""

import sys

from cellray.cli import main

if __name__ == "__main__":
    sys.exit(main(["embed", *sys.argv[1:]]))
