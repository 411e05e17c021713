"""Ray job entry point: ``python jobs/finetune.py FILE.toml [key=value ...]``."""

import sys

from cellray.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
