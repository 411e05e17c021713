"""Ray job entry point: ``python jobs/ingest.py FILE.toml [key=value ...]``."""

import sys

from cellray.cli import main

if __name__ == "__main__":
    sys.exit(main(["ingest", *sys.argv[1:]]))
