"""Ray job entry point: ``python jobs/pretrain.py FILE.toml [key=value ...]``."""

import sys

from cellray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
